"""The record of a promotion or a rollback: what each step did, in the log and in MLflow."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from models.config import InputError
from models.redact import redact
from pipelines.lineage import commit
from pipelines.tracking.registry import Registry

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """One step of a promotion or a rollback."""

    title: str
    outcome: Literal["done", "skipped", "refused"]
    text: str


@dataclass
class Promotion:
    """A promotion or rollback, step by step; stored as `promotion.json` among the artifacts of the candidate's run."""

    name: str
    model: str
    action: Literal["promote", "rollback"] = "promote"
    run_folder: str = ""
    run_id: str = ""
    data: str = ""
    embedding_space: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    champion_metrics: dict[str, float] = field(default_factory=dict)
    replaces: int | None = None
    """The version that was champion before."""
    version: int | None = None
    """The version that is champion now; None unless it is."""
    code: str = field(default_factory=commit)
    started: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    steps: list[Step] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Path of this record among the run's artifacts."""
        return f"promotions/{self.started}-{self.name}/promotion.json"

    def text(self) -> str:
        """One line a step: title, outcome, notes."""
        return "\n".join(f"{step.title:9} {step.outcome:8} {step.text}" for step in self.steps)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """A step, done unless the block raises; its notes are appended to the list that it gets."""
        notes: list[str] = []
        try:
            yield notes
        except BaseException as error:
            self._add(Step(title, "refused", redact(str(error)) or type(error).__name__))
            raise
        self._add(Step(title, "done", redact("; ".join(notes))))

    def skip(self, title: str, text: str) -> None:
        """Record a step that was left out, and why."""
        self._add(Step(title, "skipped", text))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        logger.info("%s %s: %s", step.title, step.outcome, step.text)


class PromotionRefused(InputError):
    """A promotion or rollback that was not made; one line with the step and the reason."""

    def __init__(self, promotion: Promotion, error: InputError) -> None:
        at = next((step.title for step in reversed(promotion.steps) if step.outcome == "refused"), "start")
        super().__init__(f"{promotion.action} {promotion.name}: refused at {at}: {error}")
        self.promotion = promotion


@contextlib.contextmanager
def recorded(promotion: Promotion, registry: Registry) -> Iterator[None]:
    """Store the record with the run however the block ends; raises PromotionRefused for an InputError in it."""
    try:
        yield
    except InputError as error:
        raise PromotionRefused(promotion, error) from error
    finally:
        if promotion.run_id:
            try:
                registry.record(promotion.run_id, promotion.place, asdict(promotion))
            except InputError as error:
                logger.warning("%s is not in MLflow: %s", promotion.place, error)
