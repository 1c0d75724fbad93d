"""Images by URL, against a server on loopback that a resolver of the test's own calls public."""

import asyncio
import base64
import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
import pytest

from models.preprocess import resize_for_eval
from serving.config import HttpConfig
from serving.http.app import HttpApp
from serving.http.fetch import Fetcher, FetchError, is_public
from serving.http.responses import ApiError
from tests.support.stand_in import StandInPool, as_file, ask, drawing, image_vector

PICTURE = as_file(drawing("red", "circle"), "PNG")
HOST = "images.test"


class Host(BaseHTTPRequestHandler):
    """Answers by path; keeps the Host headers that it was sent."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Host.asked.append(self.headers["Host"])
        if self.path.startswith("/to/"):
            return self._redirect(base64.urlsafe_b64decode(self.path[4:]).decode())
        answers = {
            "/round": lambda: self._redirect("/round"),
            "/drip": lambda: self._drip(b"HTTP/1.0 200 OK\r\n\r\n"),
            "/head-drip": lambda: self._drip(b""),
            "/large": lambda: self._send(b"x" * 5000),
            "/cut": lambda: self._send(PICTURE, length=len(PICTURE) + 9),
            "/endless": lambda: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 5000),
            "/missing": lambda: self.send_error(404),
        }
        answers.get(self.path, lambda: self._send(PICTURE))()

    def _redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.end_headers()

    def _drip(self, head: bytes) -> None:
        self.wfile.write(head)
        for _ in range(100):
            self.wfile.write(b"H")
            time.sleep(0.05)

    def _send(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def handle(self) -> None:
        """As ever, but it is no matter that the other side hangs up."""
        with contextlib.suppress(OSError):
            super().handle()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


NAMES = {
    HOST: ["127.0.0.1"],
    "cdn.images.test": ["127.0.0.1"],
    "two.test": ["127.0.0.1", "10.0.0.1"],
    "inner.test": ["10.0.0.1"],
}


def resolve(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError("no such host")
    return NAMES[host]


def fetcher(port: int, seconds: float = 5, *more: str) -> Fetcher:
    """Trusts some hosts at `port`; to it 127.0.0.1 is outside."""
    hosts = (f"{HOST}:{port}", f"two.test:{port}", f"inner.test:{port}", f"gone.test:{port}", *more)
    config = HttpConfig(url_images=hosts, url_seconds=seconds, max_image_mib=4096 / 2**20)
    return Fetcher(config, resolve, lambda address: address == "127.0.0.1")


def hop(url: str) -> str:
    """The path that redirects to a URL."""
    return "/to/" + base64.urlsafe_b64encode(url.encode()).decode()


def test_an_image_is_fetched_and_redirects_are_followed(port: int) -> None:
    Host.asked.clear()
    own = fetcher(port)
    assert own.fetch(f"http://{HOST}:{port}/a.png?b=1") == PICTURE
    assert own.fetch(f"http://{HOST}:{port}{hop('/a.png')}") == PICTURE
    assert own.fetch(f"HTTP://{HOST.upper()}.:{port}{hop(f'http://{HOST}:{port}/a.png')}") == PICTURE
    assert set(Host.asked) == {f"{HOST}:{port}"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://other.test:{port}/a.png", "not fetched from that host"),
        ("http://cdn.images.test:{port}/a.png", "not fetched from that host"),
        ("http://images.test/a.png", "not fetched from that host"),
        ("http://images.test:1/a.png", "not fetched from that host"),
        ("http://127.0.0.1:{port}/a.png", "not fetched from that host"),
        ("http://user:word@images.test:{port}/a.png", "without a user"),
        ("http://images.test:{port}@inner.test/a.png", "without a user"),
        ("ftp://images.test:{port}/a.png", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("http://images.test:99999/a.png", "not a URL"),
        ("http://[images.test/a.png", "not a URL"),
        ("http://inner.test:{port}/a.png", "not a public one"),
        ("http://two.test:{port}/a.png", "not a public one"),
        ("http://gone.test:{port}/a.png", "no address"),
        ("http://images.test:{port}/missing", "answered 404"),
        ("http://images.test:{port}/round", "more than 3 redirects"),
        ("http://images.test:{port}/large", "more than 4096 bytes"),
        ("http://images.test:{port}/endless", "more than 4096 bytes"),
        ("http://images.test:{port}/cut", "did not send it|ended early"),
        ("http://images.test:{port}/a\r\nHost: b/", "did not send it|not a URL"),
        ("https://images.test:{port}/a.png", "did not send it"),
    ],
)
def test_what_may_not_or_cannot_be_fetched(port: int, url: str, says: str) -> None:
    own, url = fetcher(port), url.format(port=port)
    with pytest.raises(FetchError, match=says):
        own.fetch(url)
    if "not fetched from" in says or "public" in says or "only http" in says:
        with pytest.raises(FetchError, match=says):
            own.fetch(f"http://{HOST}:{port}{hop(url)}")


def test_three_redirects_and_no_more(port: int) -> None:
    Host.asked.clear()
    with pytest.raises(FetchError, match="more than 3 redirects"):
        fetcher(port).fetch(f"http://{HOST}:{port}/round")
    assert len(Host.asked) == 4
    url = f"http://{HOST}:{port}/a.png"
    for _ in range(3):
        url = f"http://{HOST}:{port}{hop(url)}"
    assert fetcher(port).fetch(url) == PICTURE


@pytest.mark.parametrize("path", ["/drip", "/head-drip"])
def test_a_host_that_drips_is_cut_off_in_time(port: int, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(FetchError):
        fetcher(port, 0.3).fetch(f"http://{HOST}:{port}{path}")
    assert time.monotonic() - start < 2


def test_a_star_stands_for_names_below_and_not_for_the_name_itself(port: int) -> None:
    config = HttpConfig(url_images=(f"*.images.test:{port}",), max_image_mib=1)
    own = Fetcher(config, resolve, lambda address: True)
    assert own.fetch(f"http://cdn.images.test:{port}/a.png") == PICTURE
    for host in (HOST, "ximages.test"):
        with pytest.raises(FetchError, match="not fetched from that host"):
            own.fetch(f"http://{host}:{port}/a.png")


def test_the_connection_goes_to_the_address_that_was_checked(port: int) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    config = HttpConfig(url_images=(f"{HOST}:{port}",))
    own = Fetcher(config, lambda host, port: next(answers), lambda address: address == "127.0.0.1")
    assert own.fetch(f"http://{HOST}:{port}/a.png") == PICTURE
    with pytest.raises(FetchError, match="not a public one"):  # resolved once a hop, and never by the connection
        own.fetch(f"http://{HOST}:{port}/a.png")


def test_tls_is_told_the_name_and_checks_it(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Context:
        def wrap_socket(self, line: Any, server_hostname: str) -> Any:
            told.append(server_hostname)
            return line

    real = ssl.create_default_context()
    assert real.check_hostname and real.verify_mode == ssl.CERT_REQUIRED
    monkeypatch.setattr(ssl, "create_default_context", Context)
    assert fetcher(port).fetch(f"https://{HOST}:{port}/a.png") == PICTURE
    assert told == [HOST]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3"),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "192.0.0.8"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1"),
        *("::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:1::1", "::127.0.0.1"),
    ],
)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_outer_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_the_environments_proxies_are_not_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert fetcher(port).fetch(f"http://{HOST}:{port}/a.png") == PICTURE


def test_nothing_is_fetched_where_no_host_is_named(port: int) -> None:
    Host.asked.clear()
    url = f"http://{HOST}:{port}/a.png"
    own = Fetcher(HttpConfig(), resolve, lambda address: True)
    with pytest.raises(ApiError, match="data:image/jpeg;base64") as raised:
        asyncio.run(own.replace([("input[0]", b"bytes"), ("input[1]", url)]))
    assert (raised.value.status, raised.value.code, raised.value.param) == (400, "url_not_allowed", "input[1]")
    assert Host.asked == []


def test_in_requests_urls_are_images_where_an_image_is_expected(port: int) -> None:
    app = HttpApp(StandInPool(), fetcher=fetcher(port))
    url = f"http://{HOST}:{port}/a.png"
    expected = image_vector(resize_for_eval(drawing("red", "circle"), 32))

    def vectors(**body: Any) -> np.ndarray:
        reply = asyncio.run(ask(app, "/v1/embeddings", body)).json
        return np.array([row["embedding"] for row in reply["data"]], np.float32)

    np.testing.assert_array_equal(vectors(input=[url, url], modality="image"), [expected, expected])
    part = {"type": "image_url", "image_url": {"url": url}}
    np.testing.assert_array_equal(vectors(messages=[{"role": "user", "content": [part]}]), [expected])
    assert vectors(input=url) @ expected < 0.9  # auto: a text
    missing = {"input": f"http://{HOST}:{port}/missing", "modality": "image"}
    reply = asyncio.run(ask(app, "/v1/embeddings", missing))
    assert (reply.status, reply.json["error"]["code"]) == (400, "image_fetch_failed")
