"""What serving costs over the forward passes themselves, one and many inputs a request, as concurrency rises.

    python -m benchmarks.serving [--package FOLDER] [--seconds 5] [--rounds 3]

In one run, on random weights of the `small` size unless a package is given:

    limit     a loop of two threads that decodes or tokenises and runs full batches: what no server can beat
    service   `triptych serve`, gateways with their own listener
    direct    the same gateways behind Ray Serve's direct ingress
    plain     a FastAPI server that calls the same model once a request

Shares are of the limit measured just before, in items a second and in processor seconds an item (all processes of the
server, Ray's included, the load generator apart), medians over the rounds. The image's decode and the caption's
tokenising are part of the limit; HTTP, JSON and base64 are not.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pyarrow.parquet as pq
import torch

from benchmarks import direct_ingress
from benchmarks.load import Tally, closed_loop, forever, request, until
from benchmarks.machine import machine
from benchmarks.service import Service, server, spent, triptych_serve
from models.encoders import DualEncoder, Heads, resolve
from models.package import load_package, save_package
from models.preprocess import CaptionTokenizer, PreprocessorConfig, clean_caption, train_tokenizer
from pipelines.config import PRESETS
from pipelines.data.synthetic import CorpusConfig, synthesize
from serving.environment import COMPUTE
from serving.gateway.port import free_port

RESULT = Path(__file__).parent / "results" / "serving.json"
BATCH, THREADS, SIDE = 64, 2, 128
RISING = {1: (1, 8, 32, 128), 32: (1, 4, 16)}
"""Inputs a request: concurrent requests; the last is taken for saturation."""
KINDS = ("text", "image")


class Corpus(NamedTuple):
    """What is asked for: captions, and encoded images of SIDE pixels."""

    text: list[str]
    image: list[bytes]

    def bodies(self, kind: str, inputs: int) -> list[bytes]:
        """JSON bodies of requests of so many inputs."""
        rows = self.text if kind == "text" else [f"data:image/jpeg;base64,{_base64(one)}" for one in self.image]
        groups = [rows[start : start + inputs] for start in range(0, len(rows) - inputs + 1, inputs)]
        return [json.dumps({"input": group, "encoding_format": "base64"}).encode() for group in groups]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def make_corpus(folder: Path, count: int = 640) -> Corpus:
    """Generated scenes as JPEG, with their captions."""
    from PIL import Image

    synthesize(str(folder), CorpusConfig(pairs=count, image_size=SIDE))
    table = pq.read_table(folder / "train", columns=["caption", "image"])
    images = []
    for row in table.column("image").to_pylist():
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row)).convert("RGB").save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return Corpus([str(caption) for caption in table.column("caption").to_pylist()], images)


def make_package(folder: Path, captions: list[str], preset: str = "clip-small", seed: int = 0) -> None:
    """The towers of a preset with random weights: the same work as trained ones."""
    settings = PRESETS[preset].encoder
    words = [clean_caption(caption) for caption in captions]
    tokenizer = CaptionTokenizer.from_json(train_tokenizer(words, settings.text.vocab_size).to_str())
    config = resolve(settings, tokenizer.vocab_size)
    torch.manual_seed(seed)
    preprocessor = PreprocessorConfig(image_size=config.vision.image_size, max_tokens=config.text.max_tokens)
    save_package(folder, config, DualEncoder(config, Heads()).eval(), tokenizer, preprocessor, preset)


class Measured(NamedTuple):
    """Over some seconds."""

    items: int
    seconds: float
    cpu: float
    """Processor seconds."""

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds

    @property
    def cost(self) -> float:
        """Processor seconds an item."""
        return self.cpu / self.items


def limit(package: str, corpus: Corpus, kind: str, seconds: float) -> Measured:
    """The bare loop, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return Measured(*pool.apply(_bare_loop, (package, corpus, kind, seconds)))


def _bare_loop(folder: str, corpus: Corpus, kind: str, seconds: float) -> tuple[int, float, float]:
    import numpy as np

    from models.images import decode_whole, open_image
    from models.inference import embed_images, embed_texts

    torch.set_num_threads(1)
    package = load_package(Path(folder))
    size, words = package.preprocessor.image_size, package.preprocessor.max_caption_words

    def encode(start: int) -> None:
        chosen = [(start + place) % len(corpus.text) for place in range(BATCH)]
        if kind == "text":
            texts = [clean_caption(corpus.text[place], words) for place in chosen]
            embed_texts(package, package.tokenizer.encode_rows(texts, package.preprocessor.max_tokens))
            return
        pixels = np.empty((BATCH, size, size, 3), np.uint8)
        for row, place in enumerate(chosen):
            decode_whole(open_image(corpus.image[place], 10**8, 1), pixels[row])
        embed_images(package, pixels)

    done = [0] * THREADS
    for _ in range(2):
        encode(0)
    started, cpu = time.perf_counter(), time.process_time()

    def loop(thread: int) -> None:
        while time.perf_counter() - started < seconds:
            encode(done[thread])
            done[thread] += BATCH

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done), time.perf_counter() - started, time.process_time() - cpu


def ask(service: Service, bodies: list[bytes], inputs: int, clients: int, seconds: float) -> dict[str, Any]:
    """Load by so many clients for some seconds, after a second of the same."""
    requests = [request(service.url, "/v1/embeddings", body) for body in bodies]

    def run(length: float) -> Tally:
        end = time.perf_counter() + length
        work = until(lambda: time.perf_counter() > end, forever(requests))
        return asyncio.run(closed_loop(service.urls, work, clients, Tally()))

    run(1.0)
    before, batches, own, started = service.cpu_seconds(), _batches(service), time.process_time(), time.perf_counter()
    tally = run(seconds)
    length = time.perf_counter() - started
    own, cpu, after = time.process_time() - own, spent(before, service.cpu_seconds()), _batches(service)
    if set(tally.statuses) != {200}:
        raise RuntimeError(f"replies other than 200: {dict(tally.statuses)}")
    items = tally.statuses[200] * inputs
    measured = Measured(items, length, cpu)
    return {
        "clients": clients,
        "items_per_second": measured.rate,
        "cpu_ms_per_item": 1000 * measured.cost,
        "p50_ms": 1000 * tally.percentile(50),
        "p95_ms": 1000 * tally.percentile(95),
        "p99_ms": 1000 * tally.percentile(99),
        "mean_batch": (after[0] - before_or(batches, 0)) / max(after[1] - before_or(batches, 1), 1) if after else None,
        "load_generator_cpu_us_per_request": 1e6 * own / tally.statuses[200],
    }


def before_or(batches: tuple[float, float] | None, place: int) -> float:
    """A figure of an earlier look, 0 where there was none."""
    return batches[place] if batches else 0.0


def _batches(service: Service) -> tuple[float, float] | None:
    """(inputs, batches) so far, as the service's own metrics have it; None where it has none."""
    try:
        with urlopen(f"{service.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return None
    found = [sum(float(line.split()[-1]) for line in lines if line.startswith(f"te_batch_next_size_{part}{{"))
             for part in ("sum", "count")]  # fmt: skip
    return (found[0], found[1]) if found[1] else None


def shares(package: str, corpus: Corpus, service: Service, options: argparse.Namespace, sizes: tuple[int, ...]) -> Any:
    """Each kind and request size at saturation against the limit of that moment."""
    table: dict[str, Any] = {}
    for kind, inputs in itertools.product(KINDS, sizes):
        bodies, rounds = corpus.bodies(kind, inputs), []
        for _ in range(options.rounds):
            bare = limit(package, corpus, kind, options.seconds)
            ours = ask(service, bodies, inputs, RISING[inputs][-1], options.seconds)
            rounds.append(ours | {
                "limit_items_per_second": bare.rate,
                "limit_cpu_ms_per_item": 1000 * bare.cost,
                "share_of_items_per_second": ours["items_per_second"] / bare.rate,
                "share_by_cpu": 1000 * bare.cost / ours["cpu_ms_per_item"],
            })  # fmt: skip
        entry = {key: statistics.median(row[key] for row in rounds) for key in rounds[0] if rounds[0][key] is not None}
        table[f"{kind} x{inputs}"] = entry | {"rounds": rounds}
        _tell(f"{kind} x{inputs}", entry)
    return table


def rising(corpus: Corpus, service: Service, seconds: float) -> dict[str, Any]:
    """Throughput and latency as concurrency rises."""
    table: dict[str, Any] = {}
    for kind, inputs in itertools.product(KINDS, RISING):
        bodies = corpus.bodies(kind, inputs)
        table[f"{kind} x{inputs}"] = [ask(service, bodies, inputs, clients, seconds) for clients in RISING[inputs]]
        for row in table[f"{kind} x{inputs}"]:
            _tell(f"{kind} x{inputs}", row)
    return table


def _tell(name: str, row: dict[str, Any]) -> None:
    figures = {key: round(value, 3) for key, value in row.items() if isinstance(value, int | float)}
    sys.stderr.write(f"  {name}: {figures}\n")


def servers(package: str) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Service]], tuple[int, ...]]]:
    """(name, how it is started, request sizes) of each server."""
    port = free_port()
    plain = [sys.executable, "-m", "benchmarks.plain_server", package, "--port", str(port)]
    direct = [sys.executable, "-m", "benchmarks.direct_ingress", package]
    yield "service", lambda: triptych_serve([package], port), (1, 32)
    switches = direct_ingress.switches()
    yield "direct", lambda: server(direct, direct_ingress.PORTS, direct_ingress.SIGN, switches), (1, 32)
    yield "plain", lambda: server(plain, [port], "INFO:     Uvicorn running"), (1,)


def main() -> None:
    """Measure, write RESULT, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", help="an encoder package (default: random weights of the small size)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["service", "direct", "plain"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ |= COMPUTE  # the allocator's settings too: the limit and the plain server get what the service has
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "data")
        package = options.package or str(Path(folder) / "package")
        if not options.package:
            make_package(Path(package), corpus.text)
        result: dict[str, Any] = {"machine": machine(), "seconds": options.seconds, "servers": {}}
        for name, start, sizes in servers(package):
            if name in options.only:
                sys.stderr.write(f"{name}\n")
                with start() as service:
                    result["servers"][name] = {"at saturation": shares(package, corpus, service, options, sizes)}
                    if name == "service":
                        result["servers"][name]["rising"] = rising(corpus, service, options.seconds)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result["servers"], indent=1) + "\n")


if __name__ == "__main__":
    main()
