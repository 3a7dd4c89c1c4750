"""Serve graphs over HTTP: OpenAI's routes, jobs that survive restarts, and a page to try them.

Each GRAPH is a YAML file; its name is the `model` of requests. Ctrl-C and SIGTERM let running requests end, within
--drain-seconds; a second one stops at once. docs/serving.md has the routes, with examples.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, get_args

from omni.choices import RunnerChoice
from omni.load_flags import add_load_flags

if TYPE_CHECKING:
    from omni.api import AsyncOmni
    from omni.cli.interrupt import Interrupts
    from omni.cli.progress import View
    from omni.server.service import Service
    from omni.server.settings import ServerSettings

STATE_DIR = "omni-state"
STOP_SECONDS = 40.0
"""What a stop may take on top of --drain-seconds: more than its parts together, which have deadlines of their own."""
NAME_CHARACTERS = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni serve`."""
    parser.add_argument("graph", metavar="GRAPH", nargs="+", help="graph files")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    where.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    where.add_argument("--public-url", metavar="URL", default="", help="how clients reach it, for links in answers")
    where.add_argument(
        "--state-dir", metavar="DIR", default=STATE_DIR, help=f"where jobs and files are kept (default: {STATE_DIR})"
    )
    where.add_argument(
        "--store", metavar="URL", help="database of the jobs: postgresql+psycopg://...; servers may share it"
    )
    where.add_argument("--files", metavar="URL", help="where inputs and outputs go: s3://bucket/folder and others")
    who = parser.add_argument_group("who may use it")
    who.add_argument(
        "--api-key",
        metavar="NAME=SECRET",
        action="append",
        default=[],
        help="a key that requests must carry; @FILE has one a line; also in OMNI_API_KEYS; may be repeated",
    )
    who.add_argument(
        "--cors-origin", metavar="ORIGIN", action="append", default=[], help="web pages that may call it; repeatable"
    )
    who.add_argument(
        "--trusted-host", metavar="NAME", action="append", default=[], help="names that it goes by; repeatable"
    )
    who.add_argument(
        "--allow-host", metavar="HOST", action="append", default=[], help="where media may be fetched; repeatable"
    )
    who.add_argument(
        "--webhook-host", metavar="HOST", action="append", default=[], help="where webhooks may go; repeatable"
    )
    much = parser.add_argument_group("how much")
    much.add_argument("--max-running", metavar="N", type=int, default=4, help="of a graph at once (default: 4)")
    much.add_argument("--max-queued", metavar="N", type=int, default=256, help="requests that wait (default: 256)")
    much.add_argument("--max-running-per-key", metavar="N", type=int, help="requests of one API key at once")
    much.add_argument(
        "--keep-days", metavar="N", type=float, default=7.0, help="how long finished jobs are kept (default: 7)"
    )
    much.add_argument(
        "--drain-seconds", metavar="N", type=float, default=30.0, help="how long a stop waits (default: 30)"
    )
    much.add_argument("--allow-unknown-fields", action="store_true", help="ignore unknown fields of requests")
    much.add_argument("--quiet", "-q", action="store_true", help="no progress")
    how = parser.add_argument_group("how to run")
    how.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change every graph")
    how.add_argument("--runner", choices=get_args(RunnerChoice), default="auto", help="override the planner's choice")
    how.add_argument("--hardware", metavar="NAME", help="plan for a preset or inventory file instead of this machine")
    how.add_argument("--address", metavar="ADDRESS", help="an existing Ray cluster (or set RAY_ADDRESS)")
    add_load_flags(how)


def command(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit code is 0 after an orderly stop."""
    import asyncio

    from omni.cli.interrupt import Interrupts
    from omni.cli.progress import open_view
    from omni.loops import new_loop

    _set_up_logs(args.verbose)
    with Interrupts() as interrupts:
        view = open_view(args.quiet, sys.stderr)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            try:
                runner.run(interrupts.guard(_serve(args, view, interrupts)))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
    return 0


async def _serve(args: argparse.Namespace, view: View, interrupts: Interrupts) -> None:
    import contextlib

    from omni.server.app import build_app
    from omni.server.hosting import Hosting, address_of, bind
    from omni.server.metrics import Metrics, MetricsObserver
    from omni.server.tracing import build_tracing

    graphs, settings, metrics = build_graphs(args, view), build_settings(args), Metrics()
    tracing = build_tracing()
    with bind(args.host, args.port) as bound:
        service = build_service(args, graphs, settings)
        app = build_app(service, settings, metrics=metrics, tracing=tracing)
        hosting = Hosting(service, app, settings, bound, drain_seconds=args.drain_seconds, access_log=args.verbose)
        warn(args, settings)
        with contextlib.ExitStack() as loading:

            def ready() -> None:
                loading.close()
                interrupts.stop_with(hosting.stop, args.drain_seconds + STOP_SECONDS)
                for name, omni in graphs.items():
                    for progress in omni.loads.values():
                        MetricsObserver(metrics, graphs).loaded(name, progress)
                print(*welcome(address_of(bound), graphs, bool(settings.api_keys)), sep="\n", flush=True)

            loading.enter_context(view)
            await hosting.run(ready)
    if tracing is not None:
        tracing.stop()


def build_graphs(args: argparse.Namespace, view: View) -> dict[str, AsyncOmni]:
    """Name -> graph, checked and planned. Raises UsageError (GraphError, PlanError)."""
    import re
    from pathlib import Path

    from omni.api import AsyncOmni
    from omni.errors import UsageError
    from omni.load_flags import with_load_flags

    graphs: dict[str, AsyncOmni] = {}
    for path in args.graph:
        omni = AsyncOmni(
            path,
            overrides=with_load_flags(args, path),
            runner=args.runner,
            address=args.address,
            hardware=args.hardware,
            report=view.loading,
        )
        name = omni.graph.spec.name if "name" in omni.loaded.document else Path(path).stem
        if not re.fullmatch(NAME_CHARACTERS, name):
            raise UsageError(f"{path}: the name '{name}' cannot be part of an address; use letters, digits and '._-'")
        if name in graphs:
            raise UsageError(f"{path}: there is a graph '{name}' already; give each its own 'name'")
        graphs[name] = omni
        for note in omni.planned.hardware.notes if omni.planned is not None else ():
            print(f"warning: {note}", file=sys.stderr)
    return graphs


def build_settings(args: argparse.Namespace) -> ServerSettings:
    """The server's settings. Raises UsageError."""
    import os

    from omni.server.access import parse_api_keys
    from omni.server.settings import ServerSettings

    keys, trusted = parse_api_keys(args.api_key, os.environ), tuple(args.trusted_host)
    if not trusted and (is_loopback(args.host) or not keys):
        trusted = own_names(args.host)
    return ServerSettings(
        api_keys=keys,
        cors_origins=tuple(args.cors_origin),
        trusted_hosts=trusted,
        public_url=args.public_url,
        allowed_hosts=tuple(args.allow_host),
        webhook_hosts=tuple(args.webhook_host),
        allow_unknown_fields=args.allow_unknown_fields,
    )


def build_service(args: argparse.Namespace, graphs: dict[str, AsyncOmni], settings: ServerSettings) -> Service:
    """The service with its stores. Raises UsageError and StoreError."""
    import os
    from pathlib import Path

    from omni.errors import UsageError
    from omni.server.addresses import WEBHOOK_REMEDY, AddressRules, checked_address
    from omni.server.files import FileStore
    from omni.server.job_object import job_document
    from omni.server.service import Service
    from omni.server.service_settings import ServiceSettings
    from omni.server.store import JobStore

    for flag in ("max_running", "max_queued", "max_running_per_key", "keep_days", "drain_seconds"):
        value = getattr(args, flag)
        if value is not None and not value >= (0 if flag in ("max_queued", "drain_seconds") else 1e-9):
            raise UsageError(f"--{flag.replace('_', '-')} {value}: must be more than that")
    if args.store and not args.store.startswith("sqlite") and not args.files:
        raise UsageError("--store without --files: servers that share jobs need their files, too; add --files URL")
    state = Path(args.state_dir)
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--state-dir {state}: cannot be made: {error.strerror}") from error
    limits = ServiceSettings(
        max_running=args.max_running,
        max_queued=args.max_queued,
        max_running_per_key=args.max_running_per_key,
        keep_seconds=args.keep_days * 24 * 3600,
        webhook_secret=os.environ.get("OMNI_WEBHOOK_SECRET", ""),
    )
    store = JobStore(args.store or f"sqlite:///{state / 'jobs.db'}")
    files = FileStore(args.files or state / "files")
    rules = AddressRules(settings.webhook_hosts, WEBHOOK_REMEDY)
    return Service(
        graphs,
        store,
        files,
        limits,
        check_address=lambda url: checked_address(url, rules),
        render_job=job_document,
    )


def welcome(url: str, graphs: dict[str, AsyncOmni], has_keys: bool) -> list[str]:
    """What is printed when the server is ready: where it listens, its page, and a request to try."""
    from omni.server.graph_facts import output_types

    key = ' -H "Authorization: Bearer $OMNI_API_KEY"' if has_keys else ""
    json = '-H "Content-Type: application/json"'
    lines = [f"listening on {url}", f"page: {url}/", f"graphs: {', '.join(graphs)}"]
    for name, omni in graphs.items():
        types = set(output_types(omni.graph).values())
        if "image" in types:
            body = f'{{"model": "{name}", "prompt": "a small blue circle on a white background"}}'
            return [*lines, f"try: curl {url}/v1/images/generations{key} {json} -d '{body}'"]
        if "text" in types:
            body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "hello"}}]}}'
            return [*lines, f"try: curl {url}/v1/chat/completions{key} {json} -d '{body}'"]
    return [*lines, f"try: curl {url}/v1/graphs{key}"]


def own_names(host: str) -> tuple[str, ...]:
    """What a server on `host` goes by when nobody says: its addresses, and the names that it surely has."""
    import socket

    from omni.server.access import ANY_ADDRESS, LOOPBACK_NAMES

    if is_loopback(host):
        return LOOPBACK_NAMES
    return tuple(dict.fromkeys((ANY_ADDRESS, "localhost", socket.gethostname().lower(), host.lower())))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warn(args: argparse.Namespace, settings: ServerSettings) -> None:
    """Say on stderr what is open to others."""
    if not settings.api_keys and not is_loopback(args.host):
        names = ", ".join(settings.trusted_hosts).replace("[ip]", "its IP addresses")
        print(
            f"warning: --host {args.host} without --api-key: whoever reaches it may use it; "
            f"it goes by {names} (--trusted-host NAME sets others)",
            file=sys.stderr,
        )


def _set_up_logs(verbose: bool) -> None:
    import logging

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
