"""Captions to token ids: a tokeniser trained on the corpus, or any fast one of `transformers`."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from models.config import InputError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_ALPHABET = 1000
_ROLES = {
    "cls": ("[CLS]", "<s>", "<|startoftext|>", "<bos>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """A WordPiece tokeniser of at most `vocab_size` pieces, special ones included; equal captions give equal bytes.

    Pieces carry no "##": with a prefix the trainer numbers them in the order of a hash table, which differs by process.
    """
    if vocab_size < 2 * len(SPECIAL):
        raise InputError(f"encoder.text.vocab_size: {vocab_size} is too few, give at least {2 * len(SPECIAL)}")
    captions = list(captions)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tokenizer.normalizer.normalize_str(caption))
    # chosen here, because the trainer breaks ties between rare characters at random
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = common[: min(_MAX_ALPHABET, vocab_size - len(SPECIAL))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        continuing_subword_prefix="",
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return _with_roles(tokenizer, pad="[PAD]", cls="[CLS]", sep="[SEP]", mask="[MASK]")


def _with_roles(tokenizer: Tokenizer, pad: str, cls: str, sep: str | None, mask: str | None) -> Tokenizer:
    """Write into the tokeniser's own JSON what each special token is for; a sequence becomes `cls w1 ... wn`."""
    named = {"cls": cls, "sep": sep, "mask": mask}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="cls $A",
        pair="cls $A $B",
        special_tokens=[
            {"id": role, "ids": [tokenizer.token_to_id(token)], "tokens": [token]}
            for role, token in named.items()
            if token
        ],
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


class CaptionTokenizer:
    """Captions to token ids: `[CLS] w1 ... wn` without `[SEP]`, cut and padded to one length."""

    def __init__(self, text: str) -> None:
        """`text` is a tokenizers JSON; raises InputError where it is not one or has no token to begin with."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"tokenizer: not a tokenizers JSON ({error}); give tokenizer.json of a fast tokeniser"
            ) from error
        roles = _read_roles(json.loads(text))
        if roles is None:
            tokenizer = _guess_roles(tokenizer)
            text = tokenizer.to_str()
            roles = _read_roles(json.loads(text)) or {}
        self._text = text
        self.pad_id = roles["pad"]
        self.cls_id, self.sep_id, self.mask_id = (roles.get(role, -1) for role in ("cls", "sep", "mask"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self._tokenizer = tokenizer

    @classmethod
    def from_json(cls, text: str) -> "CaptionTokenizer":
        """The tokeniser of `to_json`, or of any tokenizers JSON with usual names for its special tokens."""
        return cls(text)

    def to_json(self) -> str:
        """A tokenizers JSON that other programs read as well (`tokenizer.json`)."""
        return self._text

    def encode(self, captions: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask uint8 (1 = real), both (captions, max_tokens); `[CLS]` counts."""
        ids = np.full((len(captions), max_tokens), self.pad_id, np.int32)
        mask = np.zeros((len(captions), max_tokens), np.uint8)
        for row, tokens in enumerate(self.encode_rows(captions, max_tokens)):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def encode_rows(self, captions: list[str], max_tokens: int) -> list[np.ndarray]:
        """Ids int32 (tokens,) of each caption, cut to `max_tokens` and not padded; `[CLS]` counts."""
        encodings = self._tokenizer.encode_batch_fast(list(captions))
        return [np.array(encoding.ids[:max_tokens], np.int32) for encoding in encodings]


def _read_roles(tree: dict[str, Any]) -> dict[str, int] | None:
    """Ids by role as `_with_roles` wrote them; None for a JSON from elsewhere."""
    special = (tree.get("post_processor") or {}).get("special_tokens")
    if not isinstance(special, dict) or "cls" not in special or not tree.get("padding"):
        return None
    return {role: int(entry["ids"][0]) for role, entry in special.items()} | {"pad": int(tree["padding"]["pad_id"])}


def _guess_roles(tokenizer: Tokenizer) -> Tokenizer:
    """The tokeniser with roles for the special tokens it has, by their usual names."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found = {role: next((name for name in names if name in vocabulary), None) for role, names in _ROLES.items()}
    if not found["cls"]:
        raise InputError("tokenizer: no token that begins a sequence ([CLS], <s> ...); name a tokeniser that has one")
    pad = next((name for name in ("[PAD]", "<pad>") if name in vocabulary), None)
    return _with_roles(tokenizer, pad or found["sep"] or found["cls"], found["cls"], found["sep"], found["mask"])


def load_tokenizer(source: str) -> CaptionTokenizer:
    """A tokeniser from a tokenizers JSON (the text, its file or a folder that has it) or a `transformers` name or
    folder. Raises InputError where there is none or it has no fast form.
    """
    if source.lstrip().startswith("{"):
        return CaptionTokenizer(source)
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        if file == path or not (path / "tokenizer_config.json").is_file():
            return CaptionTokenizer(text)
    return CaptionTokenizer(_from_transformers(source))


def _from_transformers(name: str) -> str:
    from transformers import AutoTokenizer  # seconds to import, and not needed by whoever has a tokenizer.json

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"encoder.text.tokenizer: no transformers tokeniser at {name!r} ({reason})") from error
    cls = loaded.cls_token or loaded.bos_token
    pad = loaded.pad_token or loaded.eos_token or loaded.unk_token
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or cls is None or pad is None:
        lacks = "fast form" if backend is None else "token that begins a sequence" if cls is None else "padding token"
        raise InputError(f"encoder.text.tokenizer: the tokeniser at {name!r} has no {lacks}; name another")
    sep = loaded.sep_token or loaded.eos_token
    copy = Tokenizer.from_str(backend.to_str())
    return _with_roles(copy, pad, cls, sep, getattr(loaded, "mask_token", None)).to_str()
