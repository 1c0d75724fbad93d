"""What a sweep searches: dotted keys of the configuration with their candidates, all checked before anything starts.

Ready spaces go by name; a file is JSON, `{"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}, "seed": [0, 1]}`.
"""

import difflib
import json
import math
from collections.abc import Mapping
from functools import reduce
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import ValidationError

from models.config import InputError
from models.objectives import ScheduleState, assigns, check_codebook, coefficients
from pipelines import storage
from pipelines.config import ExperimentConfig

DimensionKind = Literal["grid", "choice", "uniform", "loguniform"]
"""How candidates are given: `grid` and `choice` list them, `uniform` and `loguniform` bound a range."""
LISTS: tuple[DimensionKind, ...] = ("grid", "choice")
SHARED = ("preset", "out", "name", "train_data", "val_data", "optim.epochs", "optim.min_samples")
SHARED_SECTIONS = ("compute", "validation", "checkpoints", "progress", "pairs")
"""Keys and sections that no sweep searches: trials that differ in data, protocol or length cannot be compared."""
SEARCHED_PAIRS = ("pairs.augment", "pairs.crop_area_min")
"""Keys of the section `pairs` that can be searched all the same: validation does not depend on them."""
DEFAULT = "temperature-codebook"
"""Name of the ready space that is searched where a preset has a codebook and no space is named."""


class Dimension(NamedTuple):
    """The candidates of one key: a list, or the bounds of a range."""

    kind: DimensionKind
    values: list[Any]

    @property
    def is_list(self) -> bool:
        """Whether the candidates can be counted."""
        return self.kind in LISTS

    def json(self) -> dict[str, list[Any]]:
        """{kind: values}, as a space file and `sweep.json` have it."""
        return {self.kind: self.values}


Space = dict[str, Dimension]
"""{dotted key: its candidates}."""
Point = dict[str, Any]
"""{dotted key: value}."""


def read_space(name: str, base: ExperimentConfig) -> Space:
    """The ready space or the file of that name, checked against `base`; raises InputError in one line.

    An empty name is the default: temperature and codebook size, or temperature alone where there is no codebook.
    """
    if not name:
        name = DEFAULT if assigns(base.objective) else "temperature"
    ready = _ready(base)
    if name in ready:
        space = ready[name]
        if "codebook" in name:
            _require_codebook("objective.codebook", base, {})
    elif storage.exists(name):
        space = _read_file(name)
    else:
        raise InputError(f"--space {name}: neither a file nor one of {', '.join(ready)}")
    return _checked(space, base)


def check_point(point: Point, base: ExperimentConfig) -> ExperimentConfig:
    """The configuration at a point; raises InputError naming the point where it cannot be trained."""
    shown = " ".join(f"{key}={value}" for key, value in point.items())
    try:
        experiment = base.override(point)
        if not coefficients(experiment.objective, ScheduleState(experiment.objective.alpha)):
            raise InputError("every weight is 0, so nothing would be learnt")
        check_codebook(experiment.objective, experiment.optim.batch_size)
    except ValidationError as error:
        raise InputError(f"--space: {shown}: {_reason(error)}") from None
    except InputError as error:
        raise InputError(f"--space: {shown}: {error}") from None
    return experiment


def grid_points(space: Space, base: ExperimentConfig, trials: int | None = None, seed: int = 0) -> list[Point]:
    """Every combination of the lists, in order; with fewer `trials` so many of them, drawn by `seed`.

    Raises InputError where a key has a range.
    """
    for key, dimension in space.items():
        if not dimension.is_list:
            raise InputError(f"--search grid: {key} is a range ({dimension.kind}); list its values, or --search random")
    points = []
    seen = set[str]()
    for values in product(*(dimension.values for dimension in space.values())):
        point = dict(zip(space, values, strict=True))
        identity = _identity(check_point(point, base))
        if identity not in seen:
            seen.add(identity)
            points.append(point)
    if trials is not None and trials < len(points):
        chosen = np.random.default_rng(seed).permutation(len(points))[:trials]
        points = [points[place] for place in chosen]
    return points


def random_points(space: Space, base: ExperimentConfig, trials: int, seed: int = 0) -> list[Point]:
    """`trials` points drawn by `seed`, no two alike; fewer where there are no more."""
    if all(dimension.is_list for dimension in space.values()):
        return grid_points(space, base, trials, seed)
    random = np.random.default_rng(seed)
    points: list[Point] = []
    for _ in range(100 * trials):
        if len(points) == trials:
            break
        point = {key: _draw(dimension, random) for key, dimension in space.items()}
        check_point(point, base)
        if point not in points:
            points.append(point)
    return points


def combinations(space: Space) -> int | None:
    """Number of combinations of the space's lists; None where a key has a range."""
    lists = all(dimension.is_list for dimension in space.values())
    return math.prod(len(dimension.values) for dimension in space.values()) if lists else None


def tune_domains(space: Space) -> dict[str, Any]:
    """The space in Ray Tune's own terms, for its searchers."""
    from ray import tune

    domains = {}
    for key, (kind, values) in space.items():
        whole = all(isinstance(value, int) for value in values)
        if kind in LISTS:
            domains[key] = tune.choice(values)
        elif kind == "uniform":
            domains[key] = tune.randint(values[0], values[1] + 1) if whole else tune.uniform(*values)
        else:
            domains[key] = tune.lograndint(values[0], values[1] + 1) if whole else tune.loguniform(*values)
    return domains


def _draw(dimension: Dimension, random: np.random.Generator) -> Any:
    """A candidate; from a range a number of four significant digits, whole where both bounds are."""
    kind, values = dimension
    if kind in LISTS:
        return values[int(random.integers(len(values)))]
    low, high = values
    drawn = random.uniform(low, high) if kind == "uniform" else math.exp(random.uniform(math.log(low), math.log(high)))
    if isinstance(low, int):
        return int(np.clip(math.floor(drawn + 0.5), low, high))
    return float(np.clip(float(f"{drawn:.4g}"), low, high))


def _identity(experiment: ExperimentConfig) -> str:
    """A text that is equal for configurations that train alike: `clamp` has no effect on a fixed temperature."""
    if not experiment.objective.temperature.learn:
        experiment = experiment.override({"objective.temperature.clamp": True})
    return experiment.model_dump_json()


def _ready(base: ExperimentConfig) -> dict[str, Space]:
    """The spaces that have a name, around the values of `base`."""
    objective = base.objective
    codebook, temperature = objective.codebook, objective.temperature
    starts = _grid(*(min(max(temperature.start * by, temperature.min), temperature.max) for by in (0.5, 1.0, 2.0)))
    sizes = Dimension("grid", [max(codebook.size // 4, 1), codebook.size, 4 * codebook.size])
    weights = {name: weight for name, weight in objective.weights.model_dump().items() if weight}
    return {
        "temperature": {
            "objective.temperature.start": starts,
            "objective.temperature.learn": Dimension("grid", [False, True]),
            "objective.temperature.clamp": Dimension("grid", [True, False]),
        },
        "codebook": {
            "objective.codebook.size": sizes,
            "objective.codebook.eps": _grid(*(codebook.eps * by for by in (0.6, 1.0, 1.6))),
            "objective.codebook.tau": _grid(*(codebook.tau * by for by in (1.0, 1.5, 2.0))),
            "objective.codebook.balance": _grid(codebook.balance, 0.8),
            "objective.codebook.beta_same": _grid(codebook.beta_same, 0.5),
        },
        "weights": {
            f"objective.weights.{name}": _grid(*(weight * by for by in (0.5, 1.0, 2.0)))
            for name, weight in weights.items()
        },
        DEFAULT: {"objective.temperature.start": starts, "objective.codebook.size": sizes},
    }


def _grid(*values: float) -> Dimension:
    return Dimension("grid", list(dict.fromkeys(float(f"{value:.4g}") for value in values)))


def _read_file(uri: str) -> Space:
    """The file's dimensions; raises InputError where it is not of the form that this module's docstring shows."""
    try:
        tree = json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise InputError(f"--space {uri}: not JSON ({error})") from None
    if not isinstance(tree, dict) or not tree:
        raise InputError(f'--space {uri}: needs an object such as {{"optim.learning_rate": [0.001, 0.003]}}')
    return {key.replace("-", "_"): _dimension(key, entry) for key, entry in tree.items()}


def _dimension(key: str, entry: Any) -> Dimension:
    """The candidates of a key, from a list or from {kind: list}; raises InputError for any other form."""
    if isinstance(entry, list):
        entry = {"grid": entry}
    kinds = get_args(DimensionKind)
    if not isinstance(entry, dict) or len(entry) != 1 or not entry.keys() <= {*kinds}:
        raise InputError(f"--space: {key}: needs a list, or one of {', '.join(kinds)} with a list")
    ((kind, values),) = entry.items()
    if not isinstance(values, list) or not values:
        raise InputError(f"--space: {key}: {kind} needs a list of values, got {json.dumps(values)}")
    if kind not in LISTS:
        _require_bounds(key, kind, values)
    return Dimension(kind, values)


def _require_bounds(key: str, kind: DimensionKind, values: list[Any]) -> None:
    """Raises InputError unless the values are the two bounds of a range of that kind."""
    if len(values) != 2 or not all(map(_is_number, values)) or not values[0] < values[1]:
        raise InputError(f"--space: {key}: {kind} needs two numbers, the smaller one first, got {values}")
    if kind == "loguniform" and values[0] <= 0:
        raise InputError(f"--space: {key}: loguniform needs bounds above 0, got {values}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(space: Space, base: ExperimentConfig) -> Space:
    """The space with values as the configuration reads them; raises InputError for a key or any value that is wrong."""
    checked: Space = {}
    for key, dimension in space.items():
        _require_searchable(key, base)
        if key.startswith("objective.codebook."):
            _require_codebook(key, base, space)
        checked[key] = _read_values(key, dimension, base)
    # Every candidate is tried by itself, whether a search would draw it or not, so that no trial is lost to it later.
    # Those of the codebook are tried together with the weights by which the space itself turns the codebook on.
    for key, dimension in checked.items():
        around = _with_codebook(base, checked) if key.startswith("objective.codebook.") else base
        for value in dimension.values:
            check_point({key: value}, around)
    return checked


def _require_searchable(key: str, base: ExperimentConfig) -> None:
    """Raises InputError for a key that the configuration lacks, or that is the same for all trials."""
    known = [key for key, _, value in base.leaves() if not isinstance(value, dict)]  # a backbone fills in its own
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `triptych train PRESET --help` lists all"
        raise InputError(f"--space: {key}: no such key{hint}")
    section = key.partition(".")[0]
    if key in SHARED or (section in SHARED_SECTIONS and key not in SEARCHED_PAIRS):
        raise InputError(f"--space: {key}: is the same for all trials, or they could not be compared; set the flag")


def _read_values(key: str, dimension: Dimension, base: ExperimentConfig) -> Dimension:
    """The dimension with values as the configuration reads them; raises InputError for wrong or equal ones."""
    kind, values = dimension
    read = [_value(key, value, base) for value in values]
    if kind not in LISTS and not all(map(_is_number, read)):
        raise InputError(f"--space: {key}: takes no number, so {kind} does not fit; list its values")
    if len({json.dumps(value) for value in read}) < len(read):
        raise InputError(f"--space: {key}: a value stands twice in {values}")
    return Dimension(kind, read)


def _value(key: str, value: Any, base: ExperimentConfig) -> Any:
    """A candidate as the configuration reads it, as JSON has it: 1 becomes 1.0 for a float, a tuple a list."""
    try:
        experiment = base.override({key: value})
    except ValidationError as error:
        raise InputError(f"--space: {key} {json.dumps(value)}: {_reason(error)}") from None
    read: Any = reduce(getattr, key.split("."), experiment)
    return list(read) if isinstance(read, tuple) else read


def _require_codebook(key: str, base: ExperimentConfig, space: Mapping[str, Dimension]) -> None:
    """Raises InputError where neither the preset nor any point of the space assigns samples to codes."""
    if not assigns(_with_codebook(base, space).objective):
        raise InputError(
            f"--space: {key}: {base.preset or 'the configuration'} has no codebook (objective.weights.code and .ot are "
            "0); take a preset of codis or both"
        )


def _with_codebook(base: ExperimentConfig, space: Mapping[str, Dimension]) -> ExperimentConfig:
    """`base` with the largest weight that the space has for each of the codebook's terms."""
    keys = [key for key in ("objective.weights.code", "objective.weights.ot") if key in space]
    return base.override({key: max(space[key].values) for key in keys})


def _reason(error: ValidationError) -> str:
    """Pydantic's messages on one line, without the field's path, which our message has already."""
    return " or ".join(dict.fromkeys(entry["msg"].lower() for entry in error.errors()))
