"""The ways to carry a tensor from one process to another that `omni bench hop` compares, and plain copies beside them.

A hop lasts from the moment the producer has the tensor until the consumer holds it. Every carrier sends fresh random
numbers each time, and the consumer checks what it got against the producer's checksum.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from omni.errors import OmniError

if TYPE_CHECKING:
    import torch

    from omni.api import Omni

HOP_SECONDS = 120.0
"""A hop that takes longer has failed."""
GRAPH = {
    "name": "hop",
    "inputs": {"num_bytes": {"type": "json"}},
    "stages": {
        "produce": {
            "kind": "function",
            "call": "omni.bench.carriers:produce",
            "input_types": {"num_bytes": "json"},
            "outputs": {"tensor": "tensor", "checksum": "json"},
            "isolation": "actor",
        },
        "consume": {
            "kind": "function",
            "call": "omni.bench.carriers:consume",
            "inputs": {"tensor": "produce.tensor", "checksum": "produce.checksum"},
            "input_types": {"tensor": "tensor", "checksum": "json"},
            "outputs": {"correct": "json"},
            "isolation": "actor",
        },
    },
    "outputs": {"correct": "consume.correct"},
}
"""Two stages with a process each, as any graph may have them."""

_buffers: dict[int, torch.Tensor] = {}


def produce(num_bytes: Any) -> dict[str, Any]:
    """A tensor of random int64 in memory that has been used before, and its checksum."""
    import torch

    if num_bytes not in _buffers:
        _buffers.clear()
        _buffers[num_bytes] = torch.empty(num_bytes // 8, dtype=torch.int64)
    tensor = _buffers[num_bytes].random_()
    return {"tensor": tensor, "checksum": int(tensor.sum())}


def consume(tensor: Any, checksum: Any) -> bool:
    """Whether the tensor has this checksum; reads all of it."""
    return bool(int(tensor.sum()) == checksum)


class Carrier(ABC):
    """One way to carry; use as a context manager."""

    name: str

    @abstractmethod
    def hop(self, num_bytes: int) -> tuple[float, bool]:
        """Seconds of one hop, and whether the content was right."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class OmniCarrier(Carrier):
    """Two stages of a graph on two actors, as the Ray runner runs them; the hop is the one it reports itself."""

    name = "Omni"

    def __init__(self, omni: Omni) -> None:
        self._omni = omni

    def hop(self, num_bytes: int) -> tuple[float, bool]:
        result = self._omni.generate(num_bytes=num_bytes)
        hop = next(hop for hop in result.timings.hops if hop.source == "produce.tensor")
        return hop.seconds, result.outputs["correct"]


class RayCarrier(Carrier):
    """Two plain actors in the same cluster, with Ray's own serialisation of tensors."""

    name = "Ray's default"

    def __enter__(self) -> Self:
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=0)
        self._producer, self._consumer = actor(_RayProducer).remote(), actor(_RayConsumer).remote()
        return self

    def __exit__(self, *exc_info: object) -> None:
        import ray

        ray.kill(self._producer)
        ray.kill(self._consumer)

    def hop(self, num_bytes: int) -> tuple[float, bool]:
        import ray

        sent = self._producer.produce.remote(num_bytes)
        result: tuple[float, bool] = ray.get(self._consumer.consume.remote(sent), timeout=HOP_SECONDS)
        return result


class _RayProducer:
    def produce(self, num_bytes: int) -> tuple[float, dict[str, Any]]:
        product = produce(num_bytes)
        return time.time(), product


class _RayConsumer:
    def consume(self, sent: tuple[float, dict[str, Any]]) -> tuple[float, bool]:
        received_at = time.time()
        produced_at, product = sent
        return received_at - produced_at, consume(**product)


class QueueCarrier(Carrier):
    """Two spawned processes and a queue; `shared` hands tensors over in shared memory, else arrays are pickled."""

    def __init__(self, shared: bool) -> None:
        self.name = "torch.multiprocessing queue" if shared else "pickle through a queue"
        self._shared = shared

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._orders, self._carry, self._results = context.Queue(), context.Queue(), context.Queue()
        ways = (
            (_queue_producer, (self._orders, self._carry, self._shared)),
            (_queue_consumer, (self._carry, self._results)),
        )
        self._processes = [context.Process(target=target, args=args, daemon=True) for target, args in ways]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._orders.put(None)
        for process in self._processes:
            process.join(HOP_SECONDS)

    def hop(self, num_bytes: int) -> tuple[float, bool]:
        self._orders.put(num_bytes)
        try:
            result: tuple[float, bool] = self._results.get(timeout=HOP_SECONDS)
        except queue.Empty as error:
            raise OmniError(f"{self.name}: no answer within {HOP_SECONDS:g} s") from error
        return result


def _queue_producer(orders: Any, carry: Any, shared: bool) -> None:
    while (num_bytes := orders.get()) is not None:
        product = produce(num_bytes)
        tensor: torch.Tensor = product["tensor"]
        # Sending a tensor moves it into shared memory for good, and a second hop would cost nothing.
        content = tensor.clone() if shared else tensor.numpy()
        carry.put((time.time(), content, product["checksum"]))
    carry.put(None)


def _queue_consumer(carry: Any, results: Any) -> None:
    import torch

    while (sent := carry.get()) is not None:
        received_at = time.time()
        produced_at, content, checksum = sent
        results.put((received_at - produced_at, consume(torch.as_tensor(content), checksum)))
        del sent, content


class MemcpyCarrier(Carrier):
    """One copy inside this process into memory that has been used before: the yardstick, not a hop."""

    def __init__(self, num_threads: int) -> None:
        self.name = f"memcpy, {num_threads} thread{'s' if num_threads > 1 else ''}"
        self._num_threads = num_threads
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hop(self, num_bytes: int) -> tuple[float, bool]:
        import numpy as np
        import torch

        if num_bytes not in self._buffers:
            source = produce(num_bytes)["tensor"]
            self._buffers = {num_bytes: (source, torch.empty_like(source).zero_())}
        source, target = self._buffers[num_bytes]
        begin = time.perf_counter()
        if self._num_threads == 1:
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source)
        return time.perf_counter() - begin, torch.equal(source, target)
