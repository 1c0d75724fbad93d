"""The end of the demo: the test images embedded and indexed, the encoders served, ten captions asked over HTTP."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import ray

from models.config import InputError
from models.preprocess import clean_caption
from pipelines.cli import main
from pipelines.cli.console import DONE
from pipelines.embed.job import embed

QUERIES = 10
_START_SECONDS, _STOP_SECONDS = 180, 40
_SIGN = "serving "
"""What `triptych serve` says first once it answers."""
_COMMAND = (sys.executable, "-m", "pipelines.cli", "serve")


def serve_and_ask(run: str, data: Path, folder: Path, captions: Sequence[str]) -> str:
    """Embeds and indexes `data`, serves `run` for ten queries, and returns what came of it, for people.

    Vectors and index are written anew below `folder`. Raises InputError where a part of it fails.
    """
    for name in ("vectors", "index"):
        shutil.rmtree(folder / name, ignore_errors=True)
    embed(run, str(data), str(folder / "vectors"))
    ray.shutdown()  # the service has a Ray of its own
    if main.main(["index", str(folder / "vectors"), "--out", str(folder / "index")]) != DONE:
        raise InputError(f"{folder / 'vectors'}: could not be indexed, see above")
    step = max(1, len(captions) // QUERIES)
    with _served(run, folder / "index") as url:
        lines = [_ask(url, caption) for caption in captions[::step][:QUERIES]]
    head = "Asked over HTTP: caption, caption of the first image, cosine, place of the caption's own image"
    return "\n".join([head, *lines])


def _ask(url: str, caption: str) -> str:
    """One search, as a line."""
    hits = _post(f"{url}/v1/search", {"text": caption, "target": "image", "top_k": 10})["data"]
    right = [hit["index"] + 1 for hit in hits if clean_caption(hit["caption"]) == clean_caption(caption)]
    place = f"place {right[0]}" if right else "not among ten"
    return f"  {caption[:52]:52}  ->  {hits[0]['caption'][:52]:52}  {hits[0]['score']:.2f}  {place}"


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as reply:
        return dict(json.load(reply))


@contextmanager
def _served(run: str, index: Path) -> Iterator[str]:
    """The service as a user starts it, on a free port of loopback, until the context ends."""
    port = _free_port()
    words = [*_COMMAND, run, "--index", str(index), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ready = threading.Event()
    told: list[str] = []

    def listen() -> None:
        for line in process.stderr or ():
            told.append(line.rstrip())
            if line.startswith(_SIGN):
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        ready.wait(_START_SECONDS)
        if not any(line.startswith(_SIGN) for line in told):
            raise InputError(f"the service did not start: {told[-1] if told else 'no word from it'}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
