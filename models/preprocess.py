"""The one home of preprocessing: caption clean-up, tokenising, evaluation resize, and what normalising takes out.

Training, validation, embedding and serving all come here, so that none of them sees another input. Behaviour follows
TCL (arXiv 2202.10401) and its reference implementation; the tokeniser is in `models/tokenizer.py`. Nothing here imports
torch, whose part, normalising on the model's device, is in `models/normalize.py`: a gateway does without.
"""

import json
import re
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from models.config import Config, InputError
from models.tokenizer import CaptionTokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "MEAN",
    "STD",
    "CaptionTokenizer",
    "PreprocessorConfig",
    "clean_caption",
    "clean_question",
    "load_tokenizer",
    "resize_for_eval",
    "to_rgb",
    "train_tokenizer",
]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_PUNCTUATION = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def clean_caption(text: str, max_words: int = 30) -> str:
    """A caption in lower case without punctuation, of at most `max_words` words; empty where nothing is left."""
    text = text.lower().translate(_PUNCTUATION).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int) -> str:
    """A question in lower case without punctuation; unlike a caption it keeps its inner and leading spaces."""
    text = text.lower().translate(_PUNCTUATION).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image: EXIF orientation applied, transparency over white, deep greys scaled to 8 bits."""
    turn = _TRANSPOSE.get(orientation(image))
    rgb = image
    if image.mode.startswith(("I", "F")):
        rgb = _from_deep_grey(image)
    elif image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if rgb.mode != "RGB":
        rgb = rgb.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {}  # its EXIF orientation is applied: a second call must not turn it again
    return rgb


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises nearly anything; the image is still good, and taken to be upright
        return 1


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """8-bit greys of modes that have more: integers are 16-bit, floats are 0..1, or 0..255 where any is larger."""
    levels = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode.startswith("I"):
        levels = levels / 257
    elif levels.max(initial=0.0) <= 1:
        levels = levels * 255
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def resize_for_eval(image: Image.Image, size: int) -> np.ndarray:
    """The whole image as uint8 (size, size, 3): bicubic, the aspect is not kept."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))


class PreprocessorConfig(Config):
    """How images and captions become model inputs; `preprocessor_config.json` in a package."""

    image_size: PositiveInt = 32
    """Side of the square input, pixels."""
    mean: tuple[float, float, float] = MEAN
    """Taken from each channel, in 0..1."""
    std: tuple[float, float, float] = STD
    """Each channel is divided by it."""
    resample: Literal[3] = 3
    """Pillow's number of the resize filter: bicubic, the only one in use."""
    max_tokens: PositiveInt = 25
    """Tokens kept of a caption, [CLS] included."""
    max_caption_words: PositiveInt = 30
    """Words kept of a caption."""

    def to_json(self) -> str:
        """The file's text, in the field names of `transformers`' image processors."""
        tree = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": True,
            "max_tokens": self.max_tokens,
            "max_caption_words": self.max_caption_words,
        }
        return json.dumps(tree, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PreprocessorConfig":
        """Back from `to_json`; raises InputError where a field is missing."""
        try:
            tree = json.loads(text)
            return cls(
                image_size=tree["size"]["height"],
                mean=tuple(tree["image_mean"]),
                std=tuple(tree["image_std"]),
                resample=tree["resample"],
                max_tokens=tree["max_tokens"],
                max_caption_words=tree["max_caption_words"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"preprocessor_config.json: not one of this application's ({error!r})") from error
