"""The long forms of what the service promises under fire, each with its figures.

    python -m benchmarks.service_faults [swaps] [kills] [overload]

    swaps     the alias moves ten times, back and forth, under constant load: no request fails, none is of two versions
    kills     kill -9 of a text encoder, of an image encoder, of a gateway, of the process that follows the alias
    overload  five times what the service can do, for a minute: who is accepted is answered within the deadline

Packages of random weights, `tiny` for swaps and kills, `small` for the overload.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

from benchmarks.load import Reply, Tally, closed_loop, forever, open_loop, request, until
from benchmarks.machine import machine
from benchmarks.service import Service, triptych_serve, wait_until
from benchmarks.serving import Corpus, ask, make_corpus, make_package
from models.package import load_package
from pipelines.tracking.registry import CHAMPION, SPACE, Registry
from serving.gateway.port import free_port

RESULT = Path(__file__).parent / "results" / "service_faults.json"
SWAPS, CLIENTS, DEADLINE, OVERLOAD_SECONDS = 10, 8, 5.0, 60.0


class Consistent:
    """Counts replies that are of two versions: the space in the header decides which label and vectors are right."""

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._first: dict[tuple[str, int], torch.Tensor] = {}
        self.versions: Counter[str] = Counter()

    def __call__(self, number: int, reply: Reply) -> str:
        if reply.status != 200:
            return f"status {reply.status}: {reply.body[:100]!r}"
        space = reply.headers["x-triptych-space"]
        self.versions[self._labels[space]] += 1
        if reply.headers["x-triptych-model"] != self._labels[space]:
            return "headers of two versions"
        vectors = [torch.tensor(row["embedding"]) for row in json.loads(reply.body)["data"]]
        now = torch.stack(vectors)
        first = self._first.setdefault((space, number), now)
        return "" if (now - first).abs().max() < 1e-5 else f"other vectors than {space} gave before"


@contextmanager
def load(url: str, requests: list[bytes], check: Consistent) -> Iterator[Tally]:
    """CLIENTS connections asking without pause while the block runs."""
    tally, stopped = Tally(), threading.Event()
    work = until(stopped.is_set, forever(requests))
    thread = threading.Thread(target=lambda: asyncio.run(closed_loop([url], work, CLIENTS, tally, check)))
    thread.start()
    try:
        yield tally
    finally:
        stopped.set()
        thread.join(120)


def mixed_requests(url: str, corpus: Corpus) -> list[bytes]:
    """Two texts and an image in each."""
    texts, images = corpus.bodies("text", 2), corpus.bodies("image", 1)
    bodies = []
    for text, image in zip(texts[:40], images[:40], strict=True):
        inputs = json.loads(text)["input"] + json.loads(image)["input"]
        bodies.append(json.dumps({"input": inputs, "encoding_format": "float"}).encode())
    return [request(url, "/v1/embeddings", body) for body in bodies]


def label_of(url: str) -> str:
    """What answers now."""
    with urlopen(f"{url}/ready", timeout=30) as reply:
        return str(reply.headers["x-triptych-model"])


def swaps(service: Service, registry: Registry, requests: list[bytes], check: Consistent) -> dict[str, Any]:
    """The alias there and back; how long each move took until every gateway answered with the new version."""
    seconds = []
    with load(service.url, requests, check) as tally:
        for number in range(SWAPS):
            wanted = 2 - number % 2
            registry.set_alias("shop", CHAMPION, wanted)
            seconds.append(
                wait_until(lambda: all(label_of(service.url) == f"shop/{wanted}" for _ in range(20)), 300)  # noqa: B023
            )
            _say(f"swap {number + 1} to version {wanted}: {seconds[-1]:.1f} s, {dict(tally.statuses)}")
            time.sleep(1)
    return {
        "seconds_until_served": seconds,
        "requests": sum(tally.statuses.values()),
        "failed": sum(count for status, count in tally.statuses.items() if status != 200),
        "wrong": tally.wrong,
        "replies_by_version": dict(check.versions),
        "p50_ms": 1000 * tally.percentile(50),
        "p99_ms": 1000 * tally.percentile(99),
        "slowest_ms": 1000 * tally.percentile(100),
    }


def kill(service: Service, name: str, requests: list[bytes], check: Consistent) -> dict[str, Any]:
    """kill -9 of one replica under load, until another has taken its place and answers."""
    with load(service.url, requests, check) as tally:
        wait_until(lambda: tally.statuses[200] > 30, 60)
        before = service.replicas(name)
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: bool(set(service.replicas(name)) - set(before)), 120)
        replaced = time.monotonic() - killed
        answered = tally.statuses[200]
        wait_until(lambda: tally.statuses[200] > answered + 30, 120)
        time.sleep(5)
    ends = [killed, *(moment for moment, status in tally.ended if moment > killed and status == 200)]
    return {
        "replicas": len(before),
        "requests": sum(tally.statuses.values()),
        "statuses": {str(status): count for status, count in tally.statuses.items()},
        "wrong": tally.wrong,
        "new_process_after_seconds": replaced,
        "longest_silence_seconds": max(late - early for early, late in itertools.pairwise(ends)),
    }


def overload(service: Service, corpus: Corpus) -> dict[str, Any]:
    """Five times the measured capacity for a minute, of images; then again what it could before."""
    bodies = corpus.bodies("image", 1)
    requests = [request(service.url, "/v1/embeddings", body) for body in bodies]
    before = ask(service, bodies, 1, 32, 5.0)
    rate, tally = 5 * before["items_per_second"], Tally()
    memory = [service.resident()]
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(5):
            memory.append(service.resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    asyncio.run(open_loop(service.url, forever(requests), rate, OVERLOAD_SECONDS, tally))
    stopped.set()
    watcher.join()
    time.sleep(2)
    after = ask(service, bodies, 1, 32, 5.0)
    return {
        "capacity_items_per_second": before["items_per_second"],
        "offered_per_second": rate,
        "deadline_seconds": DEADLINE,
        "statuses": {str(status): count for status, count in tally.statuses.items()},
        "accepted_per_second": tally.statuses[200] / OVERLOAD_SECONDS,
        "accepted_p50_s": tally.percentile(50),
        "accepted_p99_s": tally.percentile(99),
        "refused_p50_ms": 1000 * tally.percentile(50, 429),
        "refused_p99_ms": 1000 * tally.percentile(99, 429),
        "resident_mib": [round(size / 2**20) for size in memory],
        "afterwards_items_per_second": after["items_per_second"],
        "afterwards_p99_ms": after["p99_ms"],
    }


@contextmanager
def registered(folder: Path, corpus: Corpus) -> Iterator[tuple[Service, Registry, list[bytes], Consistent]]:
    """A service that follows `shop@champion`, with two versions registered."""
    uri, labels = f"sqlite:///{folder}/mlflow.db", {}
    registry = Registry(uri)
    for number in (1, 2):
        make_package(folder / f"p{number}", corpus.text, "clip-tiny", number)
        space = load_package(folder / f"p{number}").embedding_space
        registry.register("shop", str(folder / f"p{number}"), "", {SPACE: space}, {})
        labels[space] = f"shop/{number}"
    registry.set_alias("shop", CHAMPION, 1)
    words = ["models:/shop@champion", "--versions.poll", "0.5", "--versions.keep", "0"]
    with triptych_serve(words, free_port(), {"MLFLOW_TRACKING_URI": uri}) as service:
        yield service, registry, mixed_requests(service.url, corpus), Consistent(labels)


def main() -> None:
    """Run what is asked for, write RESULT, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["swaps", "kills", "overload"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = make_corpus(folder / "data")
        if {"swaps", "kills"} & set(options.cases):
            with registered(folder, corpus) as (service, registry, requests, check):
                if "swaps" in options.cases:
                    result["swaps"] = swaps(service, registry, requests, check) | {"machine": machine()}
                if "kills" in options.cases:
                    names = ("text", "image", "Gateway", "Versions")
                    result["kills"] = {name: kill(service, name, requests, check) for name in names}
                    result["kills"]["machine"] = machine()
        if "overload" in options.cases:
            make_package(folder / "small", corpus.text)
            words = [str(folder / "small"), "--door.deadline", str(DEADLINE)]
            with triptych_serve(words, free_port()) as service:
                result["overload"] = overload(service, corpus) | {"machine": machine()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
