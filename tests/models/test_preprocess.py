import io
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from models.config import InputError
from models.normalize import normalize
from models.preprocess import (
    MEAN,
    STD,
    CaptionTokenizer,
    PreprocessorConfig,
    clean_caption,
    clean_question,
    load_tokenizer,
    resize_for_eval,
    to_rgb,
    train_tokenizer,
)
from tests.support.paths import ROOT

PROTOCOL = json.loads((ROOT / "tests/golden/tcl/protocol.json").read_text())


@pytest.mark.parametrize("case", PROTOCOL["pre_caption"], ids=lambda case: repr(case["in"])[:20])
def test_captions_are_cleaned_as_in_the_reference(case):
    assert clean_caption(case["in"], case["max_words"]) == case["out"]


@pytest.mark.parametrize("case", PROTOCOL["pre_question"], ids=lambda case: repr(case["in"])[:20])
def test_questions_are_cleaned_as_in_the_reference(case):
    assert clean_question(case["in"], case["max_words"]) == case["out"]


def test_a_caption_of_punctuation_is_empty_and_brackets_stay():
    assert clean_caption("?! ...") == ""
    assert clean_caption("[Mask] & 50% <person>/<dog>") == "[mask] & 50% person <dog>"


def corpus():
    generator = random.Random(0)
    parts = ["ba", "co", "ri", "tu", "ne", "lo", "shi", "é", "字", "ß"]
    words = ["".join(generator.choices(parts, k=generator.randint(1, 5))) for _ in range(500)]
    return [" ".join(generator.choices(words, k=6)) for _ in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.from_json(train_tokenizer(iter(corpus()), 300).to_str())


def test_equal_captions_give_equal_tokenizers_in_any_process(tokenizer):
    code = (
        "import json, sys; from models.tokenizer import train_tokenizer;"
        "sys.stdout.write(train_tokenizer(json.load(sys.stdin), 300).to_str())"
    )
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "input": json.dumps(corpus())}
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], **options).stdout == tokenizer.to_json()


def test_special_ids_come_first_and_the_vocabulary_keeps_its_size(tokenizer):
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)
    assert tokenizer.vocab_size <= 300
    letters = train_tokenizer(["".join(chr(0x4E00 + i) for i in range(200))] * 3, 20)
    assert letters.get_vocab_size() <= 20
    with pytest.raises(InputError, match="vocab_size: 9 is too few"):
        train_tokenizer(["a"], 9)


def test_a_caption_begins_with_cls_has_no_sep_and_is_cut_and_padded(tokenizer):
    caption = corpus()[0]
    ids, mask = tokenizer.encode([caption, "", "\u2603"], 40)
    assert ids.dtype == np.int32 and mask.dtype == np.uint8 and ids.shape == mask.shape == (3, 40)
    assert (ids[:, 0] == tokenizer.cls_id).all() and tokenizer.sep_id not in ids
    assert mask.sum(1).tolist()[1:] == [1, 2] and ids[2, 1] == 1
    assert (ids[mask == 0] == tokenizer.pad_id).all()
    words = Tokenizer.from_str(tokenizer.to_json()).encode(caption, add_special_tokens=False)
    assert ids[0, 1 : mask[0].sum()].tolist() == words.ids and "".join(words.tokens) == caption.replace(
        " ", ""
    ).replace("é", "e")
    cut, cut_mask = tokenizer.encode([caption], 4)
    assert cut[0].tolist() == ids[0, :4].tolist() and cut_mask.sum() == 4
    assert tokenizer.encode([], 7)[0].shape == (0, 7)


def test_json_round_trip_and_a_folder_of_it(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for again in (CaptionTokenizer.from_json(tokenizer.to_json()), load_tokenizer(str(tmp_path))):
        assert again.to_json() == tokenizer.to_json()
        assert np.array_equal(again.encode(corpus(), 12)[0], tokenizer.encode(corpus(), 12)[0])
    with pytest.raises(InputError, match="not a tokenizers JSON"):
        load_tokenizer('{"a": 1}')


def words_tokenizer(*special):
    vocabulary = {word: i for i, word in enumerate([*special, "red", "car", "<unk>"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return plain


@pytest.mark.parametrize(
    ("roles", "ids"),
    [
        ({"cls_token": "[C]", "sep_token": "[S]", "pad_token": "[P]", "mask_token": "[M]"}, (2, 0, 1, 3)),
        ({"bos_token": "[C]", "eos_token": "[S]"}, (1, 0, 1, -1)),
    ],
)
def test_any_fast_transformers_tokenizer_serves(roles, ids, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    special = ["[C]", "[S]", "[P]", "[M]"]
    plain = words_tokenizer(*special)
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", **roles).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_id, loaded.cls_id, loaded.sep_id, loaded.mask_id) == ids
    again = CaptionTokenizer.from_json(loaded.to_json())
    assert again.mask_id == loaded.mask_id
    assert again.encode(["red car boat"], 6)[0].tolist() == [[0, 4, 5, 6, ids[0], ids[0]]]


def test_a_tokenizer_without_a_first_token_or_a_name_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no token that begins a sequence"):
        load_tokenizer(words_tokenizer("[P]").to_str())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no transformers tokeniser at"):
        load_tokenizer(str(tmp_path / "nothing"))


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_transparency_lies_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    assert to_rgb(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(png(half)).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(png(palette)).getpixel((0, 0)) == (200, 10, 20)
    assert to_rgb(png(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_deep_greys_and_other_modes_become_rgb():
    deep = Image.fromarray(np.full((3, 3), 0x8080, np.uint16))
    assert to_rgb(png(deep)).getpixel((0, 0)) == (128, 128, 128)
    assert to_rgb(Image.new("F", (2, 2), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    assert to_rgb(Image.new("F", (2, 2), 200.0)).getpixel((0, 0)) == (200, 200, 200)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation):
    from PIL import ImageOps

    corners = np.zeros((16, 24, 3), np.uint8)
    corners[:8, :12, 0] = corners[8:, :12, 1] = corners[:8, 12:, 2] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(corners).save(buffer, "JPEG", quality=95, exif=exif)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    expected = np.asarray(ImageOps.exif_transpose(image))
    once = to_rgb(image)
    assert np.array_equal(np.asarray(once), expected)
    assert np.array_equal(np.asarray(to_rgb(once)), expected)


def test_damaged_exif_does_not_cost_the_image():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "PNG", exif=b"Exif\x00\x00garbage that is no TIFF")
    assert to_rgb(Image.open(io.BytesIO(buffer.getvalue()))).size == (8, 8)


def test_evaluation_resize_takes_the_whole_image():
    left_red = np.zeros((10, 40, 3), np.uint8)
    left_red[:, :20, 0] = 255
    resized = resize_for_eval(Image.fromarray(left_red), 8)
    assert resized.shape == (8, 8, 3) and resized.dtype == np.uint8
    assert (resized[:, :3, 0] > 200).all() and (resized[:, 5:, 0] < 50).all()


def test_normalise_is_zero_mean_and_unit_spread_in_channel_order():
    pixels = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    out = normalize(pixels)
    assert out.shape == (2, 3, 5, 5)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(out.double().permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)


def test_preprocessor_config_round_trip_and_refusal():
    config = PreprocessorConfig(image_size=48, max_tokens=12, mean=(0.1, 0.2, 0.3))
    text = config.to_json()
    assert PreprocessorConfig.from_json(text) == config
    assert json.loads(text)["size"] == {"height": 48, "width": 48}
    for wrong in ("{}", "[]", "no", text.replace('"resample": 3', '"resample": 2')):
        with pytest.raises(InputError, match="preprocessor_config"):
            PreprocessorConfig.from_json(wrong)
