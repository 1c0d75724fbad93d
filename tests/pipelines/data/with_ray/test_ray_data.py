import collections
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from models.config import InputError
from models.preprocess import train_tokenizer
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data import ray_data
from pipelines.data.epoch_plan import Position, groups, merge, permutation, shares
from pipelines.data.manifest import build_manifest
from pipelines.data.ray_data import (
    LEDGER,
    PrepareSettings,
    check_balance,
    check_skipped,
    eval_batches,
    ledger_rows,
    read_ledger,
    read_train,
    train_batches,
    train_blocks,
    write_ledger,
)
from tests.support.pairs import jpeg, make_pairs, write_parquet_pairs, write_tar_pairs

PAIRS = PairsConfig()
TOKENIZER = train_tokenizer([f"picture number {i} of noise" for i in range(100)], 100).to_str()
SETTINGS = PrepareSettings(8, 8, TOKENIZER, PAIRS, seed=5)
pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def mixed(tmp_path):
    """150 samples in Parquet and tar, nine of them bad in some way, and a damaged file that counts as one more."""
    pairs = make_pairs(90)
    pairs[10]["image"] = jpeg(10)[:200]
    pairs[20]["caption"] = "..."
    pairs[30]["image"] = None
    pairs[40]["image"] = jpeg(1, 2, 2)
    write_parquet_pairs(str(tmp_path / "a.parquet"), pairs, row_group_size=40)
    tar = make_pairs(60, start=100)
    tar[5]["image"] = b"<html>"
    tar[6]["image"] = b""
    del tar[7]["image"], tar[8]["caption"]
    tar[9]["caption"] = ""
    write_tar_pairs(str(tmp_path / "b.tar"), tar)
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 99)
    return build_manifest(str(tmp_path), PAIRS)


def ids_of(batches):
    return [pair for b in batches for pair in zip(b["unit"].tolist(), b["ordinal"].tolist(), strict=True)]


def planned(manifest, share, epoch):
    """(unit, ordinal) of a share, from the plan alone."""
    found = []
    for group, skip in share:
        samples = [(n, i) for n in group.units for i in range(manifest.units[n].count)]
        found += [samples[place] for place in permutation(group, SETTINGS.seed, epoch)[skip:]]
    return found


def test_batches_are_full_in_plan_order_and_balance_with_the_ledger(mixed, tmp_path):
    share = shares(groups(mixed.units, SETTINGS.seed, 2), {}, 1)[0]
    batches = list(train_batches(mixed, share, 2, SETTINGS.seed, SETTINGS, 16))
    assert [len(b["key"]) for b in batches] == [16] * 9 + [7]
    assert ids_of(batches) == planned(mixed, share, 2)
    assert batches[0]["views"].shape == (16, 2, 8, 8, 3) and batches[0]["views"].dtype == np.uint8
    assert batches[0]["ids"].shape == (16, 8) and batches[0]["ids"].dtype == np.int32
    for batch in batches:
        good = batch["reason"] == ""
        assert batch["views"][good].any((1, 2, 3, 4)).all() and not batch["views"][~good].any()
        assert set(batch["epoch"]) == {2}
    ledger = [ledger_rows(batch, 2) for batch in batches]
    skipped = ledger[0].from_batches([b for t in ledger for b in t.to_batches()], LEDGER)
    check_balance(mixed.count, sum(int((b["reason"] == "").sum()) for b in batches), len(skipped))
    reasons = collections.Counter(skipped.column("reason").to_pylist())
    assert reasons == {"unreadable": 4, "empty_caption": 2, "missing_member": 3, "too_small": 1}
    write_ledger(str(tmp_path / "out" / "skipped.parquet"), skipped)
    assert read_ledger(str(tmp_path / "out" / "skipped.parquet")) == skipped
    row = next(r for r in skipped.to_pylist() if r["id"] == "key105")
    assert row["uri"].endswith("b.tar#key105.jpg") and row["sample_id"] == f"{row['unit']}-{row['ordinal']}"
    assert row["epoch"] == 2 and "not an image" in row["detail"]


def test_places_say_how_far_a_group_has_come(mixed):
    share = shares(groups(mixed.units, SETTINGS.seed, 0), {0: 5}, 1)[0]
    done = {}
    for block in train_blocks(mixed, [(0, share)], SETTINGS):
        for group, place in zip(block["group"].tolist(), block["place"].tolist(), strict=True):
            assert place == done.get(group, 5 if group == 0 else 0)
            done[group] = place + 1
    assert done == {group.group: group.count for group, _ in share}


def test_every_sample_comes_once_when_the_world_changes(mixed):
    """Two workers stop somewhere, three go on, one finishes: what they took is the epoch, each sample once."""
    plan, taken, position = groups(mixed.units, SETTINGS.seed, 1), [], Position(1)
    for world, most in ((2, 3), (3, 2), (1, None)):
        parts = []
        for share in shares(plan, position.done, world):
            batches = train_batches(mixed, share, 1, SETTINGS.seed, SETTINGS, 7)
            part = {}
            for batch in itertools.islice(batches, most):
                taken += ids_of([batch])
                part |= dict(zip(batch["group"].tolist(), (batch["place"] + 1).tolist(), strict=True))
            batches.close()
            parts.append(part)
        position = Position.from_json(position.replace_done(merge([position.done, *parts])).to_json())
    assert sorted(taken) == [(u.unit, i) for u in mixed.units for i in range(u.count)]


def test_epochs_are_chained_in_one_execution(mixed):
    plan = [(epoch, shares(groups(mixed.units, SETTINGS.seed, epoch), {}, 1)[0]) for epoch in (0, 1, 2)]
    blocks = list(train_blocks(mixed, plan, SETTINGS))
    epochs = np.concatenate([block["epoch"] for block in blocks])
    assert epochs.tolist() == [0] * mixed.count + [1] * mixed.count + [2] * mixed.count
    expected = [pair for epoch, share in plan for pair in planned(mixed, share, epoch)]
    assert ids_of(blocks) == expected
    keys = np.concatenate([block["key"] for block in blocks])
    assert len(set(keys.tolist())) == 3 * mixed.count


def test_the_stream_gives_what_plain_functions_give(mixed):
    share = shares(groups(mixed.units, SETTINGS.seed, 0), {}, 2)[1][:2]
    pieces = [(group, [mixed.units[n] for n in group.units], skip, 0) for group, skip in share]
    by_hand = list(read_train(pieces, SETTINGS.seed, SETTINGS))
    by_ray = list(train_blocks(mixed, [(0, share)], SETTINGS))
    assert by_hand[0].keys() == by_ray[0].keys()
    for name in by_hand[0]:
        one, other = (np.concatenate([block[name] for block in blocks]) for blocks in (by_hand, by_ray))
        assert one.dtype == other.dtype and np.array_equal(one, other), name


def test_s3_gives_the_same_batches(mixed, s3):
    there = s3.bucket()
    storage.upload(str(Path(mixed.units[0].uri).parent), there)
    remote = build_manifest(there, PAIRS)
    columns = []
    for manifest in (mixed, remote):
        share = shares(groups(manifest.units, SETTINGS.seed, 0), {}, 1)[0][:6]
        (batch,) = train_batches(manifest, share, 0, SETTINGS.seed, SETTINGS, 1000)
        columns.append(batch)
    assert all(uri.startswith("s3://") for uri in columns[1]["uri"])
    for name in columns[0].keys() - {"uri", "detail"}:
        assert np.array_equal(columns[0][name], columns[1][name]), name


def test_evaluation_keeps_the_order_of_the_units(mixed):
    batches = list(eval_batches(mixed, mixed.units, SETTINGS, 32))
    assert [len(b["image"]) for b in batches] == [32, 32, 32, 32, 23]
    assert ids_of(batches) == [(u.unit, i) for u in mixed.units for i in range(u.count)]
    assert batches[0]["image"].shape == (32, 8, 8, 3)
    assert list(batches[0]["captions"][3]) == ["picture number 3 of noise"] and list(batches[0]["captions"][20]) == []
    chosen = [mixed.units[4], mixed.units[1]]
    assert ids_of(eval_batches(mixed, chosen, SETTINGS, 5)) == [(u.unit, i) for u in chosen for i in range(u.count)]


def test_several_captions_reach_the_evaluation_as_lists(tmp_path):
    pairs = [pair | {"caption": ["one", "Two.", "?"][: 1 + i]} for i, pair in enumerate(make_pairs(3))]
    manifest = build_manifest(write_parquet_pairs(str(tmp_path / "a.parquet"), pairs), PAIRS)
    (batch,) = eval_batches(manifest, manifest.units, SETTINGS, 10)
    assert [list(captions) for captions in batch["captions"]] == [["one"], ["one", "two"], ["one", "two"]]


def test_nothing_to_do_gives_nothing(mixed):
    assert list(train_batches(mixed, [], 0, 0, SETTINGS, 4)) == []
    assert list(train_blocks(mixed, [], SETTINGS)) == list(eval_batches(mixed, [], SETTINGS, 4)) == []


def test_a_closed_stream_leaves_its_slots(mixed):
    share = shares(groups(mixed.units, SETTINGS.seed, 0), {}, 1)[0]
    for _ in range(3):
        batches = train_batches(mixed, share, 0, SETTINGS.seed, SETTINGS, 4)
        next(batches)
        batches.close()
    assert ids_of(train_batches(mixed, share[:1], 0, SETTINGS.seed, SETTINGS, 4)) == planned(mixed, share[:1], 0)


def test_a_store_that_is_down_fails_the_run_and_skips_nothing(mixed, s3, monkeypatch):
    monkeypatch.setattr("pipelines.data.reader._PAUSES", ())
    share = shares(groups(mixed.units, SETTINGS.seed, 0), {}, 1)[0][:1]
    pieces = [(group, [mixed.units[n] for n in group.units], skip, 0) for group, skip in share]

    def down(uri):
        raise storage.Unavailable("s3://x: the store cannot be reached")

    monkeypatch.setattr(storage, "open_input", down)
    with pytest.raises(storage.Unavailable):
        list(read_train(pieces, SETTINGS.seed, SETTINGS))


def test_small_groups_share_a_task_and_blocks_stay_small():
    units = [None] * 3
    pieces = [(_group(count), units, 0, 0) for count in (200, 200, 200, 600, 10, 10)]
    tasks = [[piece[0].count for piece in task] for task in ray_data._tasks(pieces)]
    assert tasks == [[200, 200], [200], [600], [10, 10]]
    assert ray_data._block_rows(SETTINGS) == 256
    large = PrepareSettings(1024, 8, TOKENIZER, PAIRS, 0)
    assert ray_data._block_rows(large) * ray_data._row_bytes(large) <= ray_data.BLOCK_BYTES


def _group(count):
    from pipelines.data.epoch_plan import Group

    return Group(0, (), count)


def test_balance_and_share_of_skipped_samples_are_checked():
    rows = ledger_rows({name: np.array(values) for name, values in _bad_rows().items()}, 0)
    check_balance(10, 8, 2)
    with pytest.raises(RuntimeError, match="10 samples planned, but 9 trained and 0 skipped"):
        check_balance(10, 9, 0)
    check_skipped(10, len(rows), 0.2)
    with pytest.raises(InputError, match=r"max_skipped: 2 of 10 .* more than 10%"):
        check_skipped(10, len(rows), 0.1)


def _bad_rows():
    return {
        "unit": [0, 0, 1],
        "ordinal": [0, 1, 0],
        "id": ["a", "b", "c"],
        "uri": ["x", "y", "z"],
        "reason": ["unreadable", "", "too_small"],
        "detail": ["", "", "1 x 1"],
    }


def test_a_ledger_that_is_none_is_refused(tmp_path):
    pq.write_table(LEDGER.empty_table().drop_columns(["reason"]), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="not a ledger"):
        read_ledger(str(tmp_path / "x.parquet"))


def _take_all(config):
    """A Train worker that trains nothing: two epochs of its share, and validation in between."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    manifest, found = config["manifest"], []
    for epoch in (0, 1):
        share = shares(groups(manifest.units, SETTINGS.seed, epoch), {}, world)[rank]
        found += [(epoch, *pair) for pair in ids_of(train_batches(manifest, share, epoch, 5, SETTINGS, 8))]
        assert len(ids_of(eval_batches(manifest, manifest.units[rank::world], SETTINGS, 32))) > 0
    Path(config["out"], f"{rank}.txt").write_text("\n".join(" ".join(map(str, row)) for row in found))


@pytest.mark.slow  # test_train.py trains so, on the same two slots
def test_two_workers_and_their_data_tasks_fit_on_two_slots(mixed, tmp_path):
    TorchTrainer(
        _take_all,
        train_loop_config={"manifest": mixed, "out": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="slots",
            storage_path=str(tmp_path / "runs"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
        ),
    ).fit()
    parts = [
        [tuple(map(int, line.split())) for line in (tmp_path / f"{r}.txt").read_text().split("\n")] for r in (0, 1)
    ]
    assert min(len(part) for part in parts) > mixed.count // 2
    everything = [(e, u.unit, i) for e in (0, 1) for u in mixed.units for i in range(u.count)]
    assert sorted(parts[0] + parts[1]) == everything
