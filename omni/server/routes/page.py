"""The page: static files read once, served with a policy that lets them load and call nothing but this server."""

from __future__ import annotations

import gzip
import hashlib
import re
from importlib import resources

import msgspec
from fastapi import APIRouter, Request, Response

from omni.server.settings import ServerSettings

FOLDER = "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Fixed, since what mimetypes knows differs between machines."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
FOR_EVER = "public, max-age=31536000, immutable"
"""Files lie under a name made of their content, so that another version has another name."""
ASK_FIRST = "no-cache"
METHODS = ["GET", "HEAD"]


class PageFile(msgspec.Struct, frozen=True):
    """A file of the page as it is sent."""

    media_type: str
    content: bytes
    packed: bytes
    """The content by gzip."""
    tag: str
    """Its ETag."""


def pack(name: str, content: bytes) -> PageFile:
    """A file ready to be sent."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return PageFile(MEDIA_TYPES["." + name.rpartition(".")[2]], content, gzip.compress(content, 9, mtime=0), tag)


def load_page(settings: ServerSettings) -> tuple[PageFile, dict[str, PageFile]]:
    """index.html, and the other files by the path that index.html asks for, under /page/."""
    folder = resources.files("omni.server") / FOLDER
    contents = {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)}
    version = hashlib.sha256(b"".join(contents.values())).hexdigest()[:12]
    index = contents.pop(INDEX).decode()
    prefix = f"{FOLDER}/{version}/"
    modules = [name for name in contents if name.endswith(".js") and f"{{files}}{name}" not in index]
    preloads = "\n".join(f'<link rel="modulepreload" href="{prefix}{name}">' for name in modules)
    values = {"files": prefix, "modules": preloads, "max_media_bytes": str(settings.max_media_bytes)}
    text = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], index)
    return pack(INDEX, text.encode()), {f"{version}/{name}": pack(name, data) for name, data in contents.items()}


def answer(request: Request, file: PageFile, caching: str) -> Response:
    """The file, or 304 when the browser has it."""
    headers = {**HEADERS, "Cache-Control": caching, "ETag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.packed, headers={**headers, "Content-Encoding": "gzip"}, media_type=file.media_type)
    return Response(file.content, headers=headers, media_type=file.media_type)


def build_router(settings: ServerSettings) -> APIRouter:
    """`/` and the files that it loads. They hold no secret, so they need no API key; the page asks for one."""
    router = APIRouter(include_in_schema=False)
    index, files = load_page(settings)

    @router.api_route("/", methods=METHODS)
    def page(request: Request) -> Response:
        return answer(request, index, ASK_FIRST)

    @router.api_route("/page/{path:path}", methods=METHODS)
    def page_file(path: str, request: Request) -> Response:
        if path not in files:
            return Response("no such file\n", 404, HEADERS, "text/plain")
        return answer(request, files[path], FOR_EVER)

    return router
