"""Requests and replies of the HTTP interface (docs/formats.md, contract 7).

Names and shapes follow OpenAI, vLLM and Cohere."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.interfaces import Modality

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
"""A red image of one pixel, for examples."""
TOKENS = "token_ids"
"""Type of the validation error of inputs that are token ids: answered by 400, not 422."""


class Body(BaseModel):
    """Immutable, refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _no_tokens(value: Any) -> Any:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        first = first[0] if first else 0
    if isinstance(first, int):
        raise PydanticCustomError(TOKENS, "token ids are not read here; send texts, or images as data URLs")
    return value


class ImageUrl(Body):
    """Where an image is."""

    url: str
    """A data URL; other URLs only where the service is set to fetch from their host."""
    detail: str | None = None
    """Ignored."""


class TextPart(Body):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Body):
    """A chat message."""

    role: str
    """Not read: it does not change the vector."""
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1, fail_fast=True)
        ]
    )


class EmbeddingRequest(Body):
    """Texts and images to embed: `input`, or `messages` in vLLM's form (all of them together one input)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["input"]}, {"required": ["messages"]}],
            "examples": [
                {"input": "a red circle"},
                {"input": ["a red circle", PIXEL], "encoding_format": "base64"},
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]},
            ],
        }
    )

    model: str | None = None
    """The service's name, see `/v1/models`; may be left out."""
    input: Annotated[str | Annotated[list[str], Field(min_length=1, fail_fast=True)], BeforeValidator(_no_tokens)] = ""
    """A text or image, or a list of them; the vectors come in the same order."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] = []
    """Their texts are joined by line ends; an image stands alone."""
    modality: Literal["auto", "text", "image"] = "auto"
    """auto: what begins with `data:image/` is an image."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32."""
    dimensions: int | None = None
    """Only the model's own."""
    user: str | None = None
    """Ignored."""

    @model_validator(mode="after")
    def _one_form(self) -> "EmbeddingRequest":
        if ("input" in self.model_fields_set) == ("messages" in self.model_fields_set):
            raise PydanticCustomError("one_of", "give either input or messages")
        return self


class Embedding(Body):
    """The vector of an input."""

    object: Literal["embedding"]
    index: int
    """Position of the input."""
    embedding: list[float] | str
    """Unit vector, or its base64."""


class Usage(Body):
    """Counts of what was read."""

    prompt_tokens: int
    """Tokens of the texts."""
    total_tokens: int


class EmbeddingReply(Body):
    """Vectors in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    embedding_space: str
    usage: Usage


class SearchRequest(Body):
    """Nearest neighbours in the index, of a text, an image, or one of its own rows."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["text"]}, {"required": ["image"]}, {"required": ["id"]}],
            "examples": [
                {"text": "a red circle", "top_k": 5},
                {"image": PIXEL, "target": "text"},
                {"id": "red-circle", "side": "image"},
            ],
        }
    )

    model: str | None = None
    """The service's name; may be left out."""
    text: str = ""
    """A text to search for."""
    image: str = ""
    """An image to search for, as a data URL."""
    id: str = ""
    """A row of the index, to find its neighbours; it is its own nearest one."""
    side: Modality = "image"
    """Modality of that row's vector."""
    target: Modality = "image"
    """Modality of the vectors that are searched."""
    top_k: Annotated[int, Field(ge=1)] = 10
    """How many hits."""
    rerank: bool = False
    """Order the nearest 50 by the fusion encoder: texts against images; `score` is then the match probability.

    A hit whose image cannot be read any more goes last, with score 0.
    """

    @model_validator(mode="after")
    def _one_query(self) -> "SearchRequest":
        if len(self.model_fields_set & {"text", "image", "id"}) != 1:
            raise PydanticCustomError("one_of", "give one of text, image and id")
        return self


class SearchHit(Body):
    """A row of the index."""

    object: Literal["search_hit"]
    index: int
    """Position among the hits."""
    id: str
    score: float
    """Cosine; with `rerank` the match probability."""
    caption: str
    thumbnail: str | None
    """A small JPEG as a data URL."""


class SearchReply(Body):
    """Hits, the nearest first."""

    object: Literal["list"]
    data: list[SearchHit]
    model: str
    embedding_space: str


class RerankRequest(Body):
    """Documents to order by how well they fit a query; each is a text, or an image as a data URL."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "a red circle", "documents": ["a blue square", "a red disc"], "top_n": 1},
                {"query": "a red circle", "documents": [PIXEL]},
            ]
        }
    )

    model: str | None = None
    """The service's name; may be left out."""
    query: str
    documents: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    """How many results; all where it is left out."""
    return_documents: bool = False
    """Send the documents back too."""


class RerankDocument(Body):
    """A document, where the request wants it sent back."""

    text: str | None = None
    image: str | None = None
    """The data URL."""


class RerankResult(Body):
    """A document's score."""

    index: int
    """Position of the document in the request."""
    relevance_score: float
    document: RerankDocument | None = None


class RerankReply(Body):
    """Results, the best first."""

    results: list[RerankResult]
    score: Literal["match_probability", "cosine"]
    """What the scores are: of the fusion encoder where query and all documents are of different modality."""
    model: str
    embedding_space: str
    usage: Usage


class ErrorDetail(Body):
    """An error."""

    message: str
    type: str
    param: str | None
    """The part of the request that it is about."""
    code: str


class ErrorReply(Body):
    """The shape of every error."""

    error: ErrorDetail
