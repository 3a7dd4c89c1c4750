"""A server in a process of its own, for tests that kill it: reads commands and prints what its clients see, as JSON.

Arguments: URL of the store, folder of files. Commands, one a line:
`submit PROMPT`, `follow JOB_ID AFTER`, `stop`. Lines: {"ready": SERVER}, {"job": ID, "prompt": ...}, {"event": ...}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec

from omni import AsyncOmni
from omni.server.files import FileStore
from omni.server.jobs import JobOrder
from omni.server.service import Service
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore

GRAPH = {"stages": {"work": {"kind": "function", "call": "tests.server.functions:pass_gate"}}}
SETTINGS = ServiceSettings(heartbeat_seconds=0.2, lease_seconds=2.0, poll_seconds=0.05)


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def follow(service: Service, job_id: str, after: int) -> None:
    async for event in service.events(job_id, after):
        tell(event=msgspec.to_builtins(event))


async def main(url: str, folder: str) -> None:
    service = Service({"work": AsyncOmni(GRAPH, runner="inline")}, JobStore(url), FileStore(folder), SETTINGS)
    await service.start()
    tell(ready=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    followers = set()
    while line := (await reader.readline()).decode():
        command, _, rest = line.strip().partition(" ")
        if command == "submit":
            job = await service.submit(JobOrder(graph="work", inputs={"prompt": rest}))
            tell(job=job.id, prompt=rest)
            followers.add(asyncio.create_task(follow(service, job.id, 0)))
        elif command == "follow":
            job_id, after = rest.split()
            followers.add(asyncio.create_task(follow(service, job_id, int(after))))
        else:
            break
    await service.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
