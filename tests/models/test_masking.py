"""What masked language modelling hides."""

import torch

from models.masking import SpecialTokens, mask_tokens

TOKENS = SpecialTokens(pad=0, cls=2, mask=4, vocab_size=1000)


def captions(rows: int, words: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[CLS], words, a padded tail of random length (with garbage in it), and a key a row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 1000, (rows, words + 1), generator=generator)
    ids[:, 0] = TOKENS.cls
    lengths = torch.randint(2, words + 2, (rows,), generator=generator)
    return ids, torch.arange(words + 1)[None] < lengths[:, None], torch.arange(rows) * 7919 - 10**9


def test_shares_of_what_is_selected_and_what_stands_there():
    ids, mask, keys = captions(4000, 24)
    masked = mask_tokens(ids, mask, keys, TOKENS, 0.15)
    words = int(mask[:, 1:].sum())
    chosen = int(masked.selected.sum())
    assert abs(chosen / words - 0.15) < 0.005
    became, was = masked.ids[masked.selected], masked.original[masked.selected]
    hidden, kept = (became == TOKENS.mask), (became == was)
    assert abs(float(hidden.double().mean()) - 0.8) < 0.02
    assert abs(float(kept.double().mean()) - 0.1) < 0.02
    drawn = became[~hidden & ~kept]
    assert abs(len(drawn) / chosen - 0.1) < 0.02
    quarters = torch.bincount(drawn // 250, minlength=4) / len(drawn)
    assert int(drawn.max()) < 1000 and bool(((quarters - 0.25).abs() < 0.06).all())
    assert bool((drawn < 5).any()) or len(drawn) < 500  # any id of the vocabulary, special ones included


def test_only_words_are_touched():
    ids, mask, keys = captions(300, 12)
    ids[:, 3] = TOKENS.pad  # an id of [PAD] where the attention mask is on
    ids[:, 4] = TOKENS.cls
    masked = mask_tokens(ids, mask, keys, TOKENS, 0.9)
    assert not masked.selected[:, [0, 3, 4]].any() and not masked.selected[~mask].any()
    assert torch.equal(masked.ids[~masked.selected], ids[~masked.selected])
    assert torch.equal(masked.original, ids)


def test_a_sample_is_masked_alike_alone_in_any_batch_and_with_more_padding():
    ids, mask, keys = captions(50, 12)
    together = mask_tokens(ids, mask, keys, TOKENS, 0.4)
    order = torch.arange(49, -1, -1)
    turned = mask_tokens(ids[order], mask[order], keys[order], TOKENS, 0.4)
    for row in range(50):
        longer = torch.cat([ids[row : row + 1], torch.zeros(1, 5, dtype=torch.int64)], 1)
        alone = mask_tokens(
            longer, torch.cat([mask[row : row + 1], torch.zeros(1, 5).bool()], 1), keys[row : row + 1], TOKENS, 0.4
        )
        assert torch.equal(alone.ids[0, :13], together.ids[row]) and torch.equal(
            turned.ids[49 - row], together.ids[row]
        )
        assert torch.equal(alone.selected[0, :13], together.selected[row])


def test_two_keys_are_masked_differently():
    ids, mask, _ = captions(1, 24)
    ids, mask = ids.expand(2, -1), torch.ones_like(mask).expand(2, -1)
    masked = mask_tokens(ids, mask, torch.tensor([1, 2]), TOKENS, 0.4)
    assert not torch.equal(masked.selected[0], masked.selected[1])


def test_all_words_or_none():
    ids, mask, keys = captions(20, 6)
    everything = mask_tokens(ids, mask, keys, TOKENS, 1 - 1e-12)
    nothing = mask_tokens(ids, mask, keys, TOKENS, 1e-12)
    expected = mask.clone()
    expected[:, 0] = False
    assert torch.equal(everything.selected, expected)
    assert not nothing.selected.any() and torch.equal(nothing.ids, ids)


def test_no_rows():
    masked = mask_tokens(torch.zeros(0, 4).long(), torch.zeros(0, 4).bool(), torch.zeros(0).long(), TOKENS, 0.15)
    assert masked.ids.shape == masked.selected.shape == (0, 4)
