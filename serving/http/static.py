"""The page and its documents, read once: served from memory, so that no path of a request reaches the disk."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from serving.http.responses import Header

FOLDER = Path(__file__).parent.parent / "page"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".png": b"image/png",
    ".ico": b"image/x-icon",
    ".woff2": b"font/woff2",
}
_POLICY = (
    b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    b"frame-ancestors 'none'"
)
_TAG = re.compile(rb'"[\x21\x23-\x7e\x80-\xff]*"')
"""An entity tag without its `W/` (RFC 9110, 8.8.3)."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    kind: bytes
    etag: bytes
    """With its quotes."""
    headers: tuple[Header, ...]
    """Of a 200 and of a 304 alike, `etag` among them."""

    def is_cached(self, request_headers: Iterable[Header]) -> bool:
        """Whether the client has this content already, by its If-None-Match (RFC 9110, 13.1.2).

        Tags are compared weakly: a proxy that compresses makes `W/"..."` of ours.
        """
        asked = b",".join(value for name, value in request_headers if name == b"if-none-match")
        return asked.strip() == b"*" or self.etag in _TAG.findall(asked)


def read_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Files by path: `/NAME` for all, `/` for index.html, `/docs` for docs.html."""
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = b'"%s"' % sha256(content).hexdigest()[:16].encode()
            headers = (
                (b"content-security-policy", _POLICY),
                (b"referrer-policy", b"no-referrer"),
                (b"cache-control", b"no-cache"),
                (b"etag", etag),
            )
            files[f"/{path.name}"] = PageFile(content, _TYPES[path.suffix], etag, headers)
    for path_name, file_name in (("/", "/index.html"), ("/docs", "/docs.html")):
        if file_name in files:
            files[path_name] = files[file_name]
    return files
