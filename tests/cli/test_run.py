"""`omni run` with doubles, in this process and, for signals, in one of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from omni.cli import interrupt
from omni.hardware import detect
from omni.recipe import read_recipe

Omni = Callable[..., Any]
WAIT_SECONDS = 60
PAIR = """
name: pair
stages:
  rewrite: {kind: double}
  draw: {kind: double, gives: image, inputs: {prompt: rewrite.text}}
outputs: {image: draw.image}
"""
TEXT = "stages: {say: {kind: double}}"
HELD = "stages: {say: {kind: double, hold: true}}"
FAILING = "stages: {draw: {kind: double, gives: image, fail_in: run, fail_on: bad}}"
BROKEN = "stages: {draw: {kind: double, gives: image, fail_in: setup}}"
EDIT = """
inputs: {image: {type: image}, extra: {type: "list[image]"}, facts: {type: json, default: [1]}}
stages:
  draw: {kind: double, gives: image, ports: {image: image, extra: "list[image]", facts: json, prompt: text}}
"""


@pytest.fixture(autouse=True)
def _graphs(tmp_path: Path) -> None:
    graphs = {"pair": PAIR, "text": TEXT, "held": HELD, "failing": FAILING, "broken": BROKEN, "edit": EDIT}
    for name, text in graphs.items():
        (tmp_path / f"{name}.yaml").write_text(text)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def same(one: str, other: str) -> bool:
    return bool(np.array_equal(pixels(one), pixels(other)))


def prompt_of(path: str) -> str:
    return str(read_recipe(path).inputs["prompt"])


# One request ------------------------------------------------------------------------------------------------------


def test_a_picture_is_written_and_its_path_printed(omni: Omni) -> None:
    ran = omni("run", "pair.yaml", "--prompt", "a snowman", "--seed", 7, "--output", "a.png")
    assert (ran.code, ran.out) == (0, "a.png\n")
    assert pixels("a.png").shape == (2, 4, 3)


def test_the_table_names_stages_hops_and_seed(omni: Omni) -> None:
    lines = omni("run", "pair.yaml", "--prompt", "x", "--seed", 7).err.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("stage or hop")) :]
    assert table[0].split() == ["stage", "or", "hop", "seconds", "bytes"]
    names = [line.split("  ")[0] or line.strip().split("  ")[0] for line in table]
    expected = ["stage or hop", "rewrite", "rewrite.text -> draw.prompt (local)", "draw", "whole request", "seed 7"]
    assert names == expected
    assert table[1].split()[-2:] == ["64", "B"]


def test_memory_is_told_beside_its_prediction(omni: Omni) -> None:
    os.mkdir("double")
    save_file({"w": np.zeros(2**20, np.float32)}, "double/model.safetensors")
    lines = omni("run", "pair.yaml", "--prompt", "x").err.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("memory")) :]
    assert table[0].split() == ["memory", "GPU", "peak", "planned", "host", "peak", "planned", "load", "planned"]
    (row,) = [line.split() for line in table if line.startswith("draw")]
    assert (row[1:3], row[4], row[5:7], row[8]) == (["-", "-"], "MiB", ["516.0", "MiB"], "ms")


def test_progress_is_told_in_lines(omni: Omni) -> None:
    err = omni("run", "pair.yaml", "--prompt", "x").err
    for line in ("draw: ready", "rewrite: started", "draw: finished in"):
        assert line in err


def test_quiet_leaves_the_result_only(omni: Omni) -> None:
    ran = omni("run", "pair.yaml", "--prompt", "x", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "pair-001.png\n", "")


def test_names_of_our_own_replace_nothing(omni: Omni) -> None:
    assert [omni("run", "pair.yaml", "--prompt", "x", "-q").out for _ in range(2)] == [
        "pair-001.png\n",
        "pair-002.png\n",
    ]


def test_text_is_printed_and_written_when_asked_for(omni: Omni) -> None:
    printed = omni("run", "text.yaml", "--prompt", "x", "--seed", 1, "-q").out
    assert len(printed) == 65
    assert list(Path().glob("*.txt")) == []
    assert omni("run", "text.yaml", "--prompt", "x", "--seed", 1, "-q", "-o", "a.txt").out == f"{printed}a.txt\n"
    assert Path("a.txt").read_text() == printed


def test_set_changes_the_graph(omni: Omni) -> None:
    ran = omni("run", "text.yaml", "--prompt", "x", "--set", "stages.say.fail_in=run")
    assert (ran.code, ran.out) == (1, "")


# Many requests ----------------------------------------------------------------------------------------------------


def test_n_counts_seeds_up(omni: Omni) -> None:
    ran = omni("run", "pair.yaml", "--prompt", "x", "--seed", 2**32 - 2, "--n", 3, "-o", "a.png")
    assert ran.out.split() == ["a-1.png", "a-2.png", "a-3.png"]
    assert [read_recipe(path).seed for path in ran.out.split()] == [2**32 - 2, 2**32 - 1, 0]
    assert "median of 3" in ran.err
    assert "1/3 draw: finished" in ran.err
    alone = omni("run", "pair.yaml", "--prompt", "x", "--seed", 2**32 - 1, "-o", "b.png")
    assert alone.code == 0
    assert same("a-2.png", "b.png")


def test_prompts_come_from_a_file(omni: Omni) -> None:
    Path("prompts").write_text("\ufeffa star\n\n# a comment\n  a circle  \n", encoding="utf-8")
    ran = omni("run", "pair.yaml", "--prompts", "prompts", "--n", 2, "--seed", 5, "-o", "a.png")
    recipes = [(prompt_of(path), read_recipe(path).seed) for path in ran.out.split()]
    assert recipes == [("a star", 5), ("a star", 6), ("a circle", 5), ("a circle", 6)]


def test_prompts_come_from_stdin(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert [prompt_of(path) for path in omni("run", "pair.yaml", "--prompts", "-").out.split()] == ["one", "two"]


def test_a_failed_request_keeps_the_others(omni: Omni) -> None:
    Path("prompts").write_text("good\nbad\nfine\n")
    ran = omni("run", "failing.yaml", "--prompts", "prompts", "-o", "a.png", "-q")
    assert (ran.code, ran.out) == (1, "a-1.png\na-3.png\n")
    assert ran.err == "omni run: 2/3 stage 'draw': RuntimeError: the double fails in run\n"


def test_verbose_shows_where_a_stage_failed(omni: Omni) -> None:
    ran = omni("run", "failing.yaml", "--prompt", "bad", "-q", "--verbose")
    assert ran.code == 1
    assert "_last_step" in ran.err
    assert "RuntimeError: the double fails in run" in ran.err


def test_a_full_disk_fails_one_request(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Any, part: str, suffix: str, metadata: str) -> None:
        if '"prompt":"bad"' in metadata:
            raise OSError(28, "No space left on device")
        image.save(part, format="PNG")

    monkeypatch.setattr("omni.files._write_image", fail)
    Path("prompts").write_text("good\nbad\n")
    ran = omni("run", "pair.yaml", "--prompts", "prompts", "-o", "a.png", "-q")
    assert (ran.code, ran.out) == (1, "a-1.png\n")
    assert ran.err == "omni run: 2/2 cannot write a-2.png: No space left on device\n"


def test_a_fault_of_ours_fails_one_request(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        pass

    def fail(image: Any, part: str, suffix: str, metadata: str) -> None:
        if '"prompt":"bad"' in metadata:
            raise Odd("of a library")
        image.save(part, format="PNG")

    monkeypatch.setattr("omni.files._write_image", fail)
    Path("prompts").write_text("bad\ngood\n")
    ran = omni("run", "pair.yaml", "--prompts", "prompts", "-o", "a.png", "-q", "--verbose")
    assert (ran.code, ran.out) == (1, "a-2.png\n")
    assert ran.err.startswith("omni run: 1/2 Odd: of a library\nTraceback ")


def test_a_stage_that_cannot_load_is_1(omni: Omni) -> None:
    ran = omni("run", "broken.yaml", "--prompt", "x", "-q")
    assert (ran.code, ran.err) == (1, "omni run: stage 'draw': RuntimeError: the double fails in setup\n")


# Mistakes, all found before anything loads ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.yaml"], "gone.yaml: cannot read the file: No such file or directory"),
        (["broken.yaml", "--set", "stages.draw.stepps=3"], "stages.draw.stepps: unknown key"),
        (["broken.yaml", "--input", "prompt"], "--input prompt: expected NAME=VALUE"),
        (["broken.yaml", "--input", "promt=x"], "unknown input 'promt', did you mean 'prompt'?"),
        (["broken.yaml", "--prompt", "x", "--input", "prompt=y"], "--prompt and --input prompt exclude each other"),
        (["broken.yaml", "--prompt", "x", "--prompts", "p"], "--prompt and --prompts exclude each other"),
        (["broken.yaml", "--prompts", "gone"], "--prompts gone: No such file or directory"),
        (["broken.yaml", "--prompts", "empty"], "--prompts empty: holds no prompt; write one per line"),
        (["broken.yaml", "--prompts", "binary"], "--prompts binary: is not UTF-8 text"),
        (["broken.yaml", "--n", "0"], "--n 0: must be at least 1"),
        (["broken.yaml", "--n", "5001"], "--n 5001: 5001 requests are too many; at most 5000 run at once"),
        (["broken.yaml", "--n", "100000000000"], "--n 100000000000: 100000000000 requests are too many"),
        (["broken.yaml", "--prompts", "three", "--n", "4000"], "--n 4000: 12000 requests are too many"),
        (["broken.yaml", "--seed", "-1"], "seed must be a whole number from 0 to 4294967295, not -1"),
        (["broken.yaml", "-o", "a.mp4"], "--output a.mp4: the graph gives image (image); allowed suffixes:"),
        (["broken.yaml", "-o", "gone/a.png"], "gone: no such folder"),
        (["edit.yaml", "--input", "image=gone.jpg"], "cannot read gone.jpg: No such file or directory"),
        (["edit.yaml", "--input", "image=edit.yaml"], "edit.yaml is not a picture that can be read"),
        (["binary.JPG"], "binary.JPG: no graph file, and only .png files remember the graph that they were made with"),
        (["binary.png"], "cannot read binary.png: not a PNG picture"),
        (["broken.yaml", "--prompt", "\udcff"], "input 'prompt' is not valid UTF-8 text: '\\udcff'"),
    ],
)
def test_mistakes_are_2_and_one_line(omni: Omni, arguments: list[str], message: str) -> None:
    Path("empty").write_text("# nothing\n\n")
    Path("three").write_text("a\nb\nc\n")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("binary.png").write_bytes(b"\xff\xfe\x00")
    before = set(Path().iterdir())
    ran = omni("run", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert set(Path().iterdir()) == before


# Pictures that are made again -------------------------------------------------------------------------------------


def test_a_picture_is_made_again(omni: Omni) -> None:
    omni("run", "pair.yaml", "--prompt", "a snowman", "--seed", 7, "-o", "a.png")
    Path("pair.yaml").unlink()
    assert omni("run", "a.png", "--trust", "-o", "b.png").code == 0
    assert same("a.png", "b.png")
    assert read_recipe("a.png") == read_recipe("b.png")
    for changed in (["--prompt", "a star"], ["--seed", 8], ["--set", "stages.rewrite.kind=double", "--n", 1]):
        assert omni("run", "a.png", "--trust", "-o", "c.png", *changed).code == 0
        assert same("a.png", "c.png") == (changed[0] == "--set")


def test_overrides_are_remembered(omni: Omni) -> None:
    omni("run", "pair.yaml", "--prompt", "x", "--set", "stages.draw.steps=5", "-o", "a.png")
    assert read_recipe("a.png").graph["stages"]["draw"]["steps"] == 5
    omni("run", "a.png", "--trust", "--set", "name=other", "-q")
    assert read_recipe("other-001.png").graph["stages"]["draw"]["steps"] == 5


def test_a_stranger_s_picture_runs_no_code(omni: Omni) -> None:
    omni("run", "pair.yaml", "--prompt", "x", "-o", "a.png")
    ran = omni("run", "a.png", "-o", "b.png")
    assert (ran.code, ran.out) == (2, "")
    assert "stages.rewrite.kind: double" in ran.err
    assert "--trust" in ran.err
    assert not Path("b.png").exists()


def test_other_versions_are_a_line(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    omni("run", "pair.yaml", "--prompt", "x", "-o", "a.png")
    monkeypatch.setattr("omni.recipe.installed_versions", lambda: {**read_recipe("a.png").versions, "torch": "9"})
    lines = omni("run", "a.png", "--trust", "-q", "-o", "b.png").err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("a.png: made with torch '")
    assert lines[0].endswith("(here '9'); the pixels may differ")


def test_notes_of_the_hardware_are_told(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    found = msgspec.structs.replace(detect(), notes=("a GPU is missing",))
    monkeypatch.setattr("omni.api.load_hardware", lambda name: found)
    monkeypatch.setattr("omni.hardware.load_hardware", lambda name: found)
    assert "warning: a GPU is missing\n" in omni("run", "text.yaml", "--prompt", "x").err
    assert "warning: a GPU is missing\n" in omni("plan", "text.yaml").out
    assert json.loads(omni("plan", "text.yaml", "--json").out)["warnings"][0] == "a GPU is missing"


def test_no_path_is_kept_that_was_not_typed(omni: Omni, tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save("photo.png")
    omni("run", "edit.yaml", "--input", "image=photo.png", "--prompt", "x", "-o", "a.png")
    data = Path("a.png").read_bytes()
    assert b"photo.png" in data
    assert str(tmp_path).encode() not in data
    assert str(Path.home()).encode() not in data


def test_media_inputs_are_remembered_as_files(omni: Omni) -> None:
    for number, name in enumerate(("one.png", "two.png", "three.png")):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(name)
    inputs = ["--input", "image=one.png", "--input", "extra=two.png", "--input", "extra=three.png"]
    omni("run", "edit.yaml", *inputs, "--input", 'facts={"a": 1}', "-o", "a.png")
    recipe = read_recipe("a.png")
    assert {name: [file.path for file in files] for name, files in recipe.files.items()} == {
        "image": ["one.png"],
        "extra": ["two.png", "three.png"],
    }
    assert recipe.inputs == {"facts": {"a": 1}}
    omni("run", "a.png", "--trust", "-o", "b.png")
    assert same("a.png", "b.png")
    Image.new("RGB", (3, 3), (9, 9, 9)).save("one.png")
    ran = omni("run", "a.png", "--trust", "-o", "c.png")
    assert ran.code == 2
    assert "one.png is not the file that the picture was made from" in ran.err
    assert omni("run", "a.png", "--trust", "-o", "c.png", "--input", "image=two.png").code == 0
    assert not same("a.png", "c.png")


# Events -----------------------------------------------------------------------------------------------------------


def test_events_are_lines_of_json(omni: Omni) -> None:
    ran = omni("run", "pair.yaml", "--prompt", "x", "--seed", 3, "--n", 2, "--events", "-o", "a.png")
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["type"] for event in events[:2]] == ["LoadProgress", "LoadProgress"]
    requests = {event["request_id"]: [] for event in events if "request_id" in event}
    for event in events[2:]:
        requests[event["request_id"]].append(event)
    assert len(requests) == 2
    for number, lines in enumerate(requests.values(), start=1):
        types = [line["type"] for line in lines]
        assert types[0] == "Queued"
        assert types[-2:] == ["Done", "Written"]
        assert {"StageStarted", "StageProgress", "StageText", "StageFinished", "HopFinished"} < set(types)
        assert lines[-2]["outputs"] == {"image": [{"kind": "image", "width": 4, "height": 2, "mode": "RGB"}]}
        assert (lines[-1]["seed"], lines[-1]["files"]) == (2 + number, [f"a-{number}.png"])


def test_a_failure_is_an_event_too(omni: Omni) -> None:
    ran = omni("run", "failing.yaml", "--prompt", "bad", "--events", "-q")
    last = json.loads(ran.out.splitlines()[-1])
    assert ran.code == 1
    assert (last["type"], last["error"]["stage"]) == ("Failed", "draw")


# Interrupts -------------------------------------------------------------------------------------------------------


def read_until(process: subprocess.Popen[str], kind: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["type"] == kind:
            return
    raise AssertionError(f"no {kind}: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_in_order(start_omni: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    with start_omni("run", "held.yaml", "--prompt", "x", "--events", "-q", "--runner", "inline") as process:
        read_until(process, "StageStarted")
        process.send_signal(number)
        _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert err.splitlines() == ["stopping; press Ctrl-C again to quit at once", "interrupted"]


def test_a_second_interrupt_quits_at_once(start_omni: Callable[..., subprocess.Popen[str]]) -> None:
    options = ["--set", "stages.say.deaf=true", "--runner", "inline"]
    with start_omni("run", "held.yaml", "--prompt", "x", "--events", "-q", *options) as process:
        read_until(process, "StageStarted")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("stopping")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_stop_that_hangs_is_cut_short(start_omni: Callable[..., subprocess.Popen[str]]) -> None:
    options = ["--set", "stages.say.deaf=true", "--runner", "inline"]
    before = "import omni.cli.interrupt\nomni.cli.interrupt.STOP_SECONDS = 0.2"
    with start_omni("run", "held.yaml", "--prompt", "x", "--events", "-q", *options, before=before) as process:
        read_until(process, "StageStarted")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130


def test_signals_are_given_back(omni: Omni) -> None:
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    assert omni("run", "text.yaml", "--prompt", "x").code == 0
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before
