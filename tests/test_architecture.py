"""Which module may import which: layers, cycles, and where the heavy libraries must not be.

Each check takes sources (module name -> text) and gives its faults as lines, so that the last tests can plant faults.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest

LAYERS = (
    ("omni.cli",),
    ("omni.bench",),
    ("omni.models",),
    ("omni.server",),
    ("omni", "omni.api", "omni.inputs", "omni.files", "omni.decode", "omni.recipe", "omni.load_flags", "omni.loops"),
    ("omni.runner",),
    ("stages", "stages.diffusion", "stages.llm", "stages.function", "omni.testing"),
    ("stages.policies", "stages.policies.load", "stages.device"),
    ("stages.memory",),
    ("omni.transport",),
    (
        "omni.draw",
        "omni.draw_svg",
        "omni.plan",
        "omni.plan_document",
        "omni.placement",
        "omni.processes",
        "omni.budgets",
        "omni.checkpoint",
        "omni.component_facts",
        "omni.hardware",
        "omni.memory_layouts",
        "omni.memory_planner",
        "omni.memory_reasons",
        "omni.safetensors_headers",
        "omni.flow",
        "omni.stage",
    ),
    (
        "omni.load",
        "omni.schema",
        "omni.document",
        "omni.tree",
        "omni.graph",
        "omni.model_paths",
        "omni.port_types",
        "omni.registry",
    ),
    ("omni.spec",),
    ("omni.messages", "omni.media", "omni.memory", "omni.sizes"),
    ("omni.errors", "omni.choices"),
)
"""Top to bottom: a module imports from its own layer and those below. A dotted name stands for its submodules too."""

HEAVY = ("torch", "ray", "fastapi", "diffusers", "transformers", "accelerate", "uvicorn")
LIGHT_FROM = "omni.plan"
"""This layer and all below never import HEAVY, not even inside a function."""
QUICK_TO_IMPORT = (
    "omni",
    "omni.api",
    "omni.cli",
    "omni.server.service",
    "stages.diffusion",
    "stages.llm",
    "stages.function",
)
"""Importing these must not pull HEAVY in; inside functions they may."""
WITHOUT_RAY = ("omni.runner.inline",)
"""Neither these nor anything they reach, lazily or not, imports Ray."""


# Reading imports ---------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported module; `lazy` inside a function, `typing` under TYPE_CHECKING."""

    target: str
    line: int
    lazy: bool
    typing: bool


def imports_of(text: str, known: dict[str, str]) -> list[Import]:
    """Every import of a module; `from omni import x` counts as omni.x where that is a module."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            targets = {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
            found.extend(Import(target, node.lineno, lazy, typing) for target in sorted(targets))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        only_typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, inside, only_typing)

    visit(ast.parse(text), lazy=False, typing=False)
    return found


# The checks ------------------------------------------------------------------------------------------------------


def group_of(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to."""
    entries = [entry for layer in LAYERS for entry in layer]
    fits = [e for e in entries if module == e or ("." in e and module.startswith(f"{e}."))]
    return max(fits, key=len, default=None)


def layer_of(group: str) -> int:
    """Number of the layer of a group, from the top."""
    return next(number for number, layer in enumerate(LAYERS) if group in layer)


def policy_of(module: str) -> str:
    """The policy that a module belongs to; empty for all others."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["stages", "policies"] and len(parts) > 2 else ""


def layer_faults(sources: dict[str, str]) -> list[str]:
    """Modules that LAYERS does not know, and imports that go up."""
    faults = []
    for module, text in sources.items():
        group = group_of(module)
        if group is None:
            faults.append(f"{module}: not in LAYERS")
            continue
        for item in imports_of(text, sources):
            if item.target.startswith("."):
                faults.append(f"{module}:{item.line}: relative import; write the whole name")
            target = group_of(item.target)
            if target is not None and layer_of(target) < layer_of(group):
                faults.append(f"{module}:{item.line}: imports {item.target}, which is in a layer above")
            if module.split(".")[0] == "omni" and item.target.split(".")[0] == "stages":
                faults.append(f"{module}:{item.line}: omni reaches stages through registry strings only")
            if policy_of(module) and policy_of(item.target) and policy_of(module) != policy_of(item.target):
                faults.append(f"{module}:{item.line}: a policy imports no other policy ({item.target})")
    return faults


def cycle_faults(sources: dict[str, str]) -> list[str]:
    """Cycles of imports: between modules at import time, between groups in any way."""
    between_modules: dict[str, set[str]] = {}
    between_groups: dict[str, set[str]] = {}
    for module, text in sources.items():
        for item in imports_of(text, sources):
            if item.target not in sources or item.target == module:
                continue
            if not item.lazy and not item.typing:
                between_modules.setdefault(module, set()).add(item.target)
            source, target = group_of(module), group_of(item.target)
            if source and target and source != target:
                between_groups.setdefault(source, set()).add(target)
    faults = []
    for graph in (between_modules, between_groups):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            faults.append("cycle: " + " imports ".join(reversed(error.args[1])))
    return faults


def reached(start: str, sources: dict[str, str], *, lazy: bool) -> dict[str, str]:
    """All that importing `start` imports -> the way there; with `lazy` also what its functions import."""
    ways = {start: start}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        targets = [
            i.target for i in imports_of(sources.get(module, ""), sources) if not i.typing and (lazy or not i.lazy)
        ]
        parents = [".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1)]
        for target in [*parents, *targets] if module in sources else []:
            if target not in ways:
                ways[target] = f"{ways[module]} > {target}"
                waiting.append(target)
    return ways


def heavy_faults(sources: dict[str, str]) -> list[str]:
    """Heavy libraries where they must not be."""
    faults = []
    for module, text in sources.items():
        group = group_of(module)
        if group and layer_of(group) >= layer_of(LIGHT_FROM):
            heavy = [item for item in imports_of(text, sources) if item.target.split(".")[0] in HEAVY]
            faults += [f"{module}:{item.line}: {item.target} is too heavy for this layer" for item in heavy]
        if module in QUICK_TO_IMPORT or module.startswith("omni.cli."):
            ways = reached(module, sources, lazy=False)
            faults += [f"import is slow: {way}" for target, way in ways.items() if target.split(".")[0] in HEAVY]
        if module in WITHOUT_RAY:
            ways = reached(module, sources, lazy=True)
            faults += [f"reaches Ray: {way}" for target, way in ways.items() if target.split(".")[0] == "ray"]
    return faults


# The project passes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules(project_texts: dict[str, str]) -> dict[str, str]:
    """Module name -> content, of the two packages."""
    return {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
        for path, text in project_texts.items()
        if path.startswith(("omni/", "stages/")) and path.endswith(".py")
    }


def test_imports_go_one_way(modules: dict[str, str]) -> None:
    faults = layer_faults(modules)
    assert not faults, "\n".join(faults)


def test_layers_name_what_exists(modules: dict[str, str]) -> None:
    gone = [entry for layer in LAYERS for entry in layer if entry not in modules]
    assert not gone, gone


def test_imports_have_no_cycles(modules: dict[str, str]) -> None:
    faults = cycle_faults(modules)
    assert not faults, "\n".join(faults)


def test_heavy_libraries_stay_where_they_are_used(modules: dict[str, str]) -> None:
    faults = heavy_faults(modules)
    assert not faults, "\n".join(faults)


# The checks fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"omni.news": ""}, "omni.news: not in LAYERS"),
        ({"omni.spec": "\nimport omni.plan"}, "omni.spec:2: imports omni.plan, which is in a layer above"),
        ({"omni.spec": "def f():\n  from omni import plan", "omni.plan": ""}, "omni.spec:2: imports omni.plan, which"),
        ({"omni.errors": "from omni import Omni"}, "omni.errors:1: imports omni, which is in a layer above"),
        ({"omni.cli.run": "from stages.llm import KIND"}, "omni.cli.run:1: omni reaches stages through registry"),
        ({"omni.runner.inline": "from . import base"}, "omni.runner.inline:1: relative import"),
        ({"stages.policies.a": "import stages.policies.b"}, "stages.policies.a:1: a policy imports no other policy"),
        (
            {"stages.policies.load": "import stages.policies.b.c", "stages.policies.b.c": ""},
            "stages.policies.load:1: a p",
        ),
        ({"stages.policies.a": "import stages.diffusion.b"}, "stages.policies.a:1: imports stages.diffusion.b, which"),
    ],
)
def test_layer_faults_are_found(sources: dict[str, str], fault: str) -> None:
    assert any(found.startswith(fault) for found in layer_faults(sources))


def test_cycles_between_modules_are_printed() -> None:
    sources = {
        "omni.graph": "import omni.registry",
        "omni.registry": "import omni.spec",
        "omni.spec": "import omni.graph",
    }
    assert "cycle: omni.graph imports omni.registry imports omni.spec imports omni.graph" in cycle_faults(sources)


def test_cycles_between_packages_count_lazy_imports() -> None:
    sources = {"stages.llm.a": "def f():\n  import stages.diffusion.b", "stages.diffusion.b": "import stages.llm.c"}
    assert cycle_faults({**sources, "stages.llm.c": ""}) == [
        "cycle: stages.llm imports stages.diffusion imports stages.llm"
    ]


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"omni.plan": "def f():\n  import torch.nn"}, "omni.plan:2: torch.nn is too heavy for this layer"),
        ({"omni.spec": "if TYPE_CHECKING:\n  import ray"}, "omni.spec:2: ray is too heavy for this layer"),
        (
            {"omni.cli.plan": "from omni import api", "omni.api": "import ray"},
            "import is slow: omni.cli.plan > omni.api > ray",
        ),
        ({"omni": "import torch", "omni.cli.plan": ""}, "import is slow: omni.cli.plan > omni > torch"),
        (
            {"omni.runner.inline": "def f():\n  import omni.runner.ray_runner", "omni.runner.ray_runner": "import ray"},
            "reaches Ray: omni.runner.inline > omni.runner.ray_runner > ray",
        ),
    ],
)
def test_heavy_imports_are_found(sources: dict[str, str], fault: str) -> None:
    assert fault in heavy_faults(sources)


def test_imports_inside_functions_may_be_heavy_above() -> None:
    sources = {"omni.cli.run": "def f():\n  import torch\nif TYPE_CHECKING:\n  import ray"}
    assert heavy_faults(sources) == []
