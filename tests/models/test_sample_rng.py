"""Random numbers of a sample, against SplitMix64 in plain Python and against what uniform numbers are."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models import sample_rng

STREAMS = [
    sample_rng.CROP,
    sample_rng.COLOUR,
    sample_rng.MASK,
    sample_rng.MASK_KIND,
    sample_rng.MASK_WORD,
    sample_rng.NEGATIVE_IMAGE,
]
WORD = 2**64


def finalise(state: int) -> int:
    """SplitMix64's output function, in unsigned arithmetic."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % WORD
    return state ^ (state >> 31)


def uniform_loops(key: int, stream: int, count: int) -> list[float]:
    """Numbers stream 2^32 + 1, + 2, ... of the SplitMix64 sequence that starts at the finalised key."""
    start = finalise(key % WORD)
    return [
        (finalise((start + (stream * 2**32 + n) * 0x9E3779B97F4A7C15) % WORD) >> 11) / 2**53
        for n in range(1, count + 1)
    ]


def test_the_plain_generator_is_splitmix64():
    """First outputs of the published generator from state 1234567."""
    outputs = [finalise((1234567 + n * 0x9E3779B97F4A7C15) % WORD) for n in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345, sample_rng.hash64(0, 0, 3, 5)])
def test_numbers_are_splitmix64_of_key_and_stream(key):
    for stream in range(8):
        assert sample_rng.uniform(torch.tensor([key]), stream, 5)[0].tolist() == uniform_loops(key, stream, 5)


def test_numbers_are_uniform():
    keys = torch.arange(2000)
    values = sample_rng.uniform(keys, sample_rng.MASK, 50)
    assert values.dtype == torch.float64 and float(values.min()) >= 0 and float(values.max()) < 1
    share = torch.histc(values.float(), 20, 0, 1) / values.numel()
    assert bool(((share - 0.05).abs() < 4 * (0.05 * 0.95 / values.numel()) ** 0.5).all())
    assert abs(float(values.mean()) - 0.5) < 4 / (12 * values.numel()) ** 0.5
    for column in values.T[:5]:
        assert abs(float(column.mean()) - 0.5) < 4 / (12 * len(keys)) ** 0.5


def test_streams_keys_and_places_do_not_follow_each_other():
    keys = torch.tensor([sample_rng.hash64(0, 0, unit, ordinal) for unit in range(40) for ordinal in range(50)])
    columns = [sample_rng.uniform(keys, stream, 3)[:, place] for stream in STREAMS for place in range(3)]
    columns.append(sample_rng.uniform(keys + 1, STREAMS[0], 1)[:, 0])
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert float(correlation.abs().max()) < 4.5 / len(keys) ** 0.5
    everything = torch.cat([sample_rng.uniform(keys, stream, 20).flatten() for stream in STREAMS])
    assert len(everything.unique()) == len(everything)


def test_more_numbers_do_not_change_the_first():
    keys = torch.tensor([5, -9])
    assert torch.equal(
        sample_rng.uniform(keys, sample_rng.MASK, 40)[:, :7], sample_rng.uniform(keys, sample_rng.MASK, 7)
    )
    assert sample_rng.uniform(keys[:0], sample_rng.MASK, 7).shape == (0, 7)


def test_hashes_are_signed_64_bit_and_differ():
    values = {
        sample_rng.hash64(0, epoch, unit, ordinal) for epoch in range(3) for unit in range(30) for ordinal in range(30)
    }
    assert len(values) == 2700 and all(-(2**63) <= value < 2**63 for value in values)
    assert abs(sum(value < 0 for value in values) - 1350) < 150
    assert sample_rng.hash64("ab", "c") != sample_rng.hash64("a", "bc") != sample_rng.hash64("abc")
    assert sample_rng.hash64(b"ab", b"c") != sample_rng.hash64(b"a", b"bc")
    assert sample_rng.hash64(12, 3) != sample_rng.hash64(1, 23) and sample_rng.hash64("1") != sample_rng.hash64(1)


def test_whole_numbers_of_any_kind_hash_alike():
    expected = sample_rng.hash64(1, 2)
    assert sample_rng.hash64(np.int32(1), np.int64(2)) == sample_rng.hash64(torch.tensor(1), np.uint8(2)) == expected
    with pytest.raises(Exception, match=r"float|Type-check"):  # TypeError, or the checker's own
        sample_rng.hash64(1.5)


def test_a_hash_is_the_same_in_another_process():
    code = "from models.sample_rng import hash64; print(hash64('a picture', b'bytes', -3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == sample_rng.hash64("a picture", b"bytes", -3)
