import io
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from models import images, sample_rng
from models.images import FORMATS, ImageRejected, open_image
from models.preprocess import CaptionTokenizer, clean_caption, resize_for_eval, train_tokenizer
from pipelines.config import ExperimentConfig, PairsConfig
from pipelines.data import crops
from pipelines.data.crops import DRAWS, draw_boxes
from pipelines.data.sample import Sample
from pipelines.data.transforms import PrepareSettings, prepare_eval, prepare_train
from tests.support.pairs import encoded, jpeg

SIZE = 16
WORDS = ["a red square on the left", "two blue dots", "picture of noise"]
TOKENIZER = train_tokenizer(WORDS, 200).to_str()


def settings_of(**pairs):
    return PrepareSettings(SIZE, 8, TOKENIZER, PairsConfig(**pairs), seed=3)


def sample(image, caption="two blue dots", ordinal=0, **changes):
    captions = (caption,) if isinstance(caption, str) else tuple(caption)
    return Sample(2, ordinal, f"id{ordinal}", f"file#row={ordinal}", image, captions, "")._replace(**changes)


def gradient(mode="RGB", width=64, height=48):
    """A picture that is red to the right and green to the bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([red, green, 0 * red + 128], 2).astype(np.uint8))
    return image.convert(mode)


def plain(image, **options):
    return prepare_eval([sample(image)], settings_of(**options))


def test_training_columns_have_the_promised_types():
    rows = [sample(jpeg(i, 40, 30), WORDS[i % 3], i) for i in range(6)]
    columns = prepare_train(rows, settings_of(), epoch=1)
    kinds = {name: (values.dtype.name, values.shape[1:]) for name, values in columns.items()}
    assert kinds == {
        "views": ("uint8", (2, SIZE, SIZE, 3)),
        "ids": ("int32", (8,)),
        "mask": ("uint8", (8,)),
        "key": ("int64", ()),
        "unit": ("int32", ()),
        "ordinal": ("int32", ()),
        "image_id": ("int64", ()),
        "caption_id": ("int64", ()),
        "id": ("object", ()),
        "uri": ("object", ()),
        "reason": ("object", ()),
        "detail": ("object", ()),
    }
    assert columns["key"].tolist() == [sample_rng.hash64(3, 1, 2, i) for i in range(6)]
    assert columns["id"].tolist() == [f"id{i}" for i in range(6)] and set(columns["reason"]) == {""}
    ids, mask = CaptionTokenizer.from_json(TOKENIZER).encode([WORDS[i % 3] for i in range(6)], 8)
    assert np.array_equal(columns["ids"], ids) and np.array_equal(columns["mask"], mask)


def test_equal_images_and_captions_have_equal_ids():
    rows = [
        sample(jpeg(1), "Two blue dots!"),
        sample(jpeg(2), "two blue  dots"),
        sample(jpeg(1), "picture"),
        sample(jpeg(3), "other", image_id="7"),
        sample(jpeg(4), "another", image_id="7"),
    ]
    columns = prepare_train(rows, settings_of(), 0)
    image, caption = columns["image_id"], columns["caption_id"]
    assert image[0] == image[2] != image[1] and image[3] == image[4] != image[0]
    assert caption[0] == caption[1] == sample_rng.hash64("two blue dots") and len(set(caption.tolist())) == 4
    assert prepare_eval(rows, settings_of())["image_id"].tolist() == image.tolist()


def test_crops_belong_to_the_sample_and_the_epoch():
    rows = [sample(jpeg(i, 60, 50), ordinal=i) for i in range(5)]
    whole = prepare_train(rows, settings_of(), 4)
    for place in (3, 0):
        alone = prepare_train([rows[place]], settings_of(), 4)
        for name in ("views", "ids", "key", "image_id"):
            assert np.array_equal(alone[name][0], whole[name][place])
    assert not np.array_equal(whole["views"][:, 0], whole["views"][:, 1])
    assert not np.array_equal(whole["views"], prepare_train(rows, settings_of(), 5)["views"])


def test_crops_are_what_pillow_makes_of_the_drawn_boxes():
    image = gradient()
    row = sample(encoded(image, "PNG"))
    columns = prepare_train([row], settings_of(crop_area_min=0.3), 0)
    import torch

    numbers = sample_rng.uniform(torch.from_numpy(columns["key"]), sample_rng.CROP, DRAWS).numpy()
    boxes = draw_boxes(np.array([image.size]), numbers, 0.3)[0]
    for view, box in enumerate(boxes.tolist()):
        expected = np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        assert np.abs(columns["views"][0, view].astype(int) - expected).max() <= 1


def test_drawn_boxes_keep_area_aspect_and_picture():
    count = 4000
    numbers = np.random.default_rng(0).random((count, DRAWS))
    sizes = np.tile([[300, 290]], (count, 1))
    boxes = draw_boxes(sizes, numbers, 0.2).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() == 0 and boxes[:, 2].max() == 300 and boxes[:, 3].max() == 290
    area, aspect = width * height / 87_000, width / height
    assert 0.19 < area.min() < 0.22 and 0.97 < area.max() <= 1 and 0.5 < area.mean() < 0.6
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    centre = (boxes[:, 0] + boxes[:, 2]) / 600
    assert abs(centre.mean() - 0.5) < 0.01


def test_pictures_without_a_fitting_box_are_cropped_in_the_middle():
    boxes = draw_boxes(np.array([[1000, 10], [10, 1000]]), np.full((2, DRAWS), 0.9), 0.9)
    assert boxes[0, 0].tolist() == [493, 0, 506, 10] and boxes[1, 1].tolist() == [0, 493, 10, 506]
    assert draw_boxes(np.ones((1, 2), int), np.full((1, DRAWS), 0.5), 0.2)[0, 0].tolist() == [0, 0, 1, 1]


def test_without_augmentation_both_views_are_the_whole_picture():
    data = encoded(gradient(), "PNG")
    views = prepare_train([sample(data)], settings_of(augment="none"), 0)["views"][0]
    assert np.array_equal(views[0], views[1]) and np.array_equal(views[0], resize_for_eval(gradient(), SIZE))


def test_large_jpegs_are_decoded_small_and_look_the_same(monkeypatch):
    data = encoded(gradient(width=1200, height=900), "JPEG", quality=95)
    decoded = []
    real = crops.to_rgb
    monkeypatch.setattr(crops, "to_rgb", lambda image: decoded.append(image.size) or real(image))
    views = prepare_train([sample(data)], settings_of(augment="none"), 0)["views"][0]
    assert decoded == [(150, 113)]  # an eighth
    assert np.abs(views[0].astype(int) - resize_for_eval(gradient(width=1200, height=900), SIZE)).max() < 12
    prepare_train([sample(data)], settings_of(crop_area_min=0.9), 0)
    assert decoded[1] == (150, 113)
    middling = encoded(gradient(width=400, height=300), "JPEG")
    decoded.clear()
    prepare_train([sample(middling, ordinal=i) for i in range(20)], settings_of(crop_area_min=0.05), 0)
    assert {(50, 38), (100, 75)} <= set(decoded)  # smaller crops need more pixels


def test_turned_jpegs_are_cropped_as_they_are_looked_at():
    turned = Image.Exif()
    turned[0x0112] = 6
    stored = gradient(width=800, height=400).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "JPEG", exif=turned.tobytes(), quality=95)
    opened = open_image(data, 10**9, 1)
    assert opened.image.size == (400, 800) and opened.size == (800, 400)
    upright = encoded(gradient(width=800, height=400), "JPEG", quality=95)
    for options in ({"augment": "none"}, {"crop_area_min": 0.2}):
        both = [prepare_train([sample(d)], settings_of(**options), 0)["views"].astype(int) for d in (data, upright)]
        assert np.abs(both[0] - both[1]).max() < 16


def test_every_kind_of_picture_is_read():
    alpha = gradient("RGBA")
    alpha.putalpha(0)
    deep = Image.fromarray(np.asarray(gradient("L")).astype(np.uint16) * 257)
    zoo = {
        "palette": (encoded(gradient("P"), "PNG"), 16),
        "palette with transparency": (encoded(gradient("P"), "PNG", transparency=0), 255),
        "gif": (encoded(gradient("P"), "GIF"), 16),
        "grey jpeg": (encoded(gradient("L"), "JPEG"), None),
        "cmyk jpeg": (encoded(gradient("CMYK"), "JPEG", quality=95), 16),
        "progressive jpeg": (encoded(gradient(), "JPEG", progressive=True, quality=95), 16),
        "bitmap": (encoded(gradient(), "BMP"), 2),
        "one bit": (encoded(gradient("1"), "PNG"), None),
        "16 bit": (encoded(deep, "PNG"), None),
        "tiff": (encoded(gradient(), "TIFF"), 2),
        "webp": (encoded(gradient(), "WEBP", quality=95), 16),
        "ppm": (encoded(gradient(), "PPM"), 2),
    }
    rows = [sample(data, ordinal=i) for i, (data, _) in enumerate(zoo.values())]
    evaluated, trained = prepare_eval(rows, settings_of()), prepare_train(rows, settings_of(augment="none"), 0)
    expected = resize_for_eval(gradient(), SIZE).astype(int)
    for place, (name, (_, tolerance)) in enumerate(zoo.items()):
        assert evaluated["reason"][place] == trained["reason"][place] == "", (name, evaluated["detail"][place])
        want = expected if tolerance else resize_for_eval(gradient("L"), SIZE).astype(int)
        if tolerance != 255 and name != "one bit":
            assert np.abs(evaluated["image"][place] - want).max() <= (tolerance or 16), name
            assert np.abs(trained["views"][place, 0] - want).max() <= (tolerance or 16), name
    assert (plain(encoded(alpha, "PNG"))["image"] == 255).all()  # transparent is white


def test_formats_all_have_a_decoder_or_are_left_out():
    assert set(images._formats()) <= set(FORMATS) and {"JPEG", "PNG", "WEBP", "GIF"} <= set(images._formats())


def png_claiming(width, height):
    """A small file whose header says that it is huge."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD = {
    "text": (b"<!DOCTYPE html><html></html>", "unreadable", "not an image"),
    "empty": (b"", "unreadable", "no bytes"),
    "half a jpeg": (jpeg(1, 200, 200)[:2000], "unreadable", "OSError"),
    "half a png": (encoded(gradient(), "PNG")[:-60], "unreadable", ""),
    "only a header": (jpeg(1)[:100], "unreadable", ""),
    "bomb": (png_claiming(60_000, 60_000), "too_large", "pixels"),
    "large": (png_claiming(10_000, 10_000), "too_large", "10000 x 10000 pixels, more than"),
    "small": (jpeg(1, 1, 1), "too_small", "1 x 1 pixels"),
    "narrow": (jpeg(1, 300, 3), "too_small", "300 x 3 pixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unreadable", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_travel_on_with_a_reason(name):
    data, reason, detail = BAD[name]
    rows = [sample(jpeg(5)), sample(data, ordinal=1), sample(jpeg(6), ordinal=2)]
    for columns, pixels in (
        (prepare_train(rows, settings_of(), 0), "views"),
        (prepare_eval(rows, settings_of()), "image"),
    ):
        assert columns["reason"].tolist() == ["", reason, ""]
        assert detail in columns["detail"][1] and columns["detail"][0] == ""
        assert not columns[pixels][1].any() and columns[pixels][0].any() and columns[pixels][2].any()


def test_limits_are_the_settings():
    assert plain(jpeg(1, 1, 1), min_side=1)["reason"][0] == ""
    assert prepare_train([sample(jpeg(1, 1, 1))], settings_of(min_side=1), 0)["reason"][0] == ""
    assert plain(jpeg(1, 20, 20), max_pixels=399)["reason"][0] == "too_large"
    assert plain(jpeg(1, 20, 20), max_pixels=400)["reason"][0] == ""
    with pytest.raises(ImageRejected):
        open_image(b"", 1, 1)


def test_a_large_picture_is_refused_before_it_is_decoded():
    started = time.perf_counter()
    image = Image.new("L", (9000, 9000))
    data = encoded(image, "PNG", compress_level=1)
    made = time.perf_counter() - started
    started = time.perf_counter()
    assert plain(data)["reason"][0] == "too_large"
    assert time.perf_counter() - started < made / 2


def test_captions_without_words_and_earlier_reasons_are_kept():
    rows = [
        sample(jpeg(1), "?!"),
        sample(jpeg(1), ["..", "two blue dots"]),
        sample(jpeg(1), [], reason="missing_member", detail="no caption"),
        sample(b"", "two", reason="fetch_failed", detail="gone"),
    ]
    for columns in (prepare_train(rows, settings_of(), 0), prepare_eval(rows, settings_of())):
        assert columns["reason"].tolist() == ["empty_caption", "", "missing_member", "fetch_failed"]
        assert columns["detail"].tolist() == ["", "", "no caption", "gone"]
    assert prepare_train(rows, settings_of(), 0)["mask"][:3, 1].tolist() == [0, 1, 0]
    assert prepare_eval(rows, settings_of())["captions"].tolist() == [[], ["two blue dots"], [], ["two"]]


def test_one_caption_of_several_is_drawn_by_sample_and_epoch():
    rows = [sample(jpeg(i), WORDS, ordinal=i) for i in range(60)]
    epochs = [prepare_train(rows, settings_of(), epoch)["caption_id"] for epoch in (0, 1)]
    known = [sample_rng.hash64(clean_caption(word)) for word in WORDS]
    counts = [int((epochs[0] == one).sum()) for one in known]
    assert sum(counts) == 60 and min(counts) > 8
    assert (epochs[0] != epochs[1]).any()
    assert np.array_equal(epochs[0], prepare_train(rows, settings_of(), 0)["caption_id"])


def test_evaluation_sees_what_serving_sees():
    data = jpeg(9, 700, 500)
    expected = resize_for_eval(Image.open(io.BytesIO(data)), SIZE)
    assert np.array_equal(plain(data)["image"][0], expected)


def test_no_rows_make_empty_columns():
    assert prepare_train([], settings_of(), 0)["views"].shape == (0, 2, SIZE, SIZE, 3)
    assert prepare_eval([], settings_of())["image"].shape == (0, SIZE, SIZE, 3)


def test_settings_come_from_the_experiment():
    experiment = ExperimentConfig(seed=9)
    made = PrepareSettings.of(experiment, TOKENIZER)
    assert (made.image_size, made.max_tokens, made.seed) == (32, 25, 9)
    assert made.cpus == experiment.compute.cpus_per_data_task and made.pairs == experiment.pairs


def test_preparing_is_about_as_fast_as_a_bare_decode_loop():
    rows = [sample(jpeg(i, 64, 64, quality=88), ordinal=i) for i in range(200)]

    def bare():
        for row in rows:
            image = Image.open(io.BytesIO(row.image)).convert("RGB")
            for box in ((3, 3, 50, 55), (1, 5, 60, 60)):
                np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))

    def seconds(run):
        started = time.thread_time()  # of this thread alone, whatever else the machine does
        run()
        return time.thread_time() - started

    ratio = max(seconds(bare) / seconds(lambda: prepare_train(rows, settings_of(), 0)) for _ in range(6))
    assert ratio > 0.5, f"{ratio:.2f} of a bare loop that makes the same two crops"
