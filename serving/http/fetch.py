"""Images by URL: off unless hosts are listed; never from a private address, whatever a name resolves to.

Every hop is checked by itself: scheme, host and port against the list, then all addresses of the host. The connection
goes to an address that was checked, so that a name cannot resolve to another one in between.
"""

import asyncio
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from serving.config import HttpConfig
from serving.http.responses import ApiError

Resolve = Callable[[str, int], list[str]]
"""(host, port) -> its addresses. Raises OSError."""
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MOST_REDIRECTS = 3
_CARRIERS = ("192.0.0.0/24", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
"""Not public either: protocol assignments, and IPv6 addresses that carry an IPv4 one, which may be private."""
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, _CARRIERS))


class FetchError(Exception):
    """A URL could not be fetched, or may not be; its text is for the client."""


def is_url(image: bytes | str) -> bool:
    """Whether an image is given by a URL to fetch."""
    return isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))


def is_public(address: str) -> bool:
    """Whether an address is public: no private, loopback, link-local, multicast or reserved one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class Fetcher:
    """Replaces the URLs among a request's images by their bytes."""

    def __init__(
        self, config: HttpConfig, resolve: Resolve = resolve, is_public: Callable[[str], bool] = is_public
    ) -> None:
        """`resolve` and `is_public` are parameters for tests, which have no public addresses."""
        self._hosts = tuple(host.lower() for host in config.url_images)
        self._seconds = config.url_seconds
        self._limit = int(config.max_image_mib * 2**20)
        self._resolve, self._is_public = resolve, is_public
        self._threads = ThreadPoolExecutor(8, "fetch") if self._hosts else None

    async def replace(self, images: Sequence[tuple[str, bytes | str]]) -> Sequence[tuple[str, bytes | str]]:
        """(param, bytes or data URL or URL) -> (param, bytes or data URL). Raises ApiError 400, 413."""
        if not any(is_url(image) for _, image in images):
            return images
        return await asyncio.gather(*(self._replaced(param, image) for param, image in images))

    async def _replaced(self, param: str, image: bytes | str) -> tuple[str, bytes | str]:
        if not isinstance(image, str) or not is_url(image):
            return param, image
        if self._threads is None:
            message = f"{param}: URLs are not fetched here; send the image as data:image/jpeg;base64,..."
            raise ApiError(400, "url_not_allowed", message, param)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._seconds):
                return param, await loop.run_in_executor(self._threads, self.fetch, image)
        except TimeoutError:
            raise ApiError(400, "image_fetch_failed", f"{param}: no image within {self._seconds:g} s", param) from None
        except FetchError as error:
            raise ApiError(400, "image_fetch_failed", f"{param}: {error}", param) from None

    def fetch(self, url: str) -> bytes:
        """The body behind a URL, redirects followed; blocks. Raises Unfetched."""
        end = time.monotonic() + self._seconds
        for _ in range(_MOST_REDIRECTS + 1):
            content, location = self._hop(url, end)
            if location is None:
                return content
            url = urljoin(url, location)
        raise FetchError(f"more than {_MOST_REDIRECTS} redirects")

    def _hop(self, url: str, end: float) -> tuple[bytes, str | None]:
        """One request: (body, None), or (b"", location that it redirects to)."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:
            raise FetchError("not a URL") from None
        self._check(parts, host, port)
        address = self._address(host, port)
        try:
            with self._connected(parts.scheme, host, port, address, end) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
                found = self._read(connection.getresponse())
                if time.monotonic() >= end:  # cut off by the timer: the body may seem whole
                    raise TimeoutError
                return found
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(f"the host did not send it ({type(error).__name__})") from None

    def _check(self, parts: SplitResult, host: str, port: int) -> None:
        """Raises FetchError for other schemes, a user in the URL, or a host and port that are not listed."""
        if parts.scheme not in _PORTS or parts.username is not None or parts.password is not None:
            raise FetchError("only http and https URLs without a user are fetched")
        name = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
        for allowed in self._hosts:
            if name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:])):
                return
        raise FetchError("images are not fetched from that host")

    def _address(self, host: str, port: int) -> str:
        """One of the host's addresses. Raises FetchError unless all of them are public."""
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError):
            raise FetchError("the host has no address") from None
        if not addresses or not all(map(self._is_public, addresses)):
            raise FetchError("the host is not a public one")
        return addresses[0]

    @contextmanager
    def _connected(
        self, scheme: str, host: str, port: int, address: str, end: float
    ) -> Iterator[http.client.HTTPConnection]:
        """A connection to `address` that speaks to `host`; a timer cuts it at `end`.

        A socket's own timeout starts anew with every byte, so that a slow host could keep the thread for hours."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        line = socket.create_connection((address, port), left)
        try:
            if scheme == "https":
                line = ssl.create_default_context().wrap_socket(line, server_hostname=host)
            connection = http.client.HTTPConnection(host, port, timeout=left)
            connection.default_port = _PORTS[scheme]
            connection.sock = line
            guard = threading.Timer(max(end - time.monotonic(), 0), _cut, [line])
            guard.daemon = True
            guard.start()
            try:
                yield connection
            finally:
                guard.cancel()
        finally:
            line.close()

    def _read(self, response: http.client.HTTPResponse) -> tuple[bytes, str | None]:
        """(body, None), or (b"", location) of a redirect. Raises FetchError."""
        if response.status in _REDIRECTS:
            return b"", response.getheader("Location") or ""
        if response.status != 200:
            raise FetchError(f"the host answered {response.status}")
        content = response.read(self._limit + 1)
        if len(content) > self._limit:
            raise FetchError(f"the image has more than {self._limit} bytes")
        if response.length:  # what was promised and did not come
            raise FetchError("the image ended early")
        return content, None


def _cut(line: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(
            line, socket.SHUT_RDWR
        )  # the plain socket's, for TLS too: it ends a read that waits in another thread
