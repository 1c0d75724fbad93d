"""Encoder packages and the integrity of checkpoint folders: arrays and JSON only, nothing is ever unpickled."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import sample_rng
from models.config import PACKAGE_FORMAT, EncoderConfig, InputError
from models.encoders import DualEncoder, Heads
from models.inference import Package, encode_images, encode_texts
from models.preprocess import CaptionTokenizer, PreprocessorConfig

FILES = "files.json"
HEALTH_CAPTIONS = ["a red circle", "a dog runs on the beach", "blue shoes with white soles", "seven"]
"""Captions whose vectors a package carries, so that whoever loads it can check that it still computes the same."""


def write_files_json(folder: Path) -> None:
    """List every file below `folder` with its size and SHA-256; written last, it makes the folder complete."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != FILES)
    listing = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    (folder / FILES).write_text(json.dumps(listing, indent=1))


def verify_files(folder: Path, shown_as: str) -> None:
    """Raises InputError unless every file that `files.json` lists is there, whole and unchanged."""
    try:
        listing = json.loads((folder / FILES).read_text())
        for name, entry in listing.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                raise InputError(f"{shown_as}: {name} is missing or damaged; use another checkpoint of the run")
    except FileNotFoundError as error:
        raise InputError(f"{shown_as}: no {FILES}, so the checkpoint is incomplete; use another one") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{shown_as}: {FILES} is damaged; use another checkpoint of the run") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors; raises InputError for a damaged file."""
    try:
        return dict(load_file(path))
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); use another checkpoint") from error


def load_weights(module: nn.Module, path: Path, shown_as: str) -> None:
    """Fill a module from safetensors; raises InputError where names or shapes differ."""
    try:
        module.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{shown_as}: weights do not fit the configuration ({reason})") from error


def save_package(
    folder: Path,
    config: EncoderConfig,
    model: DualEncoder,
    tokenizer: CaptionTokenizer,
    preprocessor: PreprocessorConfig,
    name: str,
) -> str:
    """Write an encoder package (without the model card) and return its embedding-space id.

    The id is a hash of everything that decides a vector: architecture, weights, tokeniser and preprocessing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained_only = ("fusion.language.", "codebook.", "temperature")
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith(trained_only)}
    matching = model.fusion is not None and model.fusion.matching is not None
    if not matching:
        kept = {n: t for n, t in kept.items() if not n.startswith("fusion.")}
    kept = {n: t.float() for n, t in kept.items() if n not in ("log_scale", "bias")}
    save_tensors(kept, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "preprocessor_config.json").write_text(preprocessor.to_json())
    document: dict[str, Any] = {
        "format": PACKAGE_FORMAT,
        "name": name,
        "encoder": config.model_dump(mode="json"),
        "matching": matching,
    }
    document["embedding_space"] = _space_id(folder, document)
    (folder / "config.json").write_text(json.dumps(document, indent=1))
    package = load_package(folder)
    image_vectors, text_vectors, pixels = health_vectors(package)
    save_tensors(
        {"pixels": pixels, "image_vectors": image_vectors, "text_vectors": text_vectors}, folder / "health.safetensors"
    )
    return package.embedding_space


def load_package(folder: Path, shown_as: str = "", device: str = "cpu") -> Package:
    """Read an encoder package, ready to encode; raises InputError for a folder that is none or that was changed."""
    shown_as = shown_as or str(folder)
    try:
        document = json.loads((folder / "config.json").read_text())
        if document.get("format") != PACKAGE_FORMAT:
            raise InputError(f"{shown_as}: no encoder package (format {document.get('format')!r})")
        config = EncoderConfig.model_validate(document["encoder"])
        tokenizer = CaptionTokenizer.from_json((folder / "tokenizer.json").read_text())
        preprocessor = PreprocessorConfig.from_json((folder / "preprocessor_config.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{shown_as}: no encoder package, {Path(error.filename).name} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{shown_as}: config.json of the package is damaged ({type(error).__name__})") from error
    if _space_id(folder, document) != document.get("embedding_space"):
        raise InputError(f"{shown_as}: the package was changed after it was written; build it again from its run")
    model = DualEncoder(config, Heads(matching=document["matching"]))
    del model.temperature
    load_weights(model, folder / "model.safetensors", shown_as)
    card = folder / "metrics.json"
    metrics = json.loads(card.read_text()) if card.exists() else {}
    return Package(
        config, model.eval().to(device), tokenizer, preprocessor, document["embedding_space"], document["name"], metrics
    )


def health_vectors(package: Package) -> tuple[Tensor, Tensor, Tensor]:
    """Image vectors (4, D), text vectors (4, D) and the pixels uint8 (4, S, S, 3) of fixed inputs, on the CPU."""
    preprocessor = package.preprocessor
    size = preprocessor.image_size
    values = sample_rng.uniform(torch.arange(4), sample_rng.CROP, size * size * 3)
    pixels = (values * 256).to(torch.uint8).view(4, size, size, 3)
    ids, mask = map(torch.from_numpy, package.tokenizer.encode(HEALTH_CAPTIONS, preprocessor.max_tokens))
    images = encode_images(package.model, pixels, preprocessor.mean, preprocessor.std)
    texts = encode_texts(package.model, ids, mask.bool())
    return images.vectors.cpu().clone(), texts.vectors.cpu().clone(), pixels


def _space_id(folder: Path, document: dict[str, Any]) -> str:
    """The embedding-space id of a package folder."""
    digest = hashlib.sha256(json.dumps(document["encoder"], sort_keys=True).encode())
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        digest.update(sha256(folder / name).encode())
    return digest.hexdigest()[:16]
