"""Fixtures for tests of the page: a browser, an HTTP app over stand-in versions, and tabs that record what they do."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from serving.http.app import HttpApp
from serving.http.auth import Keys
from tests.support.stand_in import StandInPool, StandInVersion, listening, make_corpus

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    if os.environ.get("TRIPTYCH_REQUIRE_BROWSER"):
        raise
    pytest.skip("playwright is not installed; the dev extra has it", allow_module_level=True)

FIELD = "Describe what you look for"


def chromium() -> str:
    """Path of a Chromium; skips the test where there is none, or fails it where TRIPTYCH_REQUIRE_BROWSER says so."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "no chromium on PATH (Debian: apt-get install chromium)"
        if os.environ.get("TRIPTYCH_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def page_server(pool: StandInPool, keys: Keys | None = None) -> Iterator[str]:
    """Address of an HTTP app that listens while the context lasts."""
    with listening(HttpApp(pool, keys=keys)) as address:
        yield address + "/"


@dataclass
class Visit:
    """A tab, and what it did."""

    page: Page
    base: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of its searches."""
    versions: list[str | None] = field(default_factory=list)
    """Their `x-triptych-version`."""
    requests: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    """Errors on the console and exceptions."""
    refused: bool = False
    """Whether the test lets requests fail: the browser then says so on the console."""

    def search(self, text: str) -> None:
        """Type and press Enter, wait for the wall."""
        self.enter(text)
        self.page.locator("body:not(.busy) #answered", has_text="Answered").wait_for()

    def enter(self, text: str) -> None:
        """Type and press Enter."""
        self.page.get_by_label(FIELD).fill(text)
        self.page.keyboard.press("Enter")

    def scores(self) -> list[str]:
        return self.page.locator(".hit .score").all_text_contents()

    def captions(self) -> list[str]:
        """Of each hit, whole."""
        return list(self.page.locator(".hit").evaluate_all("(all) => all.map((one) => one.title)"))

    def watch(self) -> None:
        """Record from now on what the tab does."""
        self.page.on("request", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", self._error)

    def leave(self, keep: bool) -> None:
        """The end of it; `keep`: another test goes on with the page."""
        if not keep:
            return self.page.context.close()
        self.page.unroute_all()
        self.page.goto("about:blank")
        self.page.remove_listener("request", self._request)
        self.page.remove_listener("console", self._console)
        self.page.remove_listener("pageerror", self._error)

    def _request(self, request: Any) -> None:
        if request.url == "about:blank":
            return
        self.requests.append(request.url)
        if request.url.endswith("/v1/search"):
            self.asked.append(json.loads(request.post_data))
            self.versions.append(request.headers.get("x-triptych-version"))

    def _console(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.troubles.append(said.text)

    def _error(self, error: Any) -> None:
        self.troubles.append(str(error))

    def failing(self, status: int, headers: dict[str, str] | None = None, message: str = "m") -> None:
        """From now on searches are answered so."""
        body = json.dumps({"error": {"message": message, "type": "t", "param": None, "code": "c"}})
        self.refused = True
        self.page.route("**/v1/search", lambda route: route.fulfill(status=status, headers=headers or {}, body=body))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests; stopped with the module, for its event loop would disturb others."""
    path = chromium()
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        arguments = ["--disable-gpu", "--in-process-gpu"] + (["--no-sandbox"] if os.geteuid() == 0 else [])
        yield playwright.chromium.launch(executable_path=path, args=arguments)


@pytest.fixture(scope="module")
def page_pool() -> StandInPool:
    """Two versions: 3 is current and has a fusion encoder, 2 has none."""
    return StandInPool(StandInVersion("2", matching=False), StandInVersion("3"))


@pytest.fixture(scope="module")
def page_address(page_pool: StandInPool) -> Iterator[str]:
    with page_server(page_pool) as address:
        yield address


Open = Callable[..., Visit]


def new_page(browser: Browser, width: int = 1200, **options: Any) -> Page:
    """A page of a context of its own."""
    context = browser.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", **options)
    context.set_default_timeout(10_000)
    return context.new_page()


@pytest.fixture(scope="module")
def usual_page(browser: Browser) -> Page:
    """For the tests that want nothing special: opening one takes longer than most tests."""
    return new_page(browser)


@pytest.fixture
def tab(browser: Browser, usual_page: Page, page_address: str) -> Iterator[Open]:
    """`tab(path="", at=..., **options)` opens a page; its requests and errors are checked after the test."""
    visits: list[Visit] = []

    def open_tab(path: str = "", at: str = page_address, **options: Any) -> Visit:
        page = new_page(browser, **options) if visits or options else usual_page
        visit = Visit(page, at)
        visits.append(visit)
        visit.watch()
        page.goto(at + path)
        return visit

    yield open_tab
    for visit in visits:
        visit.leave(keep=visit.page is usual_page)
        assert [url for url in visit.requests if not url.startswith((visit.base, "data:", "blob:"))] == []
        assert [said for said in visit.troubles if not (visit.refused and "Failed to load resource" in said)] == []


def expected_hits(query: np.ndarray, target: Any = "image") -> list[tuple[str, str]]:
    """(caption, score as shown) of the stand-in's corpus, the nearest first: by definition."""
    corpus = make_corpus()
    scores = corpus.vectors[target] @ query
    rows = sorted(range(len(scores)), key=lambda row: -scores[row])
    return [(corpus.hits[row].caption, f"{scores[row]:.3f}") for row in rows]


def shown(visit: Visit) -> list[tuple[str, str]]:
    return list(zip(visit.captions(), visit.scores(), strict=True))


def fits(visit: Visit) -> bool:
    """Whether nothing is wider than the screen (a phone's browser would zoom out, so that innerWidth tells nothing)."""
    size = visit.page.viewport_size
    return size is not None and int(visit.page.evaluate("document.documentElement.scrollWidth")) <= size["width"]


def in_transfer(visit: Visit, name: str, kind: str, content: bytes) -> Any:
    """A DataTransfer with one file, as dropping and pasting bring it."""
    return visit.page.evaluate_handle(
        """([name, type, data]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))], name, { type }));
          return transfer;
        }""",
        [name, kind, base64.b64encode(content).decode()],
    )


def a_file(name: str, content: bytes) -> Any:
    return {"name": name, "mimeType": "image/jpeg", "buffer": content}


def answered(visit: Visit) -> None:
    """Wait for the wall of the newest search."""
    visit.page.locator("body:not(.busy) .hit").first.wait_for()


FIXTURES = (browser, page_pool, page_address, usual_page, tab)
"""For test modules to take over."""
