"""The documentation site: builds strictly, draws its diagrams and formulas, and asks nobody else for anything."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser

from tests.support.browser import FIXTURES, new_page
from tests.support.paths import ROOT

browser, *_ = FIXTURES
OPEN_SHADOWS = """
const attach = Element.prototype.attachShadow;
Element.prototype.attachShadow = function (options) { return attach.call(this, { ...options, mode: "open" }); };
"""
"""The theme draws diagrams into closed shadow roots, which nobody can look into."""
DRAWN = """() => [...document.querySelectorAll("div.mermaid")].filter((one) => {
  const svg = one.shadowRoot?.querySelector("svg");
  return svg && svg.getBoundingClientRect().height > 20 && !svg.textContent.includes("Syntax error");
}).length"""


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`, as `make check` calls it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without writing a line for each."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    site = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", site)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where it is served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_every_page_is_whole_on_both_screens_and_asks_nobody_else(browser: Browser, address: str, folder: Path) -> None:
    tab = new_page(browser)
    tab.set_default_timeout(30_000)  # the diagrams' script is large, and other tests keep the cores busy
    tab.add_init_script(OPEN_SHADOWS)
    asked: list[str] = []
    troubles: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("response", lambda reply: troubles.append(reply.url) if reply.status >= 400 else None)
    tab.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    diagrams = formulas = 0
    for file in sorted(folder.rglob("index.html")):
        source = file.read_text()
        wanted = source.count('<pre class="mermaid">'), source.count('class="arithmatex"')
        diagrams, formulas = diagrams + wanted[0], formulas + wanted[1]
        tab.goto(address + file.parent.relative_to(folder).as_posix() + "/")
        tab.wait_for_function(f"({DRAWN})() === {wanted[0]}")
        assert tab.locator(".arithmatex .katex-html").count() == wanted[1], file
        for width in (1280, 400):
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{file}: too wide for {width}"
    assert diagrams and formulas
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert troubles == []
    tab.context.close()


def test_search_finds_a_word(browser: Browser, address: str) -> None:
    tab = new_page(browser)
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    tab.get_by_role("textbox", name="Search").fill("embedding space")
    tab.get_by_role("link", name="Glossary").first.wait_for()
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    tab.context.close()


def test_sections_that_the_code_cites_exist() -> None:
    pages = {
        "docs/spec/tcl.md": "spec/tcl.md",
        "docs/spec/codebook.md": "spec/codebook.md",
        "docs/formats.md, contract": "formats.md",
    }
    headings = {
        name: set(re.findall(r"^##+ (\d+(?:\.\d+)?)[. ]", (ROOT / "docs" / page).read_text(), re.MULTILINE))
        for name, page in pages.items()
    }
    numbers = r"\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)*"
    cited: set[tuple[str, str]] = set()
    for package in ("models", "pipelines", "tuning", "serving", "tests", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            for name, found in re.findall(rf"({'|'.join(pages)}) ({numbers})", file.read_text()):
                cited |= {(name, number) for number in re.findall(r"\d+(?:\.\d+)?", found)}
    assert {("docs/spec/tcl.md", "2.3"), ("docs/spec/codebook.md", "3.2")} <= cited
    assert [one for one in sorted(cited) if one[1] not in headings[one[0]]] == []


def small_site(folder: Path, **pages: str) -> Path:
    """A configuration like ours over a few pages; its navigation names index and b."""
    docs = folder / "docs"
    shutil.copytree(ROOT / "docs" / "overrides", docs / "overrides")
    for name in ("site.css", "formulas.js"):
        (docs / "assets").mkdir(exist_ok=True)
        shutil.copy(ROOT / "docs" / "assets" / name, docs / "assets" / name)
    for name, text in pages.items():
        (docs / f"{name}.md").write_text(text)
    config = folder / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nnav: [index.md, b.md]\n")
    return config


def test_a_sound_site_builds(tmp_path: Path) -> None:
    done = build(small_site(tmp_path, index="# A\n\n[b](b.md#c)\n", b="# B\n\n## C\n"), tmp_path / "site")
    assert done.returncode == 0, done.stderr


def test_what_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    bad = ["[x](no-page.md)", "[x](c.md#no-anchor)", "[x](#no-own-anchor)", "![](no-image.png)", "[x](/no-absolute.md)"]
    done = build(small_site(tmp_path, index="\n\n".join(["# A", *bad]), c="# C, in no menu\n"), tmp_path / "site")
    assert done.returncode == 1
    assert done.stderr.count("WARNING") == len(bad) + 2, done.stderr
    expected = ["no-page.md", "#no-anchor", "#no-own-anchor", "no-image.png", "/no-absolute.md", "- c.md", "'b.md'"]
    assert [one for one in expected if one not in done.stderr] == []


def test_a_file_that_a_page_shows_must_be_there(tmp_path: Path) -> None:
    done = build(small_site(tmp_path, index='# A\n\n--8<-- "gone.json"\n', b="# B\n"), tmp_path / "site")
    assert done.returncode != 0 and "gone.json" in done.stderr
