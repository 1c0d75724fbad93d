"""The whole service as its users start it, by the command, under load: vectors, swaps, kills, the end.

Ten swaps, the long overload and the kills' recovery times are in `benchmarks/service_faults.py`.
"""

import asyncio
import base64
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.request import urlopen

import numpy as np
import pytest

from benchmarks.load import Reply, Tally, closed_loop, forever, request, until
from benchmarks.service import Service, triptych_serve, wait_until
from models import inference
from models.inference import Package
from pipelines.tracking.registry import CHAMPION, SPACE, Registry
from serving.model_source import INDEX_TAG
from tests.support.pairs import make_pairs
from tests.support.servers import free_port
from tests.support.serving_models import png, save_index, save_small, vectors

TEXTS = [pair["caption"] for pair in make_pairs(40)]
PIXELS = np.random.default_rng(1).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
IMAGES = ["data:image/png;base64," + base64.b64encode(png(one)).decode() for one in PIXELS]


@dataclass
class Running:
    """The service, and the versions that it may serve."""

    service: Service
    registry: Registry
    packages: dict[str, Package]
    """By embedding space."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.service.url

    def move_to(self, number: int) -> None:
        """The alias, and nothing else."""
        self.registry.set_alias("shop", CHAMPION, number)

    def label(self) -> str:
        """What answers now."""
        with urlopen(f"{self.url}/ready", timeout=20) as reply:
            return reply.headers["x-triptych-model"]

    def wait_for(self, label: str, seconds: float = 90) -> float:
        """Until `label` answers twenty times in a row, from whichever gateway; returns the seconds."""
        return wait_until(lambda: all(self.label() == label for _ in range(20)), seconds)

    def alarm(self) -> str:
        """Why a newer version is not served."""
        with urlopen(f"{self.url}/v1/models", timeout=20) as reply:
            return json.load(reply)["alarm"]


@pytest.fixture(scope="module")
def running(tmp_path_factory, empty_mlflow) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    registry = Registry(uri)
    packages = {}
    for seed in (1, 2):
        package = save_small(folder / f"p{seed}", seed, "shop")
        packages[package.embedding_space] = package
        index = save_index(folder / f"v{seed}", package, TEXTS[: len(PIXELS)], PIXELS)
        tags = {SPACE: package.embedding_space, INDEX_TAG: index}
        registry.register("shop", str(folder / f"p{seed}"), "", tags, {})
    registry.register("shop", str(folder / "p2"), "", {**tags, SPACE: "0123456789abcdef"}, {})  # not what is there
    tags = {SPACE: packages[list(packages)[1]].embedding_space}
    registry.register("shop", str(folder / "p2"), "", tags, {})  # without an index
    registry.set_alias("shop", CHAMPION, 1)
    words = ["models:/shop@champion", "--versions.poll", "0.2"]
    words += ["--door.deadline", "120"]  # on busy cores a killed encoder's place is taken after more than the default
    with triptych_serve(words, free_port(), {"MLFLOW_TRACKING_URI": uri}) as service:
        yield Running(service, registry, packages)


def expected(package: Package, inputs: list[str]) -> np.ndarray:
    """The evaluated model's vectors."""
    rows = []
    for text in inputs:
        if text in IMAGES:
            rows.append(inference.embed_images(package, PIXELS[[IMAGES.index(text)]])[0])
        else:
            rows.append(vectors(package, [text])[0])
    return np.stack(rows)


def mixed(url: str, count: int) -> tuple[list[list[str]], list[bytes]]:
    """Requests of one to five texts and images in any order, every third one a search by one of them."""
    draw = np.random.default_rng(0)
    asked, requests = [], []
    for number in range(count):
        length = 1 if number % 3 == 2 else draw.integers(1, 6)
        some = [str(draw.choice(TEXTS + IMAGES)) for _ in range(length)]
        body: dict[str, object] = {"input": some, "encoding_format": "base64"}
        if number % 3 == 2:
            body = {"image" if some[0] in IMAGES else "text": some[0], "target": "image", "top_k": 3}
        path = "/v1/search" if number % 3 == 2 else "/v1/embeddings"
        asked.append(some)
        requests.append(request(url, path, json.dumps(body).encode()))
    return asked, requests


class Checker:
    """Whether a reply is right for its request, and wholly of the one version that it names."""

    def __init__(self, running: Running, inputs: list[list[str]]) -> None:
        self._right, self._nearest = {}, {}
        for space, package in running.packages.items():
            images = inference.embed_images(package, PIXELS)
            self._right[space] = [expected(package, some) for some in inputs]
            self._nearest[space] = [np.sort(images @ rows[0])[::-1][:3] for rows in self._right[space]]
        self._labels = dict(zip(running.packages, ("shop/1", "shop/2"), strict=True))
        self.seen: set[str] = set()

    def __call__(self, number: int, reply: Reply) -> str:
        if reply.status != 200:
            return f"status {reply.status}: {reply.body[:200]!r}"
        space = reply.headers["x-triptych-space"]
        self.seen.add(space)
        if reply.headers["x-triptych-model"] != self._labels[space]:
            return "the headers are of two versions"
        told = json.loads(reply.body)
        if number % 3 == 2:
            found = np.array([hit["score"] for hit in told["data"]])
            worst = float(np.abs(found - self._nearest[space][number]).max())
            named = told["embedding_space"] == space
            return "" if worst < 1e-5 and named else f"hits differ by {worst} from what {space} and its index give"
        found = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in told["data"]])
        worst = float(np.abs(found - self._right[space][number]).max())
        return "" if worst < 1e-5 else f"differs by {worst} from what {space} gives"


@contextmanager
def load(running: Running, clients: int, count: int = 60) -> Iterator[tuple[Tally, Checker]]:
    """Mixed requests from `clients` connections, every reply checked, while the block runs.

    They leave some of the processors to whatever loads meanwhile; without a pause a move takes minutes.
    """
    inputs, requests = mixed(running.url, count)
    checker, tally, stopped = Checker(running, inputs), Tally(), threading.Event()
    work = until(stopped.is_set, forever(requests))
    asked = closed_loop([running.url], work, clients, tally, checker, pause=0.1)
    thread = threading.Thread(target=asyncio.run, args=(asked,))
    thread.start()
    try:
        yield tally, checker
    finally:
        stopped.set()
        thread.join(60)


def wait_for_answers(tally: Tally, count: int, seconds: float = 60) -> None:
    """Until `count` more requests have been answered."""
    wanted = tally.statuses[200] + count
    wait_until(lambda: tally.statuses[200] >= wanted, seconds)


def test_a_thousand_mixed_requests_each_get_the_evaluated_vectors_in_order(running):
    inputs, requests = mixed(running.url, 1000)
    checker = Checker(running, inputs)
    tally = asyncio.run(closed_loop([running.url], iter(list(enumerate(requests))), 64, Tally(), checker))
    assert tally.wrong == [] and tally.statuses == {200: 1000}
    assert len(checker.seen) == 1


def test_the_alias_moves_there_and_back_and_no_request_fails_or_is_mixed(running):
    with load(running, 3) as (tally, checker):
        running.move_to(2)
        running.wait_for("shop/2")
        running.move_to(1)
        back = running.wait_for("shop/1")
        time.sleep(0.2)
    assert tally.wrong == [] and set(tally.statuses) == {200}
    assert len(checker.seen) == 2
    assert back < 20, "the version before stays loaded, so that going back is quick"


def test_a_version_that_is_not_what_was_registered_or_lacks_an_index_changes_nothing_but_an_alarm(running):
    with load(running, 2) as (tally, checker):
        running.move_to(3)
        wait_until(lambda: bool(running.alarm()), 60)
        assert "0123456789abcdef" in running.alarm()
        running.move_to(4)
        wait_until(lambda: "no index" in running.alarm(), 60)
        assert running.label() == "shop/1"
        running.move_to(1)
        wait_until(lambda: not running.alarm(), 60)
    assert tally.wrong == [] and set(tally.statuses) == {200} and len(checker.seen) == 1


def test_a_killed_encoder_fails_no_request(running):
    with load(running, 3) as (tally, _):
        wait_for_answers(tally, 20)
        before = running.service.replicas("text")
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: bool(set(running.service.replicas("text")) - set(before)), 60)
        wait_for_answers(tally, 50)
    assert tally.wrong == [] and set(tally.statuses) == {200}


def test_a_killed_gateway_fails_only_what_was_open_with_it(running):
    clients = 6
    with load(running, clients) as (tally, _):
        wait_for_answers(tally, 20)
        gateways = running.service.replicas("Gateway")
        assert len(gateways) == 2
        os.kill(gateways[0], signal.SIGKILL)
        wait_for_answers(tally, 50)
        failed = tally.statuses[0]
        assert failed <= clients  # one for each connection at most
        wait_for_answers(tally, 50)
        assert tally.statuses[0] == failed  # none afterwards
    assert set(tally.statuses) <= {0, 200}


def test_the_end_is_clean_and_within_thirty_seconds(running):
    with load(running, 2) as (tally, _):
        started = time.monotonic()
        running.service.process.send_signal(signal.SIGTERM)
        assert running.service.process.wait(30) == 0
        assert time.monotonic() - started < 30
    assert set(tally.statuses) <= {200, 0}
    assert not [one for one in tally.wrong if not one.startswith("status 0")]
