"""From the arguments of `omni run` to requests: everything a user can get wrong is found here, before models load."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from omni.api import AsyncOmni
from omni.cli.outputs import OutputPlan, plan_outputs
from omni.errors import GraphError, UsageError
from omni.files import SUFFIXES
from omni.inputs import MAX_SEED, is_media, parse_field
from omni.load_flags import with_load_flags
from omni.messages import LoadProgress, Request
from omni.recipe import (
    Recipe,
    SourceFile,
    changed_versions,
    check_files,
    digest_file,
    encode_recipe,
    installed_versions,
    needs_trust,
    read_recipe,
)

MAX_REQUESTS = 5_000
"""Of one run: all are made and run at once, and an actor has to have room for aborts beside them."""
FORGETFUL_SUFFIXES = {*SUFFIXES["image"], *SUFFIXES["video"]} - {".png"}
"""Pictures and clips that keep no recipe."""


class Job(msgspec.Struct, frozen=True):
    """The requests of one `omni run` and where their outputs go."""

    omni: AsyncOmni
    requests: tuple[Request, ...]
    outputs: OutputPlan
    metadata: tuple[str, ...]
    """For each request, what its pictures remember."""

    def labels(self) -> dict[str, str]:
        """Request id -> `2/4 ` when there are several requests."""
        total = len(self.requests)
        return {r.id: f"{number}/{total} " for number, r in enumerate(self.requests, start=1)} if total > 1 else {}


class _Given(msgspec.Struct, frozen=True):
    """The fields of a request, and the files that some of them were read from."""

    values: dict[str, Any]
    files: dict[str, list[SourceFile]]


def prepare(args: argparse.Namespace, report: Callable[[LoadProgress], None]) -> Job:
    """The checked job. Raises UsageError (GraphError, InputError, PlanError); no model has been touched then."""
    if args.n < 1:
        raise UsageError(f"--n {args.n}: must be at least 1")
    recipe = _read_recipe(args.graph, args.trust)
    omni = _load(args, recipe, report)
    for note in omni.planned.hardware.notes if omni.planned is not None else ():
        print(f"warning: {note}", file=sys.stderr)
    given = _read_fields(args, omni, recipe)
    seed = args.seed if args.seed is not None else recipe.seed if recipe else random.SystemRandom().randrange(MAX_SEED)
    prompts = [None] if args.prompts is None else _read_prompts(args.prompts)
    if args.n * len(prompts) > MAX_REQUESTS:
        raise UsageError(
            f"--n {args.n}: {args.n * len(prompts)} requests are too many; at most {MAX_REQUESTS} run at once"
        )
    requests = []
    for prompt in prompts:
        fields = given.values if prompt is None else {**given.values, "prompt": prompt}
        for number in range(args.n):
            turn = (seed + number) % (MAX_SEED + 1) if 0 <= seed <= MAX_SEED else seed
            requests.append(omni.request(seed=turn, **fields))
    outputs = plan_outputs(omni.graph, args.output, len(requests))
    graph_path = recipe.graph_path if recipe else args.graph
    metadata = tuple(_remember(omni, request, given, graph_path) for request in requests)
    return Job(omni, tuple(requests), outputs, metadata)


def _read_recipe(graph: str, trusted: bool) -> Recipe | None:
    suffix = Path(graph).suffix.lower()
    if suffix in FORGETFUL_SUFFIXES:
        raise UsageError(f"{graph}: no graph file, and only .png files remember the graph that they were made with")
    if suffix != ".png":
        return None
    recipe = read_recipe(graph)
    unsafe = needs_trust(recipe)
    if unsafe and not trusted:
        raise UsageError(
            f"{graph}: its graph can run code, or send prompts and keys elsewhere ({', '.join(unsafe)}); "
            "say --trust if you know where the picture comes from"
        )
    if changed := changed_versions(recipe):
        print(f"{graph}: made with {', '.join(changed)}; the pixels may differ", file=sys.stderr)
    return recipe


def _load(args: argparse.Namespace, recipe: Recipe | None, report: Callable[[LoadProgress], None]) -> AsyncOmni:
    graph, base_dir = (recipe.graph, os.path.dirname(recipe.graph_path)) if recipe else (args.graph, None)
    try:
        return AsyncOmni(
            graph,
            overrides=with_load_flags(args, graph, base_dir),
            base_dir=base_dir,
            runner=args.runner,
            address=args.address,
            hardware=args.hardware,
            report=report,
        )
    except GraphError as error:
        if recipe is None:
            raise
        place = f"was {recipe.graph_path}, from the current folder" if recipe.graph_path else "is in its metadata"
        raise UsageError(f"{args.graph}: its graph, which {place}, cannot be used:\n{error}") from error


def _read_fields(args: argparse.Namespace, omni: AsyncOmni, recipe: Recipe | None) -> _Given:
    """The inputs: those of the recipe, and on top those of the command line."""
    texts: dict[str, list[str]] = {}
    for pair in args.input:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--input {pair}: expected NAME=VALUE")
        texts.setdefault(name, []).append(text)
    prompts = [f"--{way}" for way in ("prompt", "prompts") if getattr(args, way) is not None]
    prompts += ["--input prompt"] if "prompt" in texts else []
    if len(prompts) > 1:
        raise UsageError(f"{' and '.join(prompts)} exclude each other")
    if args.prompt is not None:
        texts["prompt"] = [args.prompt]
    if recipe is not None:
        kept = {name: files for name, files in recipe.files.items() if name not in texts}
        check_files(kept)
        texts = {**{name: [file.path for file in files] for name, files in kept.items()}, **texts}
    graph = omni.graph
    values = {name: _one_or_list([parse_field(graph, name, text) for text in given]) for name, given in texts.items()}
    files = {
        name: [SourceFile(path, digest_file(path)) for path in paths]
        for name, paths in texts.items()
        if is_media(graph, name)
    }
    inherited = {name: value for name, value in recipe.inputs.items() if name not in texts} if recipe else {}
    return _Given({**inherited, **values}, files)


def _one_or_list(items: Sequence[Any]) -> Any:
    return items[0] if len(items) == 1 else list(items)


def _read_prompts(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompts {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {file}: is not UTF-8 text") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"--prompts {file}: holds no prompt; write one per line")
    return prompts


def _remember(omni: AsyncOmni, request: Request, given: _Given, graph_path: str) -> str:
    """The metadata of a request's pictures. Defaults are left to the graph, which is remembered too."""
    inputs: Mapping[str, Any] = {
        name: value for name, value in request.inputs.items() if name in {*given.values, "prompt"} - set(given.files)
    }
    return encode_recipe(
        Recipe(
            graph=omni.loaded.document,
            graph_path=graph_path,
            inputs=dict(inputs),
            files=given.files,
            seed=request.seed,
            versions=installed_versions(),
        )
    )
