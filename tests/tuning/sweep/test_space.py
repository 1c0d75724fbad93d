"""What a sweep searches: every mistake is one line that names key and value, before anything starts."""

import json

import pytest

from models.config import InputError
from pipelines.config import PRESETS
from tuning.sweep.space import (
    DEFAULT,
    Dimension,
    check_point,
    combinations,
    grid_points,
    random_points,
    read_space,
    tune_domains,
)

BOTH, CLIP = PRESETS["both-dual-tiny"], PRESETS["clip-tiny"]


@pytest.fixture
def write(tmp_path):
    """Writes a space file; returns its path."""

    def write_space(space: object) -> str:
        path = tmp_path / "space.json"
        path.write_text(space if isinstance(space, str) else json.dumps(space))
        return str(path)

    return write_space


# Ready spaces


def test_the_default_is_a_grid_of_three_temperatures_and_three_codebook_sizes():
    space = read_space("", BOTH)
    assert space == read_space(DEFAULT, BOTH)
    size, start = BOTH.objective.codebook.size, BOTH.objective.temperature.start
    assert space["objective.codebook.size"].values == [size // 4, size, 4 * size]
    assert start in space["objective.temperature.start"].values
    points = grid_points(space, BOTH)
    assert len(points) == 9 == combinations(space)
    pairs = {(p["objective.temperature.start"], p["objective.codebook.size"]) for p in points}
    assert len(pairs) == 9 and (start, size) in pairs


def test_a_preset_without_codebook_searches_the_temperature_by_default():
    assert set(read_space("", CLIP)) == {f"objective.temperature.{name}" for name in ("start", "learn", "clamp")}


@pytest.mark.parametrize("name", ["temperature", "codebook", "weights", DEFAULT])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith(("codis", "both"))])
def test_every_ready_space_fits_every_preset_with_a_codebook(name, preset):
    base = PRESETS[preset]
    space = read_space(name, base)
    points = random_points(space, base, 3)
    assert len(points) == 3 and all(set(point) == set(space) for point in points)


def test_a_fixed_temperature_is_not_tried_with_and_without_clamp():
    points = grid_points(read_space("temperature", CLIP), CLIP)
    fixed = [point for point in points if not point["objective.temperature.learn"]]
    assert len(fixed) == 3 and len(points) == 9


def test_weights_of_terms_that_the_preset_lacks_are_not_searched():
    assert set(read_space("weights", CLIP)) == {"objective.weights.cma"}


# Mistakes


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("nonsense", "not JSON"),
        ([], "needs an object"),
        ({}, "needs an object"),
        ({"optim.learning_rates": [1]}, "optim.learning_rates: no such key; did you mean optim.learning_rate"),
        ({"optim": [1]}, "optim: no such key"),
        ({"encoder.text.architecture": [{"width": 8}]}, "encoder.text.architecture: no such key"),
        ({"optim.learning_rate": 1}, "optim.learning_rate: needs a list"),
        ({"optim.learning_rate": {"normal": [0, 1]}}, "optim.learning_rate: needs a list, or one of grid, choice"),
        ({"optim.learning_rate": []}, "optim.learning_rate: grid needs a list of values"),
        ({"optim.learning_rate": [0.001, -0.5]}, "optim.learning_rate -0.5: input should be greater than 0"),
        ({"optim.learning_rate": [0.001, "fast"]}, 'optim.learning_rate "fast": input should be a valid number'),
        ({"optim.learning_rate": {"uniform": [0.1]}}, "uniform needs two numbers"),
        ({"optim.learning_rate": {"uniform": [0.2, 0.1]}}, "the smaller one first, got [0.2, 0.1]"),
        ({"optim.learning_rate": {"loguniform": [0.0, 0.1]}}, "loguniform needs bounds above 0"),
        ({"optim.warmup": {"uniform": [0.0, 1.5]}}, "optim.warmup 1.5: input should be less than 1"),
        ({"optim.learning_rate": [0.001, 1e-3]}, "a value stands twice"),
        ({"objective.codebook.size": [64, 0.5]}, "objective.codebook.size 0.5: input should be a valid integer"),
        ({"objective.codebook.solver": ["sinkhorn", "magic"]}, 'objective.codebook.solver "magic": input should be'),
        ({"objective.temperature.learn": {"uniform": [0, 1]}}, "takes no number"),
        ({"objective.codebook.dead.enabled": [True], "objective.queue.size": [0, 64]}, "set objective.queue.size"),
        ({"objective.codebook.koleo": [0.1], "objective.weights.koleo": [0.2]}, "differ; give one of them"),
        ({"val_data": ["a", "b"]}, "val_data: is the same for all trials"),
        ({"optim.epochs": [1, 2]}, "optim.epochs: is the same for all trials"),
        ({"validation.pairs": [10, 20]}, "validation.pairs: is the same for all trials"),
        ({"pairs.max_caption_words": [10, 20]}, "pairs.max_caption_words: is the same for all trials"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_key_value_and_reason(write, space, says):
    with pytest.raises(InputError) as caught:
        grid_points(read_space(write(space), BOTH), BOTH)
    assert says in str(caught.value) and str(caught.value).startswith("--space") and "\n" not in str(caught.value)


def test_every_value_is_checked_whether_it_would_be_drawn_or_not(write):
    values = [0.001 + number / 1e6 for number in range(500)] + [0]
    with pytest.raises(InputError, match=r"optim\.learning_rate 0: input should be greater than 0"):
        read_space(write({"optim.learning_rate": {"choice": values}}), BOTH)


def test_points_are_checked_as_a_whole(write):
    space = {f"objective.weights.{term}": [0.0, 1.0] for term in ("cma", "imc", "lmi", "code", "ot")}
    checked = read_space(write(space), BOTH)  # each 0 is fine beside the preset's other weights
    with pytest.raises(InputError, match=r"weights\.cma=0\.0 .*every weight is 0"):
        grid_points(checked, BOTH)


def test_a_preset_without_codebook_has_none_to_search(write):
    for name in ("codebook", DEFAULT, write({"objective.codebook.eps": [0.03, 0.05]})):
        with pytest.raises(InputError, match="clip-tiny has no codebook"):
            read_space(name, CLIP)
    turned_on = {"objective.weights.code": [0.0, 1.0], "objective.codebook.eps": [0.03, 0.05]}
    assert len(grid_points(read_space(write(turned_on), CLIP), CLIP)) == 4


def test_a_name_that_is_neither_space_nor_file_lists_the_spaces():
    with pytest.raises(InputError, match="--space temperatur: neither a file nor one of temperature, codebook"):
        read_space("temperatur", BOTH)


def test_a_range_has_no_grid(write):
    space = read_space(write({"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}, "seed": [0, 1]}), CLIP)
    assert combinations(space) is None
    with pytest.raises(InputError, match=r"--search grid: optim\.learning_rate is a range"):
        grid_points(space, CLIP)


# Points


def test_values_are_what_the_configuration_makes_of_them(write):
    space = {
        "objective.codebook.size": [64.0, "128"],
        "optim.betas": [[0.9, 0.98]],
        "objective.temperature.learn": [1],
        "optim.weight-decay": [0],
    }
    read = read_space(write(space), BOTH)
    assert read["optim.weight_decay"].values == [0.0]
    assert read["objective.codebook.size"] == Dimension("grid", [64, 128])
    assert read["optim.betas"].values == [[0.9, 0.98]] and read["objective.temperature.learn"].values == [True]


def test_a_part_of_a_grid_is_drawn_by_the_seed_without_repeats():
    space = read_space("", BOTH)
    drawn = [grid_points(space, BOTH, 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({json.dumps(point) for point in drawn[0]}) == 5
    assert all(point in grid_points(space, BOTH) for point in drawn[0])
    assert len(grid_points(space, BOTH, 100)) == 9


def test_random_points_lie_in_the_space_and_depend_on_the_seed_alone(write):
    file = write(
        {
            "optim.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "optim.weight_decay": {"uniform": [0, 1]},
            "objective.codebook.size": {"loguniform": [8, 512]},
            "objective.codebook.solver": {"choice": ["sinkhorn", "ipot"]},
        }
    )
    space = read_space(file, BOTH)
    points = random_points(space, BOTH, 400, seed=3)
    assert points == random_points(space, BOTH, 400, seed=3) != random_points(space, BOTH, 400, seed=4)
    rates = [point["optim.learning_rate"] for point in points]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 400 < 0.6, "as many below the geometric mean as above"
    assert 0.4 < sum(point["optim.weight_decay"] < 0.5 for point in points) / 400 < 0.6
    sizes = {point["objective.codebook.size"] for point in points}
    assert all(isinstance(size, int) and 8 <= size <= 512 for size in sizes) and len(sizes) > 50
    assert {point["objective.codebook.solver"] for point in points} == {"sinkhorn", "ipot"}
    assert check_point(points[0], BOTH).optim.learning_rate == points[0]["optim.learning_rate"]


def test_a_small_range_of_whole_numbers_ends(write):
    space = read_space(write({"optim.batch_size": {"uniform": [31, 33]}}), CLIP)
    assert sorted(point["optim.batch_size"] for point in random_points(space, CLIP, 10)) == [31, 32, 33]


def test_tunes_own_terms_draw_from_the_same_candidates(write):
    file = write({"optim.batch_size": {"uniform": [31, 33]}, "optim.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    domains = tune_domains(read_space(file, CLIP))
    assert {domains["optim.batch_size"].sample() for _ in range(60)} == {31, 32, 33}
    assert all(1e-4 <= domains["optim.learning_rate"].sample() <= 1e-2 for _ in range(60))
