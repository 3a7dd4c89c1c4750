"""GPU and CPU arithmetic, without a graph: claims in, shares out."""

from __future__ import annotations

import pytest

from omni.errors import PlanError
from omni.placement import Claim, CpuClaim, Share, Slot, place_cpus, place_gpus
from omni.sizes import GIB


def claim(stage: str, gib: float | None, gpus: float | None = None, gpu_id: int | None = None) -> Claim:
    return Claim(stage, None if gib is None else int(gib * GIB), gpus, gpu_id)


def slots(*nodes: list[int]) -> list[Slot]:
    """GPUs of these GiB, one list per node."""
    return [Slot.of(node, gpu_id, size * GIB) for node, sizes in enumerate(nodes) for gpu_id, size in enumerate(sizes)]


def share(*gpu_ids: int, gpus: float = 1, node: int = 0) -> Share:
    return Share(node, gpu_ids, gpus)


A, B, C = claim("a", 10), claim("b", 50), claim("c", 20)

PLACED = [
    ("nothing", [], slots([80]), {}),
    ("whole while they suffice", [A, C], slots([80, 80]), {"c": share(0), "a": share(1)}),
    ("ties in the order given", [A, claim("z", 10)], slots([80, 80]), {"a": share(0), "z": share(1)}),
    ("smallest that fits", [A, B], slots([80, 24]), {"a": share(1), "b": share(0)}),
    ("shared by memory", [A, B], slots([80]), {"a": share(0, gpus=0.18), "b": share(0, gpus=0.78)}),
    (
        "the largest alone, the rest shared",
        [A, B, C],
        slots([80, 80]),
        {"a": share(1, gpus=0.18), "b": share(0), "c": share(1, gpus=0.33)},
    ),
    ("unknown size: whole", [A, claim("u", None), C], slots([80, 80]),
     {"u": share(0), "a": share(1, gpus=0.18), "c": share(1, gpus=0.33)}),
    ("two asked", [claim("a", 10, 2), B], slots([80, 80, 80]), {"a": share(0, 1, gpus=2), "b": share(2)}),
    ("two of one node", [claim("a", 10, 2)], slots([80], [80, 80]), {"a": share(0, 1, gpus=2, node=1)}),
    ("weights over two", [claim("a", 100, 2)], slots([80, 80]), {"a": share(0, 1, gpus=2)}),
    ("fractions asked", [claim("a", 10, 0.5), claim("b", 10, 0.25)], slots([80, 80]),
     {"a": share(0, gpus=0.5), "b": share(0, gpus=0.25)}),
    ("fraction of an unknown size", [claim("a", None, 0.5)], slots([80]), {"a": share(0, gpus=0.5)}),
    ("beside an asked fraction", [claim("a", 10, 0.5), C], slots([80]),
     {"a": share(0, gpus=0.5), "c": share(0, gpus=0.33)}),
    ("unknown memory", [A, B], slots([0, 0]), {"a": share(1), "b": share(0)}),
    ("pinned", [claim("a", 10, gpu_id=1), B], slots([80, 80]), {"a": share(1, gpus=0.18), "b": share(0)}),
]  # fmt: skip


@pytest.mark.parametrize(("claims", "gpus", "expected"), [row[1:] for row in PLACED], ids=[row[0] for row in PLACED])
def test_gpus(claims: list[Claim], gpus: list[Slot], expected: dict[str, Share]) -> None:
    assert place_gpus(claims, [Slot.of(slot.node, slot.gpu_id, slot.memory_bytes) for slot in gpus]) == expected


REFUSED = [
    ([claim("a", 54)], slots([24, 16]), "stage 'a': its weights take 54.0 GiB and the largest GPU has 24.0 GiB: use "
     "more or larger GPUs, a smaller model or dtype, or say device: cpu"),
    ([claim("a", 170, 2)], slots([80, 80]), "stage 'a': its weights take 170.0 GiB and 2 GPUs have 160.0 GiB"),
    ([A, B], slots([60]), "stage 'b': needs 62.0 GiB on a shared GPU, and the other stages leave at most 60.0 GiB"),
    ([A, claim("b", 20)], slots([24]), "stage 'b': needs 26.0 GiB on a shared GPU"),
    ([claim("u", None), claim("v", None)], slots([80]), "stages 'u', 'v': checkpoint not on this machine, so each "
     "needs a whole GPU, and 1 is free: download the checkpoint, set resources.gpus to a fraction, or use more GPUs"),
    ([claim("a", 1, 4)], slots([80, 80], [80]), "stage 'a': needs 4 GPUs, but one node has 2"),
    ([claim("a", 1)], slots(), "stage 'a': needs 1 GPU, but there is no GPU for it"),
    ([claim("a", 1, 1), claim("b", 1, 1)], slots([80]), "stage 'b': needs a whole GPU with 1.0 GiB for its weights, "
     "and the other stages leave none"),
    ([claim("a", 1, 1.5)], slots([80, 80]), "stage 'a': resources.gpus: 1.5 must be a whole number or below 1"),
    ([claim("a", 1, 0.6), claim("b", 1, 0.6)], slots([80]), "stage 'b': needs 0.6 of a GPU and 1.0 GiB on"),
    ([claim("a", 1, gpu_id=7)], slots([80, 80]), "stage 'a': device: cuda:7, but the GPUs there are 0, 1"),
    ([A, B], slots([0]), "stage 'a': needs 14.0 GiB on a shared GPU"),
]  # fmt: skip


@pytest.mark.parametrize(("claims", "gpus", "message"), REFUSED)
def test_gpus_refused(claims: list[Claim], gpus: list[Slot], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        place_gpus(claims, [Slot.of(slot.node, slot.gpu_id, slot.memory_bytes) for slot in gpus])
    assert message in str(caught.value)


def test_placing_takes_the_gpus_out() -> None:
    gpus = slots([80, 80])
    place_gpus([A], gpus)
    assert [slot.is_whole for slot in gpus] == [False, True]


def test_cpus_are_whole_while_they_suffice() -> None:
    shares = place_cpus([CpuClaim("driver", False, node=0), CpuClaim("a", True), CpuClaim("b", True, cpus=2)], [4.0])
    assert {name: (one.cpus, one.num_threads) for name, one in shares.items()} == {
        "driver": (0, 4),
        "a": (1, 4),
        "b": (2, 2),
    }


def test_cpus_are_fractions_when_there_are_few() -> None:
    shares = place_cpus([CpuClaim(name, True) for name in "abc"], [2.0])
    assert [one.cpus for one in shares.values()] == [0.66, 0.66, 0.66]


def test_rivals_split_the_cores_of_a_node_only() -> None:
    both = frozenset("ab")
    claims = [CpuClaim("a", True, node=0, rivals=both - {"a"}), CpuClaim("b", True, node=0, rivals=both - {"b"})]
    assert [one.num_threads for one in place_cpus(claims, [8.0]).values()] == [4, 4]
    claims[1] = CpuClaim("b", True, node=1, rivals=both - {"b"})
    assert [one.num_threads for one in place_cpus(claims, [8.0, 6.0]).values()] == [8, 6]


def test_zero_cores_asked_still_makes_a_bundle() -> None:
    assert place_cpus([CpuClaim("a", True, cpus=0)], [2.0])["a"].cpus == 0.01


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([CpuClaim("a", True, cpus=9)], "process 'a': reserves 9 cores, and a node has at most 8"),
        ([CpuClaim("a", True, cpus=9, node=1)], "process 'a': reserves 9 cores, and a node has 4"),
        (
            [CpuClaim("a", True, cpus=4, node=1), CpuClaim("b", True, node=1)],
            "process 'b': the other stages reserve 4 of 4 cores of its node and leave none: lower resources.cpus",
        ),
    ],
)
def test_cpus_refused(claims: list[CpuClaim], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        place_cpus(claims, [8.0, 4.0])
    assert message in str(caught.value)
