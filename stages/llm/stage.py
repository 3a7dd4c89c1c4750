"""The LLM stage for `engine: transformers`: loads the model once, streams text for many requests at a time."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

import jinja2
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from omni.checkpoint import auto_dtype, find_checkpoint, read_facts
from omni.errors import RequestAborted, StageError, StageSetupError, UsageError, one_line
from omni.memory import MemoryPlan
from omni.memory_planner import settle
from omni.messages import LoadProgress, Output, Progress, StageItem, Started, TextDelta
from omni.model_paths import resolve_model_path
from omni.registry import CheckpointRef
from omni.spec import LlmSpec
from omni.stage import Report, Stage, StageCall, StageContext
from stages.device import peak_device_bytes, use_device
from stages.llm.prompt import build_messages
from stages.llm.reading import TextReader
from stages.llm.tokens import ContinuousBatch, OneByOne, TokenSource, Update
from stages.policies.load import ComponentRequest, load_components
from stages.policies.offload.apply import Offload, apply_offload
from stages.policies.offload.correction import Correction

log = logging.getLogger(__name__)

LOAD_FAULTS = (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
BATCH_FAULTS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers raises for a model that it cannot load, or cannot batch."""
COMPONENT = "model"
NEEDED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Of a hub checkpoint; no pickled weights."""
PROBE_SECONDS = 120.0
PROBE_LENGTHS = (2, 5)
PROBE_TOKENS = 3
ALIVE_SECONDS = 5.0
"""How often a waiting request looks whether its source of tokens is still there."""


class LlmStage(Stage):
    """A causal language model in this process."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        assert isinstance(context.spec, LlmSpec)
        self._spec = context.spec
        self._runs: dict[str, asyncio.Queue[Update]] = {}
        self._keys = itertools.count()
        self._one_by_one: OneByOne | None = None
        self._batch: ContinuousBatch | None = None
        self._offload: Offload | None = None
        self._correction: Correction | None = None

    async def setup(self, report: Report) -> None:
        self._model, self._tokenizer = await asyncio.to_thread(self._load, report)
        self._ends = self._set_defaults()
        self._max_tokens = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._one_by_one = OneByOne(self._model, self._spec.sampling)
        self._batch = await self._start_batch()

    async def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        prompt = self._prompt_ids(call)
        num_tokens = self._room(len(prompt))
        source = self._source_for(len(prompt) + num_tokens)
        reader = TextReader(self._decode, self._spec.sampling.stop)
        key = f"{call.request_id}/{next(self._keys)}"
        updates: asyncio.Queue[Update] = asyncio.Queue()
        self._runs[call.request_id] = updates
        source.submit(key, prompt, num_tokens, call.seed, updates.put_nowait)
        step = 0
        try:
            while not reader.stopped:
                update = await self._next(updates, source)
                if update.error is not None:
                    raise self._failure(update.error, call)
                if not (step or update.tokens or update.finished):
                    yield Started()
                for token in update.tokens:
                    step += 1
                    yield Progress(step=step, num_steps=num_tokens, unit="token")
                    text = reader.push([token]) if token not in self._ends else ""
                    if text:
                        yield TextDelta(text=text)
                    if reader.stopped:
                        break
                if update.finished:
                    break
        finally:
            source.cancel(key)
            self._runs.pop(call.request_id, None)
        rest = reader.finish()
        if rest:
            yield TextDelta(text=rest)
        if self._correction is not None and not self._runs:
            await asyncio.to_thread(self._correction.observe)
        yield Output(payload={"text": reader.text})

    async def abort(self, request_id: str) -> None:
        updates = self._runs.get(request_id)
        if updates is not None:
            updates.put_nowait(Update(error=RequestAborted(request_id)))

    def peak_device_bytes(self) -> int:
        return peak_device_bytes(self.context.device)

    async def teardown(self) -> None:
        for source in (self._batch, self._one_by_one):
            if source is not None:
                await asyncio.to_thread(source.stop)
        self._batch = self._one_by_one = None
        if self._offload is not None:
            await asyncio.to_thread(self._offload.reset)
        self._model = self._tokenizer = None
        if self.context.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()

    # Loading ------------------------------------------------------------------------------------------------------

    def _load(self, report: Report) -> tuple[Any, Any]:
        spec, context = self._spec, self.context
        use_device(context.device)
        if context.device == "cpu" and context.num_threads:
            torch.set_num_threads(context.num_threads)
        model = resolve_model_path(spec.model, context.base_dir)
        total = _weight_bytes(model)

        def progress(component: str, done: int, _: int) -> None:
            report(LoadProgress(stage=context.name, component=component, done_bytes=done, total_bytes=max(done, total)))

        progress(COMPONENT, 0, total)
        transformers_logging.disable_progress_bar()
        options = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
            if context.memory is not None and context.memory.awaits_checkpoint:
                snapshot_download(spec.model, revision=spec.revision, allow_patterns=NEEDED_FILES)
            facts = read_facts(CheckpointRef(spec.model, spec.revision), context.base_dir)
            memory = settle(context.memory, spec, facts)
            loaded = self._load_model(model, options, progress, memory)
            if memory is not None and memory.policy != "none":
                self._offload = apply_offload({COMPONENT: loaded}, memory, context.device, spec.offload)
                self._correction = Correction.of(context.name, self._offload, memory, spec, facts)
        except UsageError as error:
            raise StageSetupError(context.name, str(error)) from error
        except LOAD_FAULTS as error:
            raise StageSetupError(
                context.name,
                f"cannot load '{spec.model}': {one_line(error)}",
                "model must be a folder or a hub id of a causal language model with safetensors weights; a hub id "
                "needs the network or a filled cache",
                details=str(error),
            ) from error
        report(
            LoadProgress(stage=context.name, component=COMPONENT, done_bytes=total, total_bytes=total, state="ready")
        )
        return loaded.eval(), tokenizer

    def _load_model(
        self,
        model: str,
        options: dict[str, Any],
        progress: Callable[[str, int, int], None],
        memory: MemoryPlan | None,
    ) -> Any:
        """The model; a hub id that is not on this machine yet is fetched and loaded by transformers itself."""
        spec, device = self._spec, self.context.device
        dtype = auto_dtype(device) if spec.dtype == "auto" else spec.dtype
        moves = memory is not None and memory.moves(COMPONENT)
        folder = find_checkpoint(CheckpointRef(spec.model, spec.revision), self.context.base_dir)
        if folder is None or not spec.load.enabled:
            return AutoModelForCausalLM.from_pretrained(
                model, use_safetensors=True, dtype=dtype, device_map={"": "cpu" if moves else device}, **options
            )
        request = ComponentRequest(
            name=COMPONENT,
            model_class=AutoModelForCausalLM,
            folder=folder,
            library="transformers",
            dtype=getattr(torch, dtype),
            target="host" if moves else "device",
            device=device,
            shares=memory is not None and memory.shares_host,
            options=options,
        )
        return load_components([request], spec.load, progress, from_disk=moves and memory.policy == "disk")[COMPONENT]

    def _set_defaults(self) -> frozenset[int]:
        """Leave nothing but the special tokens of the model's own generation settings; returns those that end it."""
        own = self._model.generation_config
        end = self._tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        pad = next((pad for pad in (own.pad_token_id, self._tokenizer.pad_token_id, *ends) if pad is not None), 0)
        self._model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=ends or None, pad_token_id=pad, do_sample=False
        )
        return frozenset(ends)

    async def _start_batch(self) -> ContinuousBatch | None:
        """The continuous batch, if it works with this model; else None, and requests run one after another."""
        if self._model.config._attn_implementation != "sdpa":
            return None  # the batch would switch the whole model to another attention, and the other source needs it
        try:
            batch = ContinuousBatch(self._model, self._spec.sampling)
        except BATCH_FAULTS as error:
            self._warn(error)
            return None
        works = False
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._probe(batch)
            works = True
        except (*BATCH_FAULTS, TimeoutError, StageError) as error:
            self._warn(error)
        finally:  # also when the setup is cancelled: nobody else knows of the batch yet
            if not works:
                await asyncio.to_thread(batch.stop)
        return batch if works else None

    async def _probe(self, batch: ContinuousBatch) -> None:
        """Make a few tokens for prompts of different lengths at once; raises what the batch cannot do."""
        waits: list[asyncio.Queue[Update]] = []
        for length in PROBE_LENGTHS:
            waits.append(asyncio.Queue())
            prompt = [self._model.generation_config.pad_token_id] * length
            batch.submit(f"probe/{length}", prompt, PROBE_TOKENS, 0, waits[-1].put_nowait)
        for updates in waits:
            while not (update := await self._next(updates, batch)).finished:
                pass
            if update.error is not None:
                raise update.error

    def _warn(self, error: BaseException) -> None:
        log.warning("stage '%s': requests run one after another, no batching: %s", self.context.name, error)

    # Running ------------------------------------------------------------------------------------------------------

    def _source_for(self, num_tokens: int) -> TokenSource:
        assert self._one_by_one is not None, "run after setup"
        batch = self._batch
        if batch is not None and num_tokens <= batch.max_tokens and batch.is_alive():
            return batch
        return self._one_by_one

    def _prompt_ids(self, call: StageCall) -> list[int]:
        messages = build_messages(self._spec, call.inputs, self.context.name)
        if not self._tokenizer.chat_template:
            text = "\n\n".join(message["content"] for message in messages)
            ids: list[int] = self._tokenizer(text).input_ids
        else:
            try:
                ids = self._tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    return_dict=False,
                    sanitize_control_tokens=True,
                    enable_thinking=False,  # Qwen's templates: the answer is wanted, and max_new_tokens is for it
                )
            except jinja2.TemplateError as error:
                raise StageError(
                    self.context.name,
                    f"the model's chat template refuses the messages: {error}",
                    "leave `system` out and say it in `template`",
                ) from error
        if not ids:
            raise StageError(self.context.name, "the prompt has no tokens", "write more into `template`")
        return ids

    def _room(self, num_prompt_tokens: int) -> int:
        """New tokens that may be made after the prompt."""
        wanted = self._spec.sampling.max_new_tokens
        room = wanted if self._max_tokens is None else self._max_tokens - num_prompt_tokens
        if room < 1:
            raise StageError(
                self.context.name,
                f"the prompt has {num_prompt_tokens} tokens; the model takes {self._max_tokens}, answer included",
                "shorten the inputs or the template",
            )
        return min(wanted, room)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    async def _next(self, updates: asyncio.Queue[Update], source: TokenSource) -> Update:
        while True:
            try:
                async with asyncio.timeout(ALIVE_SECONDS):
                    return await updates.get()
            except TimeoutError:
                if not source.is_alive():
                    raise StageError(self.context.name, "the model's worker thread has died", "restart Omni") from None

    def _failure(self, error: BaseException, call: StageCall) -> BaseException:
        if isinstance(error, RequestAborted):
            return error
        no_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        remedy = "lower sampling.max_new_tokens, shorten the prompt, or use a smaller model" if no_memory else ""
        return StageError(self.context.name, one_line(error), remedy)


def _weight_bytes(model: str) -> int:
    """Bytes of the weights in a folder, 0 for a hub id."""
    if not os.path.isdir(model):
        return 0
    with os.scandir(model) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors"))
