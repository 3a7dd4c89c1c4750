"""The hardware inventory: what this machine has, presets of machines one may rent, and inventory files.

An inventory file:

    name: studio
    nodes:
      - {name: big, cpus: 64, memory: 512GiB, gpus: {type: h100, count: 4}}
      - {name: small, cpus: 16, memory: 64GiB, gpus: {type: my-gpu, count: 1, memory: 48GiB}}

How fast weights move may be said too, per second: `h2d: 25GB` of a GPU, `disk: 6GB` and `page_cache: 20GB` of a node.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from omni.errors import GraphError, Mistake, UsageError
from omni.graph import nearest
from omni.memory import Links
from omni.sizes import GIB, parse_bytes

NVIDIA_SMI_SECONDS = 10.0
MIB = 1024**2
DEVICE_ORDER = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER under which CUDA's numbers of GPUs are those of nvidia-smi; CUDA's own puts the fastest first."""
NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose."""


PCIE5, PCIE4, PCIE3 = 55e9, 25e9, 12e9
"""Bytes a second from pinned host memory through 16 lanes: measured on an H200 (PCIe 5.0), its half and its quarter."""
PAGE_CACHE, PAGE_CACHE_OF_A_CORE = 43e9, 4e9
"""Bytes a second out of the page cache, measured: at most with 16 threads on an H200's host, and with one thread."""
DISK = 2e9
"""Bytes a second from the disk of that host, measured."""


class Gpu(msgspec.Struct, frozen=True):
    """One kind of GPU: `memory_bytes` of device memory each."""

    name: str
    memory_bytes: int
    """0 when unknown: then it is given to one stage, whole."""
    h2d_bytes_per_second: float = PCIE4
    """From pinned host memory to this GPU."""


class Node(msgspec.Struct, frozen=True):
    """One host of a cluster (a node, in Ray's words)."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    disk_bytes_per_second: float = DISK
    page_cache_bytes_per_second: float = 0.0
    """0: as many cores as it has can give."""

    def links(self, gpu_id: int | None = None) -> Links:
        """How fast weights move here; to that GPU, or into memory for None."""
        return Links(
            h2d_bytes_per_second=self.gpus[gpu_id].h2d_bytes_per_second if gpu_id is not None else PCIE4,
            page_cache_bytes_per_second=self.page_cache_bytes_per_second
            or min(PAGE_CACHE, PAGE_CACHE_OF_A_CORE * max(1.0, self.cpus)),
            disk_bytes_per_second=self.disk_bytes_per_second,
        )


class Hardware(msgspec.Struct, frozen=True):
    """What there is to run on. The first node is the driver's."""

    name: str
    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()
    """What the user should know about how it was found."""


class Machine(msgspec.Struct, frozen=True):
    """A GPU type, and the host that usually comes with each GPU."""

    memory_mib: int
    """What nvidia-smi reports."""
    cpus: int
    host_gib: int
    h2d_bytes_per_second: float = PCIE5


GPU_TYPES = {
    "b200": Machine(183359, 28, 256),
    "h200": Machine(143771, 24, 256),
    "h100": Machine(81559, 24, 256),
    "a100": Machine(81920, 16, 128, PCIE4),
    "l40s": Machine(46068, 16, 96, PCIE4),
    "l4": Machine(23034, 12, 48, PCIE4),
    "a10g": Machine(23028, 8, 32, PCIE4),
    "t4": Machine(15360, 8, 30, PCIE3),
    "5090": Machine(32607, 16, 64),
    "4090": Machine(24564, 16, 64, PCIE4),
    "3090": Machine(24576, 16, 64, PCIE4),
}
"""Presets are these names with a count: `h100x8`, and `h100x8x2` for two nodes; `cpu16` has no GPU."""
CPU_GIB_PER_CORE = 4


class _GpuEntry(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    count: Annotated[int, Meta(ge=1, le=64)] = 1
    memory: str | int | None = None
    h2d: str | int | None = None


class _NodeEntry(msgspec.Struct, forbid_unknown_fields=True):
    cpus: Annotated[float, Meta(gt=0)]
    memory: str | int
    name: str = ""
    gpus: _GpuEntry | None = None
    count: Annotated[int, Meta(ge=1, le=10_000)] = 1
    disk: str | int | None = None
    page_cache: str | int | None = None


def load_hardware(text: str | None = None) -> Hardware:
    """A preset by name, an inventory file by path, or this machine for None. Raises UsageError or GraphError."""
    if text is None:
        return detect()
    if text.endswith((".yaml", ".yml")) or os.path.isfile(text):
        return read_inventory(Path(text))
    return preset(text)


def preset(text: str) -> Hardware:
    """`h200x8`: one node with 8 GPUs; `h200x8x2`: two of these; `cpu16`: one node of 16 cores without a GPU."""
    match = re.fullmatch(r"cpu(?P<cpus>[1-9]\d{0,3})(x(?P<nodes>[1-9]\d{0,3}))?", text)
    if match:
        cpus = int(match["cpus"])
        return _hardware(text, int(match["nodes"] or 1), cpus, cpus * CPU_GIB_PER_CORE * GIB, ())
    match = re.fullmatch(r"(?P<type>\w+?)x(?P<count>[1-9]\d?)(x(?P<nodes>[1-9]\d{0,3}))?", text)
    if match and match["type"] in GPU_TYPES:
        machine, count = GPU_TYPES[match["type"]], int(match["count"])
        gpus = (Gpu(match["type"], machine.memory_mib * MIB, machine.h2d_bytes_per_second),) * count
        return _hardware(text, int(match["nodes"] or 1), machine.cpus * count, machine.host_gib * count * GIB, gpus)
    suggestion = nearest(text.split("x")[0], GPU_TYPES)
    raise UsageError(
        f"hardware '{text}': no such preset and no such file{suggestion} Presets are a GPU type and a count (h200x8, "
        f"or h200x8x2 for two nodes) or a number of cores (cpu16); the GPU types are {', '.join(GPU_TYPES)}. "
        "Describe other machines in an inventory file (see docs/planner.md)"
    )


def _hardware(name: str, num_nodes: int, cpus: int, memory_bytes: int, gpus: tuple[Gpu, ...]) -> Hardware:
    nodes = tuple(Node(f"node{index}", float(cpus), memory_bytes, gpus) for index in range(num_nodes))
    return Hardware(name, nodes)


# Inventory files ------------------------------------------------------------------------------------------------


def read_inventory(file: Path) -> Hardware:
    """Read an inventory file; every fault names file, line and column. Raises GraphError or UsageError."""
    import yaml

    try:
        text = file.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not a text file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise GraphError((Mistake("", f"not YAML: {error.problem}", str(file), *place),)) from error
    data = yaml.safe_load(text)
    reader = _Inventory(file, root)
    return reader.read(data)


class _Inventory:
    def __init__(self, file: Path, root: Any) -> None:
        self.file = file
        self.root = root
        self.mistakes: list[Mistake] = []

    def read(self, data: object) -> Hardware:
        if not isinstance(data, dict):
            self.fault((), "an inventory is a mapping with `nodes` (and `name`)")
        else:
            for key in data:
                if key not in ("name", "nodes"):
                    self.fault((key,), f"unknown key, allowed are name, nodes{nearest(str(key), ('name', 'nodes'))}")
            if not isinstance(data.get("nodes"), list) or not data["nodes"]:
                self.fault(("nodes",) if "nodes" in data else (), "`nodes` must be a list of at least one node")
        nodes: list[Node] = []
        if not self.mistakes:
            assert isinstance(data, dict)
            for index, entry in enumerate(data["nodes"]):
                nodes += self.nodes(index, entry)
            names = [node.name for node in nodes]
            for name in sorted({name for name in names if names.count(name) > 1}):
                self.fault(("nodes",), f"two nodes are called '{name}'")
        if self.mistakes:
            raise GraphError(tuple(self.mistakes))
        return Hardware(str(data.get("name") or self.file.stem) if isinstance(data, dict) else "", tuple(nodes))

    def nodes(self, index: int, entry: object) -> list[Node]:
        path = ("nodes", index)
        num_faults = len(self.mistakes)
        self.check_keys(path, entry, _NodeEntry)
        if isinstance(entry, dict) and "gpus" in entry:
            self.check_keys((*path, "gpus"), entry["gpus"], _GpuEntry)
        if len(self.mistakes) > num_faults:
            return []
        try:
            parsed = msgspec.convert(entry, _NodeEntry)
        except msgspec.ValidationError as error:
            message, _, inner = str(error).partition(" - at `$")
            keys = tuple(key for key in inner.rstrip("`").split(".") if key)
            self.fault((*path, *keys), message)
            return []
        memory_bytes = self.size((*path, "memory"), parsed.memory)
        gpus = self.gpus((*path, "gpus"), parsed.gpus) if parsed.gpus else ()
        name = parsed.name or f"node{index}"
        names = [name] if parsed.count == 1 else [f"{name}-{number}" for number in range(parsed.count)]
        disk = self.rate((*path, "disk"), parsed.disk, DISK)
        page_cache = self.rate((*path, "page_cache"), parsed.page_cache, 0.0)
        return [Node(name, parsed.cpus, memory_bytes, gpus, disk, page_cache) for name in names]

    def gpus(self, path: tuple[str | int, ...], entry: _GpuEntry) -> tuple[Gpu, ...]:
        known = GPU_TYPES.get(entry.type)
        if entry.memory is not None:
            memory_bytes = self.size((*path, "memory"), entry.memory)
        elif known:
            memory_bytes = known.memory_mib * MIB
        else:
            hint = nearest(entry.type, GPU_TYPES)
            self.fault((*path, "type"), f"unknown GPU type '{entry.type}'{hint or ''}; for another type give `memory`")
            return ()
        h2d = self.rate((*path, "h2d"), entry.h2d, known.h2d_bytes_per_second if known else PCIE4)
        return (Gpu(entry.type, memory_bytes, h2d),) * entry.count

    def size(self, path: tuple[str | int, ...], text: str | int) -> int:
        try:
            return parse_bytes(text)
        except UsageError as error:
            self.fault(path, str(error))
            return 0

    def rate(self, path: tuple[str | int, ...], text: str | int | None, default: float) -> float:
        """Bytes a second, or `default` where the file says nothing."""
        if text is None:
            return default
        found = self.size(path, text)
        if not found and not self.mistakes:
            self.fault(path, f"{text!r}: bytes a second, such as 25GB, must be more than nothing")
        return float(found)

    def check_keys(self, path: tuple[str | int, ...], entry: object, kind: type[msgspec.Struct]) -> None:
        allowed = kind.__struct_fields__
        if not isinstance(entry, dict):
            self.fault(path, f"must be a mapping of {', '.join(allowed)}")
            return
        for key in entry:
            if key not in allowed:
                text = f"unknown key, allowed are {', '.join(allowed)}{nearest(str(key), allowed)}"
                self.fault((*path, key), text)

    def fault(self, path: tuple[str | int, ...], message: str) -> None:
        mark = _find_mark(self.root, path)
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
        self.mistakes.append(Mistake(dotted, message, str(self.file), *place))


def _find_mark(node: Any, path: Sequence[str | int]) -> Any:
    """Where the key or item of `path` starts; where its nearest parent does, when it is not there."""
    mark = node.start_mark if node is not None else None
    for key in path:
        children = node.value if node is not None else None
        node = None
        if isinstance(children, list) and isinstance(key, int) and key < len(children):
            node = children[key]
            mark = node.start_mark
        elif isinstance(children, list):
            for pair in children:
                if isinstance(pair, tuple) and pair[0].value == str(key):
                    mark, node = pair[0].start_mark, pair[1]
        if node is None:
            break
    return mark


# This machine, and Ray's ----------------------------------------------------------------------------------------


def detect() -> Hardware:
    """What this process may use here: cores and memory within its control group, and NVIDIA GPUs.

    GPUs are numbered as nvidia-smi does; CUDA_DEVICE_ORDER is set so that CUDA does the same, where it is not set yet.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", DEVICE_ORDER)
    gpus, notes = _list_gpus()
    return Hardware("this machine", (Node("local", count_cpus(), count_memory_bytes(), gpus),), notes)


def from_ray_nodes(nodes: Sequence[Mapping[str, Any]], name: str = "ray cluster") -> Hardware:
    """Hardware from the answer of `ray.nodes()`: the nodes that are alive, the head first.

    Ray knows the type of a GPU but not its memory, which is looked up here; that of an unknown type is 0, unknown.
    """
    found = []
    for entry in nodes:
        if not entry.get("Alive"):
            continue
        resources = entry.get("Resources", {})
        prefix = "accelerator_type:"
        label = next((key.removeprefix(prefix) for key in resources if key.startswith(prefix)), "gpu")
        gpu = Gpu(label, _memory_of_type(label), _h2d_of_type(label))
        host = str(entry.get("NodeName") or entry.get("NodeManagerAddress") or entry.get("NodeID"))
        node = Node(host, float(resources.get("CPU", 0)), int(resources.get("memory", 0)))
        node = msgspec.structs.replace(node, gpus=(gpu,) * int(resources.get("GPU", 0)))
        is_head = "node:__internal_head__" in resources
        found.append((not is_head, str(entry.get("NodeID", "")), node))
    return Hardware(name, tuple(node for _, _, node in sorted(found, key=lambda item: item[:2])))


def _memory_of_type(label: str) -> int:
    for word in _words(label):  # Ray's "A100-40G"
        if match := re.fullmatch(r"(\d+)gb?", word):
            return int(match[1]) * GIB
    return next((GPU_TYPES[word].memory_mib * MIB for word in _words(label) if word in GPU_TYPES), 0)


def _h2d_of_type(label: str) -> float:
    return next((GPU_TYPES[word].h2d_bytes_per_second for word in _words(label) if word in GPU_TYPES), PCIE4)


def _words(label: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", label.lower())


def count_cpus() -> float:
    """Cores that this process may use: its affinity, or its control group's quota when that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _read_words("/sys/fs/cgroup/cpu.max")  # version 2: "max 100000" or "150000 100000"
    if len(quota) != 2:
        quota = _read_words("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") + _read_words("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def count_memory_bytes() -> int:
    """Memory of this machine, or of the control group when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = _read_words("/sys/fs/cgroup/memory.max") or _read_words("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min(total, int(limits[0])) if limits and limits[0].isdigit() else total


def _read_words(file: str) -> list[str]:
    try:
        return Path(file).read_text().split()
    except OSError:  # no such control group
        return []


def _list_gpus() -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that nvidia-smi lists, as far as CUDA_VISIBLE_DEVICES shows them, and notes. None without a driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return (), ()
    return _parse_smi(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES")) if done.returncode == 0 else ((), ())


def _parse_smi(text: str, visible: str | None) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    gpus: list[Gpu] = []
    for wanted in [row[0] for row in rows] if visible is None else visible.split(","):
        key = wanted.strip()
        row = next((row for row in rows if row[0] == key or (key.startswith("GPU-") and row[1].startswith(key))), None)
        if row is None:  # CUDA sees none from the first one on that is not there
            if key in NO_DEVICES:
                break
            note = f"CUDA_VISIBLE_DEVICES names {key!r}, which nvidia-smi does not list as a GPU; it and all after it"
            return tuple(gpus), (f"{note} are left out of the plan (parts of a GPU, MIG-..., are not supported)",)
        memory_bytes = int(row[3]) * MIB if row[3].isdigit() else 0  # "[N/A]" where it is the host's memory
        gpus.append(Gpu(row[2], memory_bytes, _h2d_of_type(row[2])))
    return tuple(gpus), ()
