"""The LLM kind: ports, faults that are told before anything loads, lightness."""

import subprocess
import sys
from pathlib import Path

import pytest

from omni.registry import CheckpointRef, Port, find_kind
from omni.spec import LlmSpec, SamplingSpec

KIND = find_kind("llm")


def faults(spec: LlmSpec, folder: Path) -> list[str]:
    return [str(mistake) for mistake in KIND.check(spec, str(folder))]


def test_the_template_makes_the_ports() -> None:
    ports = KIND.ports(LlmSpec(model="owner/name", template="{style}: {prompt} {{x}}"), ".")
    assert ports.inputs == {"style": Port("text", required=True), "prompt": Port("text", required=True)}
    assert ports.outputs == {"text": Port("text")}


def test_checkpoint() -> None:
    assert KIND.checkpoint(LlmSpec(model="owner/name", revision="v2")) == CheckpointRef("owner/name", "v2")
    assert KIND.checkpoint(LlmSpec(model="name", engine="openai", base_url="http://localhost:1/v1")) is None


@pytest.mark.parametrize("model", ["owner/name", "gpt2", "folder", "./folder"])
def test_hub_ids_and_folders_are_fine(model: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").touch()
    assert faults(LlmSpec(model=model), tmp_path) == []


@pytest.mark.parametrize("model", ["./rewriter", "../{here}/rewriter", "{path}/rewriter", "a/b/c", "rewriter/"])
def test_a_folder_that_is_not_there(model: str, tmp_path: Path) -> None:
    (tmp_path / "rewriters").mkdir()
    fault = faults(LlmSpec(model=model.format(here=tmp_path.name, path=tmp_path)), tmp_path)[0]
    assert fault.startswith(f"model: {tmp_path}")
    assert "does not exist" in fault
    assert "did you mean 'rewriters'?" in fault or model == "a/b/c"
    assert "a model is a folder or a hub id (owner/name)" in fault


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "model.gguf is a file, name its folder" in faults(LlmSpec(model="./model.gguf"), tmp_path)[0]


def test_other_weights_than_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    fault = faults(LlmSpec(model="."), tmp_path)[0]
    assert fault.startswith(f"model: {tmp_path} holds no *.safetensors file")
    assert "save_pretrained" in fault


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (LlmSpec(model="m", template="{a.b}"), "template: '{a.b}' is not allowed"),
        (LlmSpec(model="m", template=" "), "template: is empty"),
        (LlmSpec(model="m", sampling=SamplingSpec(stop=["x", ""])), "sampling.stop: holds an empty text"),
        (LlmSpec(model="m", base_url="http://host/v1"), "base_url: is for engine 'openai' only"),
        (LlmSpec(model="m", api_key_env="KEY"), "api_key_env: is for engine 'openai' only"),
        (LlmSpec(model="m", engine="openai"), "base_url: is needed with engine 'openai'"),
        (LlmSpec(model="m", engine="openai", base_url="localhost:8000"), "base_url: 'localhost:8000' must be like"),
        (LlmSpec(model="m", engine="openai", base_url="http://h:port/v1"), "base_url: 'http://h:port/v1' is not an"),
        (LlmSpec(model="m", engine="openai", base_url="http://me:key@h/v1"), "base_url: must hold no key"),
    ],
)
def test_faults_of_the_spec(spec: LlmSpec, fault: str, tmp_path: Path) -> None:
    found = faults(spec, tmp_path)
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_the_kind_is_light() -> None:
    code = (
        "import sys; from omni.registry import find_kind; find_kind('llm'); find_kind('function');"
        "print([name for name in ('torch', 'transformers', 'PIL', 'numpy', 'ray') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
