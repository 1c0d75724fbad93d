"""Settings of a service: one frozen tree, from `serving/serve.yaml` or the command line."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.config import Config


class HttpConfig(Config):
    """Limits of requests: sizes, counts and times."""

    max_body_mib: PositiveFloat = 32
    """Largest body of a request, MiB."""
    max_inputs: PositiveInt = 256
    """Most inputs (texts and images) of a request."""
    max_images: PositiveInt = 64
    """Most images of a request."""
    max_image_mib: PositiveFloat = 16
    """Largest encoded image, MiB."""
    max_pixels: PositiveInt = 64_000_000
    """Most pixels of an image; read from its header, before it is decoded."""
    max_text: PositiveInt = 8192
    """Most characters of a text; the model reads its first `max_caption_words` words."""
    max_top_k: PositiveInt = 200
    """Most hits of a search."""
    max_documents: PositiveInt = 100
    """Most documents of a re-rank request."""
    max_requests: PositiveInt = 1024
    """Most requests that one gateway has in progress at once; more get 429 before their body is read."""
    max_held_mib: PositiveFloat = 256
    """Most bytes of request bodies in a gateway's memory at once, MiB; a request that would exceed it gets 429."""
    deadline: PositiveFloat = 30
    """Seconds after which a request is given up with 504."""
    body_seconds: PositiveFloat = 20
    """Seconds that a body may take to arrive."""
    api_keys: str = Field("", examples=["keys.txt"])
    """File of keys, a line each (`label:key` or `key`); TRIPTYCH_API_KEYS, separated by commas, comes first."""
    url_images: tuple[str, ...] = Field((), examples=[("images.example.com", "*.example.com")])
    """Hosts that images may be fetched from (`images.example.com`, `*.example.com`); none: no URLs are fetched."""
    url_seconds: PositiveFloat = 5
    """Seconds that fetching an image may take, redirects included."""


class BatchConfig(Config):
    """How inputs of several requests are batched before an encoder is called."""

    max_items: PositiveInt = 64
    """Most inputs of one forward pass."""
    linger: NonNegativeFloat = 0.004
    """Seconds to wait for more inputs while other batches are being encoded; an idle encoder is called at once."""
    inflight: PositiveInt = 2
    """Batches of one gateway that are being encoded at once. All gateways together should keep every pass of the
    replicas busy and one more waiting; more only makes batches smaller."""
    queue_share: PositiveFloat = 0.5
    """Share of the deadline that a request may wait in the queue: one that would wait longer gets 429."""
    max_queue: PositiveInt = 4096
    """Most inputs that wait in one gateway, however fast the encoder is."""


class ReplicaConfig(Config):
    """Processes of one deployment; Ray Serve scales it by itself where `max_replicas` is above `replicas`."""

    replicas: PositiveInt = 1
    """Processes, or the fewest of them."""
    max_replicas: NonNegativeInt = Field(0, examples=[4])
    """Most processes; 0: no scaling."""
    target_batches: PositiveFloat = 3
    """Batches in progress per process that scaling aims at."""
    num_cpus: NonNegativeFloat = 0.1
    """Logical CPUs that Ray sets aside for each."""
    num_gpus: NonNegativeFloat = 0
    """GPUs for each; a fraction shares one."""
    threads: PositiveInt = 1
    """PyTorch threads of a forward pass."""
    passes: PositiveInt = 2
    """Forward passes at once in a process."""


class VersionsConfig(Config):
    """Following a registered model's alias."""

    poll: PositiveFloat = 5
    """Seconds after which the alias is resolved again."""
    keep: NonNegativeInt = Field(1, examples=[0])
    """1: the version before stays loaded, so that going back is instant; 0: it goes once it is drained."""
    start_timeout: PositiveFloat = 300
    """Seconds that a new version may take to load, warm up and answer its health vectors."""
    tolerance: PositiveFloat = 1e-5
    """Largest difference to the stored health vectors; bfloat16 needs 0.02 or so."""


class ServingConfig(Config):
    """Settings of the whole service."""

    model: str
    """A run folder, a checkpoint, a package, or models:/NAME@ALIAS, which is followed."""
    index: str = Field("", examples=["s3://bucket/index/7"])
    """Index for search; may contain {space}; empty: the registry tag triptych.index_uri of each version."""
    host: str = Field("127.0.0.1", examples=["0.0.0.0"])
    """Address to listen on."""
    port: NonNegativeInt = 8000
    """Port to listen on, shared by the gateways of a machine."""
    allow_open: bool = False
    """Listen on other addresses than loopback without any key."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward passes; bf16 is for GPUs."""
    gateways: PositiveInt = 2
    """Processes that speak HTTP."""
    door: HttpConfig = HttpConfig()  # called so because of the flags --door.*, which users have in their scripts
    text_batch: BatchConfig = BatchConfig()
    image_batch: BatchConfig = BatchConfig()
    text: ReplicaConfig = ReplicaConfig()
    image: ReplicaConfig = ReplicaConfig()
    matcher: ReplicaConfig = ReplicaConfig()
    search: ReplicaConfig = ReplicaConfig()
    versions: VersionsConfig = VersionsConfig()
