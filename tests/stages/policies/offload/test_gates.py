"""Every way in which pipelines enter a component: what computes finds its weights."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import nn

from omni.errors import UsageError
from tests.stages.policies.offload.small import POLICIES, Denoiser, Vae, X, put, same


@pytest.mark.parametrize("policy", POLICIES)
def test_methods_and_modules_called_directly_find_their_weights(policy: str) -> None:
    vae, denoiser = Vae().eval(), Denoiser().eval()

    def run() -> torch.Tensor:
        x = vae.encode(X)
        x = denoiser.embed(x) + denoiser.blocks[3](x)
        return vae.decoder(x) + vae.decode(x) + vae.bn.running_mean

    offload = same(run, {"vae": vae, "transformer": denoiser}, policy)
    assert offload.policy == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_encoder_with_tied_weights_generates(policy: str) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])

    def run() -> torch.Tensor:
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        hidden = model.model(tokens).last_hidden_state
        return torch.cat([tokens.flatten().float(), hidden.flatten(), model.lm_head(hidden).flatten()])

    same(run, {"model": model}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_encoder_with_shared_embeddings_and_parts_called_alone(policy: str) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])

    def run() -> torch.Tensor:
        assert model.dtype == torch.float32
        assert model.device.type == "cpu"
        states = model(ids).last_hidden_state + model.encoder(ids).last_hidden_state
        return states + model.get_input_embeddings()(ids)

    same(run, {"text_encoder": model}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_unet_whose_blocks_do_not_come_in_order(policy: str) -> None:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    ).eval()
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    same(lambda: unet(sample, 3, states).sample, {"unet": unet}, policy, spec={"ahead": 1})


@pytest.mark.parametrize("policy", POLICIES)
def test_skipped_blocks(policy: str) -> None:
    denoiser = Denoiser().eval()
    same(lambda: denoiser(X, skip=True) + denoiser(X) + denoiser(X, skip=True), {"transformer": denoiser}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_pipelines_read_signatures_dtypes_and_devices(policy: str) -> None:
    denoiser = Denoiser().to(torch.bfloat16).eval()
    before = inspect.signature(denoiser.forward)
    offload = put({"transformer": denoiser}, policy)
    assert inspect.signature(denoiser.forward) == before
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert denoiser.to("cpu") is denoiser
    assert denoiser.to(torch.bfloat16) is denoiser
    with pytest.raises(UsageError, match=r"transformer cannot be converted to torch.float32 .*offload.policy: none"):
        denoiser.to(torch.float32)
    offload.reset()
    assert "forward" not in vars(denoiser)
    assert "_apply" not in vars(denoiser)
    assert denoiser.float().table.dtype == torch.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_the_next_request_works_after_a_failed_one(policy: str) -> None:
    denoiser, other = Denoiser().eval(), Denoiser().eval()
    with torch.no_grad():
        expected = denoiser(X) + other(X)
        offload = put({"a": denoiser, "b": other}, policy)
        for wrong in (torch.zeros(2, 3), torch.zeros(2, 8, dtype=torch.int64)):
            with pytest.raises(RuntimeError):
                denoiser(wrong)
        broken = denoiser.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoiser(X)
        broken.remove()
        assert torch.equal(denoiser(X) + other(X), expected)
        offload.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_mapped_from_a_checkpoint(policy: str, tmp_path: Path) -> None:
    """As diffusers and transformers load them: views of the mapped file, in the file's order."""
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    same(lambda: model(ids).last_hidden_state, {"text_encoder": model}, policy, spec={"ahead": 1})


@pytest.mark.parametrize("policy", POLICIES)
def test_many_threads(policy: str) -> None:
    components: dict[str, nn.Module] = {name: Denoiser().eval() for name in "abc"}
    barrier = threading.Barrier(4)

    def work(number: int) -> torch.Tensor:
        barrier.wait(timeout=60)
        x = X + number
        with torch.no_grad():
            for step in range(12):
                x = components["abc"[(step + number) % 3]](x)
        return x

    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(work, range(4)))
        offload = put(components, policy)
        for drawn, value in zip(pool.map(work, range(4)), expected, strict=True):
            assert torch.equal(drawn, value)
        offload.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_inference_mode(policy: str) -> None:
    denoiser, other = Denoiser().eval(), Denoiser().eval()
    with torch.inference_mode():
        expected = denoiser(X) + other(X)
        offload = put({"a": denoiser, "b": other}, policy)
        for _ in range(2):
            assert torch.equal(denoiser(X) + other(X), expected)
        offload.reset()
    with torch.no_grad():
        assert torch.equal(denoiser(X) + other(X), expected)
