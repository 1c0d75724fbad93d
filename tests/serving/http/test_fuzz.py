"""Requests made from the OpenAPI document, good and bad: never a 5xx, and every reply as the document says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.config import (
    ChecksConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.openapi.loaders import from_asgi
from schemathesis.specs.openapi.schemas import OpenApiSchema

from serving.http.app import HttpApp
from tests.support.stand_in import StandInPool, StandInVersion

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
OPERATIONS = (
    ("/v1/embeddings", "POST"),
    ("/v1/search", "POST"),
    ("/v1/rerank", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{id}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
)
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.fixture(scope="module")
def document() -> OpenApiSchema:
    """The service's own document; a text or an image of the right form may still be refused with 400 or 413."""
    accepted = PositiveDataAcceptanceConfig(expected_statuses=["2xx", "400", "404", "413"])
    project = ProjectConfig(checks=ChecksConfig(positive_data_acceptance=accepted))
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return from_asgi("/openapi.json", HttpApp(StandInPool(StandInVersion())), config=config)


def check(document: OpenApiSchema, path: str, method: str, examples: int, same: bool) -> None:
    """So many requests to one operation, half of them against its schema."""
    operation = document[path][method]
    modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

    @given(case=st.one_of(modes))
    @settings(max_examples=examples, deadline=None, derandomize=same, database=None, suppress_health_check=QUIET)
    def replies_as_it_says(case: schemathesis.Case) -> None:
        case.call_and_validate()

    replies_as_it_says()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_replies_are_as_the_document_says(document: OpenApiSchema, path: str, method: str) -> None:
    check(document, path, method, examples=15 if method == "POST" else 5, same=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_replies_are_as_the_document_says_at_length(document: OpenApiSchema, path: str, method: str) -> None:
    check(document, path, method, examples=500 if method == "POST" else 50, same=False)


def test_no_operation_of_the_document_is_left_out(document: OpenApiSchema) -> None:
    listed = {(path, method.upper()) for path, methods in document.raw_schema["paths"].items() for method in methods}
    assert listed == set(OPERATIONS)
