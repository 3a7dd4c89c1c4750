"""A plan as plain data, for machines: `omni plan --json` and the server print it."""

from __future__ import annotations

from typing import Any

import msgspec

from omni.hardware import Hardware
from omni.memory import MemoryPlan
from omni.plan import Plan


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for machines; docs/planner.md lists the keys."""
    return {
        "graph": plan.graph.spec.name,
        "runner": plan.runner,
        "reason": plan.reason,
        "hardware": _hardware_document(plan.hardware),
        "processes": [
            {
                "name": process.name,
                "kind": process.kind,
                "stages": list(process.stages),
                "node": process.node,
                "cpus": process.cpus,
                "gpus": process.gpus,
                "gpu_ids": list(process.gpu_ids),
                "num_threads": process.num_threads,
                "reason": process.reason,
            }
            for process in plan.processes
        ],
        "stages": [
            {
                "name": stage.stage,
                "kind": str(plan.graph.spec.stages[stage.stage].__struct_config__.tag),
                "process": stage.process,
                "device": stage.device,
                "weight_bytes": stage.weight_bytes,
                "memory": _memory_document(stage.memory),
                "reason": stage.reason,
            }
            for stage in plan.stages
        ],
        "edges": [
            {
                "source": planned.edge.source.stage,
                "source_port": planned.edge.source.port,
                "target": planned.edge.target_stage,
                "target_port": planned.edge.target_port,
                "transport": planned.transport,
                "reason": planned.reason,
            }
            for planned in plan.edges
        ],
        "warnings": [*plan.hardware.notes, *plan.warnings],
    }


def _hardware_document(hardware: Hardware) -> dict[str, Any]:
    return {
        "name": hardware.name,
        "nodes": [
            {
                "name": node.name,
                "cpus": node.cpus,
                "memory_bytes": node.memory_bytes,
                "disk_bytes_per_second": node.disk_bytes_per_second,
                "page_cache_bytes_per_second": node.links().page_cache_bytes_per_second,
                "gpus": [
                    {
                        "name": gpu.name,
                        "memory_bytes": gpu.memory_bytes,
                        "h2d_bytes_per_second": gpu.h2d_bytes_per_second,
                    }
                    for gpu in node.gpus
                ],
            }
            for node in hardware.nodes
        ],
    }


def _memory_document(memory: MemoryPlan | None) -> dict[str, Any] | None:
    return None if memory is None else dict(msgspec.to_builtins(memory))
