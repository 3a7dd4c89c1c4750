"""The transformers engine on a tiny random model."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.errors import RequestAborted, StageError, StageSetupError
from omni.messages import LoadProgress, Output, Progress, StageItem, Started, TextDelta
from omni.registry import find_kind, import_string
from omni.spec import LlmSpec, SamplingSpec
from omni.stage import StageCall, StageContext
from stages.llm.stage import LlmStage

Shared = Callable[..., Awaitable[LlmStage]]

WAIT_SECONDS = 60
GREEDY = SamplingSpec(max_new_tokens=16)
SAMPLED = SamplingSpec(max_new_tokens=16, temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1)
LONG = SamplingSpec(max_new_tokens=200)
PROMPTS = [f"{'once upon a time ' * number}{number}" for number in range(4)]


def new_stage(model: Path, **options: Any) -> LlmStage:
    spec = LlmSpec(model=str(model), **options)
    stage = import_string(find_kind("llm").stage)(StageContext(name="rewrite", spec=spec, base_dir=".", num_threads=1))
    assert isinstance(stage, LlmStage)
    return stage


@contextlib.asynccontextmanager
async def running(model: Path, **options: Any) -> AsyncGenerator[LlmStage, None]:
    """A stage of one's own."""
    stage = new_stage(model, **options)
    await stage.setup(lambda progress: None)
    try:
        yield stage
    finally:
        await stage.teardown()


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """Gives stages that are set up once for all tests; one thread each, as the models are tiny."""
    num_threads, stages = torch.get_num_threads(), {}

    async def shared(model: Path, **options: Any) -> LlmStage:
        key = f"{model} {options}"
        if key not in stages:
            stages[key] = new_stage(model, **options)
            await stages[key].setup(lambda progress: None)
            assert stages[key]._batch is not None, "the tiny model can be batched"
        return stages[key]

    yield shared
    for stage in stages.values():
        asyncio.run(stage.teardown())
    torch.set_num_threads(num_threads)


async def items_of(stage: Any, prompt: str = "hello", seed: int = 0, request_id: str = "r") -> list[StageItem]:
    call = StageCall(request_id=request_id, inputs={"prompt": prompt}, seed=seed)
    return [item async for item in stage.run(call)]


async def until_running(stage: LlmStage, request_id: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while request_id not in stage._runs:
            await asyncio.sleep(0)


async def text_of(stage: Any, prompt: str = "hello", seed: int = 0, request_id: str = "r") -> str:
    return (await items_of(stage, prompt, seed, request_id))[-1].payload["text"]


@pytest.fixture(params=[True, False], ids=["batched", "one by one"])
def batched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[LlmStage], LlmStage]:
    """Makes a shared stage run requests in the batch, or one after another."""

    def batched(stage: LlmStage) -> LlmStage:
        if not request.param:
            monkeypatch.setattr(stage, "_batch", None)
        return stage

    return batched


Batched = Callable[[LlmStage], LlmStage]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_text_does_not_depend_on_what_else_runs(
    plain_model: Path, shared: Shared, batched: Batched, sampling: SamplingSpec
) -> None:
    stage = await shared(plain_model, sampling=sampling)
    alone = [await text_of(stage, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    stage = batched(stage)
    together = await asyncio.gather(
        *(text_of(stage, prompt, seed, request_id=str(seed)) for seed, prompt in enumerate(PROMPTS))
    )
    assert together == alone
    assert len(set(alone)) == len(PROMPTS)


async def test_seeds(plain_model: Path, shared: Shared) -> None:
    texts = [await text_of(await shared(plain_model, sampling=SAMPLED), seed=seed) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    greedy = await shared(plain_model, sampling=GREEDY)
    assert await text_of(greedy, seed=1) == await text_of(greedy, seed=2)


async def test_items_of_a_run(plain_model: Path, shared: Shared, batched: Batched) -> None:
    first, *items, last = await items_of(batched(await shared(plain_model, sampling=GREEDY)))
    assert isinstance(first, Started)
    assert isinstance(last, Output)
    deltas = [item.text for item in items if isinstance(item, TextDelta)]
    assert "".join(deltas) == last.payload["text"]
    assert len(deltas) > 5
    steps = [item for item in items if isinstance(item, Progress)]
    assert [(step.step, step.num_steps, step.unit) for step in steps] == [(n, 16, "token") for n in range(1, 17)]


async def test_the_batch_agrees_with_plain_generate(plain_model: Path, shared: Shared) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plain_model)
    tokenizer = AutoTokenizer.from_pretrained(plain_model)
    ids = tokenizer("hello", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
    assert await text_of(await shared(plain_model, sampling=GREEDY)) == tokenizer.decode(made, skip_special_tokens=True)


async def test_stop_strings(plain_model: Path, shared: Shared, batched: Batched) -> None:
    whole = await text_of(await shared(plain_model, sampling=GREEDY))
    stop = next(letter for letter in whole[4:] if letter not in whole[:4] and letter != "\ufffd")
    stage = await shared(plain_model, sampling=SamplingSpec(max_new_tokens=16, stop=["never", stop]))
    assert await text_of(batched(stage)) == whole[: whole.index(stop)]


async def test_an_abort_stops_between_tokens(plain_model: Path, shared: Shared, batched: Batched) -> None:
    stage = batched(await shared(plain_model, sampling=LONG))
    seen = []

    async def run_and_abort() -> None:
        async for item in stage.run(StageCall(request_id="a", inputs={"prompt": "x"}, seed=0)):
            seen.append(item)
            if isinstance(item, Progress) and item.step == 3:
                await stage.abort("a")

    with pytest.raises(RequestAborted):
        await run_and_abort()
    assert sum(isinstance(item, Progress) for item in seen) < 200
    assert not isinstance(seen[-1], Output)
    await stage.abort("never seen")


async def test_a_request_that_the_batch_has_not_taken_up_has_not_started(
    plain_model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await shared(plain_model, sampling=GREEDY)
    monkeypatch.setattr(stage._batch._batch, "add_request", lambda *args, **options: None)
    item = asyncio.ensure_future(anext(stage.run(StageCall(request_id="r", inputs={"prompt": "x"}, seed=0))))
    await until_running(stage, "r")
    await stage.abort("r")
    with pytest.raises(RequestAborted):
        await item


async def test_the_thread_of_one_by_one_uses_the_models_device(
    plain_model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, devices = await shared(plain_model, sampling=GREEDY), []
    monkeypatch.setattr(stage, "_batch", None)
    monkeypatch.setattr("stages.llm.tokens.use_device", devices.append)
    await text_of(stage)
    assert devices == ["cpu"]


async def test_an_id_can_come_again_after_an_abort(plain_model: Path, shared: Shared, batched: Batched) -> None:
    stage = batched(await shared(plain_model, sampling=GREEDY))
    expected = await text_of(stage)
    run = asyncio.ensure_future(items_of(stage))
    await until_running(stage, "r")
    await stage.abort("r")
    with pytest.raises(RequestAborted):
        await run
    assert await text_of(stage) == expected


async def test_a_request_that_waits_for_its_turn_can_be_aborted(
    plain_model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await shared(plain_model, sampling=LONG)
    monkeypatch.setattr(stage, "_batch", None)
    first = asyncio.ensure_future(items_of(stage, request_id="first"))
    second = asyncio.ensure_future(items_of(stage, request_id="second"))
    await until_running(stage, "second")
    await stage.abort("second")
    with pytest.raises(RequestAborted):
        await second
    assert not first.done()
    await stage.abort("first")
    with pytest.raises(RequestAborted):
        await first


async def test_the_chat_template_is_used(plain_model: Path, chat_model: Path, shared: Shared) -> None:
    chat, plain = await shared(chat_model, system="be polite"), await shared(plain_model, sampling=GREEDY)
    call = StageCall(request_id="r", inputs={"prompt": "hi <|end|>"}, seed=0)
    ids = chat._prompt_ids(call)
    tokens = chat._tokenizer.convert_ids_to_tokens(ids)
    assert [tokens[0], tokens[-1]] == ["<|system|>", "<|assistant|>"]
    assert tokens.count("<|end|>") == 2, "control tokens in what users write are only text"
    assert chat._tokenizer.decode(ids).startswith("<|system|>be polite<|end|><|user|>hi ")
    assert plain._tokenizer.decode(plain._prompt_ids(call)) == "hi <|end|>"


async def test_a_chat_template_that_refuses(chat_model: Path, shared: Shared) -> None:
    with pytest.raises(StageError, match=r"refuses the messages: no such system \(leave `system` out"):
        await text_of(await shared(chat_model, system="be rude"))


async def test_the_models_own_settings_give_the_end_token_only(
    plain_model: Path, shared: Shared, batched: Batched, tmp_path: Path
) -> None:
    whole = await text_of(await shared(plain_model, sampling=GREEDY))
    end = next(n for n in range(3, 16) if whole[n] not in whole[:n] and whole[n].isascii())
    (number,) = (await shared(plain_model, sampling=GREEDY))._tokenizer(whole[end]).input_ids
    folder = tmp_path / "model"
    shutil.copytree(plain_model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [number], "repetition_penalty": 3.0}))
    async with running(folder, sampling=GREEDY) as stage:
        assert await text_of(batched(stage)) == whole[:end]


async def test_a_prompt_that_is_too_long(plain_model: Path, shared: Shared) -> None:
    longest = json.loads((plain_model / "config.json").read_text())["max_position_embeddings"]
    stage = await shared(plain_model, sampling=GREEDY)
    fault = f"the prompt has {longest} tokens; the model takes {longest}, answer included .shorten"
    with pytest.raises(StageError, match=fault):
        await text_of(stage, "x" * longest)
    steps = [item for item in await items_of(stage, "x" * (longest - 3)) if isinstance(item, Progress)]
    assert [(step.step, step.num_steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]


async def test_a_prompt_too_long_for_the_batch_goes_the_other_way(
    plain_model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = await shared(plain_model, sampling=GREEDY)
    expected = await text_of(stage)
    monkeypatch.setattr(stage._batch, "max_tokens", 10)
    assert stage._source_for(10) is stage._batch
    assert stage._source_for(11) is stage._one_by_one
    assert await text_of(stage) == expected


@pytest.mark.parametrize("prompt", ["", "  \n"])
async def test_an_empty_input(prompt: str, plain_model: Path, shared: Shared) -> None:
    with pytest.raises(StageError, match=r"stage 'rewrite': its input 'prompt' is empty \(give 'prompt' a text"):
        await text_of(await shared(plain_model, sampling=GREEDY), prompt)


@pytest.mark.parametrize("family", ["Falcon", "Bloom"])
async def test_models_that_cannot_be_batched_run_one_by_one(family: str, plain_model: Path, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(plain_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "gen*.json"))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    async with running(folder, sampling=SAMPLED) as stage:
        assert stage._batch is None
        assert await text_of(stage) == await text_of(stage) != ""


async def test_requests_go_on_when_the_batch_has_died(plain_model: Path) -> None:
    async with running(plain_model, sampling=SAMPLED) as stage:
        expected = await text_of(stage)
        assert stage._batch is not None
        await asyncio.to_thread(stage._batch.stop)
        assert await text_of(stage) == expected


async def test_loading_is_reported(plain_model: Path) -> None:
    reports: list[LoadProgress] = []
    context = StageContext(name="rewrite", spec=LlmSpec(model=plain_model.name), base_dir=str(plain_model.parent))
    stage = import_string(find_kind("llm").stage)(context)
    await stage.setup(reports.append)
    await stage.teardown()
    size = (plain_model / "model.safetensors").stat().st_size
    assert {(r.stage, r.component, r.total_bytes) for r in reports} == {("rewrite", "model", size)}
    assert [r.state for r in reports] == ["loading"] * (len(reports) - 1) + ["ready"]
    assert [r.done_bytes for r in reports] == sorted(r.done_bytes for r in reports)
    assert (reports[0].done_bytes, reports[-1].done_bytes) == (0, size)


@pytest.mark.parametrize("model", ["nobody/nothing", "here"])
async def test_a_model_that_cannot_be_loaded(model: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    stage = LlmStage(StageContext(name="rewrite", spec=LlmSpec(model=model), base_dir=str(tmp_path)))
    with pytest.raises(StageSetupError, match=f"stage 'rewrite': cannot load '{model}'.* must be a folder or a hub id"):
        await stage.setup(lambda progress: None)
    await stage.teardown()


async def test_an_error_of_loading_without_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError

    monkeypatch.setattr("stages.llm.stage.AutoTokenizer.from_pretrained", fail)
    stage = LlmStage(StageContext(name="rewrite", spec=LlmSpec(model="owner/name"), base_dir=str(tmp_path)))
    with pytest.raises(StageSetupError, match="cannot load 'owner/name': OSError"):
        await stage.setup(lambda progress: None)


async def test_a_setup_that_is_cancelled_leaves_no_batch(
    plain_model: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Batch:
        stopped = False

        def stop(self) -> None:
            self.stopped = True

    stage, batch, probed = await shared(plain_model, sampling=GREEDY), Batch(), asyncio.Event()

    async def probe(batch: Batch) -> None:
        probed.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("stages.llm.stage.ContinuousBatch", lambda *args: batch)
    monkeypatch.setattr(stage, "_probe", probe)
    start = asyncio.ensure_future(stage._start_batch())
    await probed.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert batch.stopped


async def test_nothing_runs_after_teardown(plain_model: Path) -> None:
    async with running(plain_model, sampling=LONG) as stage:
        run = stage.run(StageCall(request_id="r", inputs={"prompt": "x"}, seed=0))
        async for item in run:
            if isinstance(item, Progress):
                break
        assert stage._batch is not None
        thread = stage._batch._batch._generation_thread
        assert thread.daemon, "a crashed program must not be kept alive by it"
        await run.aclose()
    assert not thread.is_alive()
