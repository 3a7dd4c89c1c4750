"""Two ways to make tokens with a transformers model: many requests in one continuous batch, or one after another."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import msgspec
import torch
from transformers import ContinuousBatchingConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from omni.spec import SamplingSpec
from stages.device import use_device
from stages.llm.memory import BATCH_REQUESTS, PROMPT_TOKENS
from stages.llm.sampling import SEED, BatchPicker, OneRequestPicker, Picker

PAGE_TOKENS = 32
"""Tokens in a page of the batch's cache."""
STOP_SECONDS = 8.0


class Update(msgspec.Struct, frozen=True):
    """News of one request."""

    tokens: list[int] = []
    """Tokens made since the last update."""
    finished: bool = False
    error: BaseException | None = None


Emit = Callable[[Update], None]
"""Takes a request's updates, on the event loop; the first one, without tokens, says that its turn has come."""


class TokenSource(Protocol):
    """Makes tokens for requests; `submit` and `cancel` are called on the event loop and never block."""

    def submit(self, key: str, prompt: list[int], num_tokens: int, seed: int, emit: Emit) -> None:
        """Begin with a request of at most `num_tokens` new tokens."""

    def cancel(self, key: str) -> None:
        """Stop a request after the token it is at; unknown keys are ignored."""

    def is_alive(self) -> bool:
        """False when no update will come any more."""

    def stop(self) -> None:
        """Stop all work, within STOP_SECONDS. Blocks."""


class OneByOne(TokenSource):
    """One `generate` at a time, in a thread: works with every causal model."""

    def __init__(self, model: PreTrainedModel, sampling: SamplingSpec) -> None:
        self._model = model
        self._picker = Picker(sampling)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokens")
        self._stops: dict[str, threading.Event] = {}

    def submit(self, key: str, prompt: list[int], num_tokens: int, seed: int, emit: Emit) -> None:
        loop, stop = asyncio.get_running_loop(), threading.Event()
        self._stops[key] = stop

        def deliver(update: Update) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(emit, update)

        def done(future: Future[None]) -> None:
            if not future.cancelled():
                deliver(Update(finished=True, error=future.exception()))

        self._pool.submit(self._generate, prompt, num_tokens, seed, stop, deliver).add_done_callback(done)

    def cancel(self, key: str) -> None:
        stop = self._stops.pop(key, None)
        if stop is not None:
            stop.set()

    def is_alive(self) -> bool:
        return True

    def stop(self) -> None:
        for stop in self._stops.values():
            stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, prompt: list[int], num_tokens: int, seed: int, stop: threading.Event, deliver: Emit) -> None:
        if stop.is_set():
            return
        use_device(str(self._model.device))
        deliver(Update())
        config = copy.deepcopy(self._model.generation_config)
        config.max_new_tokens = num_tokens
        ids = torch.tensor([prompt], device=self._model.device)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([OneRequestPicker(self._picker, len(prompt), seed)]),
            stopping_criteria=StoppingCriteriaList([_Listener(len(prompt), stop, deliver)]),
        )


class _Listener(StoppingCriteria):
    """Hears of every new token of a `generate`, and ends it when asked to."""

    def __init__(self, num_prompt_tokens: int, stop: threading.Event, deliver: Emit) -> None:
        self._seen = num_prompt_tokens
        self._stop = stop
        self._deliver = deliver

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Called with all tokens so far, (1, n)."""
        new, self._seen = input_ids[0, self._seen :].tolist(), input_ids.shape[1]
        self._deliver(Update(new))
        return torch.full((1,), self._stop.is_set(), device=input_ids.device)


class ContinuousBatch(TokenSource):
    """Transformers' continuous batching: requests join and leave the running batch between tokens."""

    def __init__(self, model: PreTrainedModel, sampling: SamplingSpec) -> None:
        """Raises an error of any kind when the model cannot be batched."""
        tokens_per_request = PROMPT_TOKENS + sampling.max_new_tokens
        self.max_tokens = BATCH_REQUESTS * tokens_per_request // 2
        """The most tokens, prompt and answer, that one request may have; a longer one could fill the whole cache."""
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-BATCH_REQUESTS * tokens_per_request // PAGE_TOKENS),
            max_batch_tokens=PROMPT_TOKENS * 2,
            max_requests_per_batch=BATCH_REQUESTS * 2,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        generation = copy.deepcopy(model.generation_config)
        if generation.eos_token_id is None:
            generation.eos_token_id = -1  # what the batch takes for "none"
        self._batch = model.init_continuous_batching(generation, config)
        self._live: set[str] = set()
        picker = Picker(sampling)
        self._seeded = not picker.is_plain
        if self._seeded:
            processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([BatchPicker(picker)]))
            processors.tensors_required = 1
            self._batch.logit_processor = processors
        # A thread inherits being a daemon from the one that starts it: so a crashed program is not kept alive.
        starter = threading.Thread(target=self._batch.start, daemon=True)
        starter.start()
        starter.join()

    def submit(self, key: str, prompt: list[int], num_tokens: int, seed: int, emit: Emit) -> None:
        seen = 0

        def deliver(output: GenerationOutput) -> None:
            nonlocal seen
            if output.generated_tokens and not seen:  # the batch does not say when it takes a request up
                emit(Update())
            new, seen = output.generated_tokens[seen:], len(output.generated_tokens)
            failed = output.status == RequestStatus.FAILED
            if output.is_finished():
                self._live.discard(key)
            emit(Update(new, output.is_finished(), RuntimeError(output.error) if failed else None))

        self._live.add(key)
        self._batch.register_result_handler(key, deliver)
        extra = {SEED: seed} if self._seeded else {}
        self._batch.add_request(prompt, request_id=key, max_new_tokens=num_tokens, streaming=True, **extra)

    def cancel(self, key: str) -> None:
        if key not in self._live:
            return
        self._live.discard(key)
        self._batch.output_router.result_handlers.pop(key, None)
        self._batch.cancel_request(key)
        while self._batch.get_result(timeout=0):  # what came for requests that were cancelled
            pass

    def is_alive(self) -> bool:
        return self._batch.is_running() and self._batch.background_thread_status.fatal_error is None

    def stop(self) -> None:
        self._batch.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)
