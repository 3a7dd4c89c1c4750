"""The project's habits as tests: short files, narrow excepts, plain text, docstrings, the README's file tree.

Each check takes files (path -> text) and gives its faults as lines, so that the last tests can plant faults.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LARGER: dict[str, int] = {}
"""`path` or `path:function` -> the lines it may have, with the reason in a comment."""

BROAD_EXCEPTS = {
    "omni/cli/main.py:main": "the CLI edge: any error becomes one line and an exit code",
    "omni/runner/actor.py:setup": "the actor's edge: its error is told to the driver",
    "omni/runner/actor.py:run": "the same edge for a run",
    "omni/runner/base.py:_run_stage": "the runner's edge: whatever goes wrong, the request gets its end",
    "omni/runner/base.py:_finish": "the same edge for reading the outputs",
    "omni/runner/process.py:_setup_one": "the edge to a stage's code: its error becomes a StageSetupError",
    "omni/runner/process.py:run": "the same edge for a run: its error becomes a StageError",
    "omni/runner/process.py:abort": "the same edge for an abort, so that the run is given up after its grace",
    "omni/runner/ray_environment.py:_serve": "hands whatever a call raised to its caller, who raises it again",
    "omni/server/streaming.py:_read": "hands whatever the source of events raised to the answer, which raises it again",
    "omni/server/run.py:_run_claimed": "a stored job's edge: whatever goes wrong, the job gets its end",
    "omni/server/worker.py:_repeat": "the edge of upkeep: the fault is logged, and the next round comes",
    "omni/server/writer.py:_commit": "a fault in a group of writes: each is tried again by itself",
    "omni/server/writer.py:_beat_if_due": "a heartbeat's fault is logged, and the next one comes: writes must go on",
    "omni/server/writer.py:_commit_one": "hands whatever a write raised to its caller, who raises it again",
    "stages/diffusion/batching/batch.py:_run": "a joined call failed: its members run one by one, each to its own end",
    "stages/diffusion/batching/batch.py:_run_alone": "hands whatever a call raised to its request, to raise it again",
    "stages/function/stage.py:_make_call": "hands whatever the function raised to the run, which raises it again",
    "stages/function/stage.py:_await_call": "the same for an async function",
    "stages/diffusion/preview.py:prepare": "a preview is never worth a failed request: one warning, and none come",
    "stages/diffusion/preview.py:_work": "the same for a preview that is made",
    "omni/stage.py:compute": "hands whatever a worker thread raised to the event loop, which raises it again",
}
"""`path:function` -> why it may catch everything. A handler that ends in a bare `raise` needs no entry."""

MARKS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(" + "|".join(("root", "home", "work", "farm", "Users")) + r")/\w")


# The checks ------------------------------------------------------------------------------------------------------


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, nested ones too."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def size_faults(files: dict[str, str]) -> list[str]:
    """Files and functions that are too long."""
    faults = []
    for path, text in files.items():
        sizes = [(path, len(text.splitlines()), MAX_FILE_LINES)]
        for function in functions_of(ast.parse(text)):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            sizes.append((f"{path}:{function.name}", lines, MAX_FUNCTION_LINES))
        faults += [f"{place}: {n} lines, at most {most}" for place, n, most in sizes if n > LARGER.get(place, most)]
    return faults


def broad_except_faults(files: dict[str, str]) -> list[str]:
    """Handlers that swallow everything, outside BROAD_EXCEPTS."""
    faults = []
    for path, text in files.items():
        for function in [ast.parse(text), *functions_of(ast.parse(text))]:
            place = f"{path}:{getattr(function, 'name', '')}"
            if place not in BROAD_EXCEPTS:
                faults += [
                    f"{place}: line {node.lineno} catches everything"
                    for node in _own_nodes(function)
                    if _is_broad(node)
                ]
    return faults


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own_nodes(node)


def _is_broad(node: ast.AST) -> bool:
    broad = ("Exception", "BaseException")
    if isinstance(node, ast.ExceptHandler):
        last = node.body[-1]
        if isinstance(last, ast.Raise) and last.exc is None:
            return False
        return node.type is None or any(getattr(n, "id", "") in broad for n in ast.walk(node.type))
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("contextlib.suppress", "suppress"):
        return any(getattr(argument, "id", "") in broad for argument in node.args)
    return False


def text_faults(files: dict[str, str]) -> list[str]:
    """Characters beyond ASCII, notes for later, and paths of somebody's machine."""
    rules = {"not ASCII": re.compile(r"[^\x00-\x7f]"), "left for later": MARKS, "path of a machine": MACHINE_PATHS}
    return [
        f"{path}:{number}: {fault}: {found.group()!r}"
        for path, text in files.items()
        for number, line in enumerate(text.splitlines(), start=1)
        for fault, pattern in rules.items()
        if (found := pattern.search(line))
    ]


def docstring_faults(files: dict[str, str]) -> list[str]:
    """Python files that do not open with their job; an empty __init__.py only marks a package."""
    return [
        f"{path}: no docstring"
        for path, text in files.items()
        if text.strip() and not ast.get_docstring(ast.parse(text))
    ]


def parse_tree(readme: str) -> dict[str, str]:
    """Path -> description, from the README's section 'Files'; folders end in a slash."""
    block = re.search(r"^## Files\n.*?^```text\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no section 'Files' with a text block"
    folders: list[str] = []
    listed: dict[str, str] = {}
    for line in block.group(1).splitlines():
        name, _, description = line.strip().partition(" ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        listed["".join([*folders, name])] = description.strip()
        folders.append(name)
    return listed


def tree_faults(readme: str, files: list[str]) -> list[str]:
    """What the README's file tree lacks, and what it has too much."""
    listed = parse_tree(readme)
    folders = {str(parent) + "/" for file in files for parent in Path(file).parents if str(parent) != "."}
    code = {path for path in {*files, *folders} if path.startswith(("omni/", "stages/"))}
    top = {path for path in {*files, *folders} if path.rstrip("/").count("/") == 0 and not path.startswith(".")}
    due = top | {path for path in code if path.endswith(("/", ".py")) and not path.endswith("__init__.py")}
    return [
        *(f"README.md, Files: lacks {path}" for path in sorted(due - set(listed))),
        *(f"README.md, Files: {path} does not exist" for path in sorted(set(listed) - {*files, *folders})),
        *(f"README.md, Files: {path} has no description" for path, text in listed.items() if not text),
    ]


# The project passes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python_texts(project_texts: dict[str, str]) -> dict[str, str]:
    """Path -> content of every Python file."""
    return {path: text for path, text in project_texts.items() if path.endswith(".py")}


@pytest.mark.parametrize(
    "check", [size_faults, broad_except_faults, docstring_faults], ids=lambda check: check.__name__
)
def test_python_files(check: Callable[[dict[str, str]], list[str]], python_texts: dict[str, str]) -> None:
    faults = check(python_texts)
    assert not faults, "\n".join(faults)


def test_text_is_plain(project_texts: dict[str, str]) -> None:
    faults = text_faults(project_texts)
    assert not faults, "\n".join(faults)


def test_readme_lists_every_file(project_texts: dict[str, str], project_files: list[str]) -> None:
    faults = tree_faults(project_texts["README.md"], project_files)
    assert not faults, "\n".join(faults)


def test_allow_lists_name_what_exists(python_texts: dict[str, str]) -> None:
    places = {
        f"{path}:{function.name}" for path, text in python_texts.items() for function in functions_of(ast.parse(text))
    }
    gone = {*BROAD_EXCEPTS, *LARGER} - places - set(python_texts)
    assert not gone, gone


# The checks fail -------------------------------------------------------------------------------------------------


def test_long_files_and_functions_are_found() -> None:
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    faults = size_faults(
        {"a.py": function, "b.py": "\n" * (MAX_FILE_LINES + 1), "c.py": function.replace("    pass\n", "", 1)}
    )
    assert faults == ["a.py:f: 61 lines, at most 60", "b.py: 401 lines, at most 400"]


@pytest.mark.parametrize(
    "body",
    [
        "try: g()\n  except Exception: pass",
        "try: g()\n  except (ValueError, BaseException) as e: print(e)",
        "try: g()\n  except: pass",
        "with contextlib.suppress(Exception): g()",
    ],
)
def test_broad_excepts_are_found(body: str) -> None:
    assert broad_except_faults({"a.py": f"class A:\n def f():\n  {body}\n"})


@pytest.mark.parametrize(
    "body", ["try: g()\n  except ValueError: pass", "try: g()\n  except BaseException:\n   tidy()\n   raise"]
)
def test_narrow_excepts_and_raising_again_are_fine(body: str) -> None:
    assert broad_except_faults({"a.py": f"class A:\n def f():\n  {body}\n"}) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("caf\u00e9", "not ASCII"),
        ("# TO" + "DO later", "left for later"),
        ("see /ro" + "ot/x", "path of a machine"),
    ],
)
def test_unplain_text_is_found(text: str, fault: str) -> None:
    assert text_faults({"a.py": "ok\n" + text})[0].startswith(f"a.py:2: {fault}")


def test_missing_docstrings_are_found() -> None:
    assert docstring_faults({"a.py": "x = 1", "b.py": '"""Does b."""', "c/__init__.py": ""}) == ["a.py: no docstring"]


def test_wrong_file_trees_are_found() -> None:
    readme = "## Files\n```text\nomni/   the package\n  plan.py   plans\n  gone.py   was here\nMakefile\n```\n"
    faults = tree_faults(readme, ["omni/__init__.py", "omni/plan.py", "omni/cli/run.py", "Makefile", ".gitignore"])
    assert [fault.removeprefix("README.md, Files: ") for fault in faults] == [
        "lacks omni/cli/",
        "lacks omni/cli/run.py",
        "omni/gone.py does not exist",
        "Makefile has no description",
    ]


def test_shipped_models_name_no_machine(root: Path, project_files: list[str]) -> None:
    """Libraries write into a model's files where they read its parts from."""
    written = [path for path in project_files if path.startswith("configs/") and path.endswith(".json")]
    assert written
    assert [path for path in written if MACHINE_PATHS.search((root / path).read_text())] == []
