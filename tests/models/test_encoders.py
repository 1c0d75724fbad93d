"""Towers: those built here, and any backbone of transformers that a local folder holds."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    ResNetConfig,
    RobertaConfig,
    SiglipVisionConfig,
    SwinConfig,
)

from models.config import EncoderConfig, InputError, TextConfig, VisionConfig
from models.encoders import DualEncoder, Heads, resolve
from tests.support import tiny

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
VISION = {
    "deit": DeiTConfig(image_size=32, patch_size=8, **SMALL),
    "dinov2": Dinov2Config(image_size=32, patch_size=8, **SMALL),
    "dinov2-registers": Dinov2WithRegistersConfig(image_size=32, patch_size=8, **SMALL),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "clip": CLIPVisionConfig(image_size=32, patch_size=8, **SMALL),
    "siglip": SiglipVisionConfig(image_size=32, patch_size=8, **SMALL),
}
PATCHES = {"convnext": 16, "swin": 16, "resnet": 16}
"""Patch tokens at 32 pixels; 16 too where the patch is 8."""
TEXT = {
    "bert": BertConfig(max_position_embeddings=12, **SMALL, **WORDS),
    "roberta": RobertaConfig(max_position_embeddings=14, **SMALL, **WORDS),
    "distilbert": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=12, **WORDS),
    "clip": CLIPTextConfig(max_position_embeddings=12, **SMALL, **WORDS),
}


def saved(config, folder) -> str:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def config(vision: str = "", text: str = "", image_size: int = 32, max_tokens: int = 12) -> EncoderConfig:
    return EncoderConfig(
        vision=VisionConfig(backbone=vision, image_size=image_size, patch_size=8, width=16, layers=1, heads=2),
        text=TextConfig(
            backbone=text, vocab_size=40, max_tokens=max_tokens, max_positions=12, width=16, layers=1, heads=2
        ),
        embed_dim=8,
    )


def pixels(size: int = 32, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(rows))


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 1])[:, None]
    return ids.masked_fill(~mask, 1), mask


def rebuilt(model: DualEncoder, resolved: EncoderConfig) -> DualEncoder:
    """The model from its stored configuration and weights alone."""
    again = DualEncoder(EncoderConfig.model_validate_json(resolved.model_dump_json()))
    again.load_state_dict(model.state_dict())
    return again.eval()


@pytest.mark.parametrize("name", VISION)
def test_a_vision_backbone_of_a_folder_gives_cls_and_patches_and_needs_the_folder_no_more(name, tmp_path):
    folder = saved(VISION[name], tmp_path / "vision")
    resolved = resolve(config(vision=folder))
    model = DualEncoder(resolved, pretrained=True).eval()
    original = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.vision.backbone.state_dict().items())
    (tmp_path / "vision").rename(tmp_path / "gone")
    with torch.no_grad():
        tokens = model.encode_image(pixels())
        assert tokens.shape == (2, 1 + PATCHES.get(name, 16), 16) and model.vision.width == 16
        assert torch.equal(rebuilt(model, resolved).encode_image(pixels()), tokens)
        assert model.encode_image(pixels(rows=0)).shape == (0, *tokens.shape[1:])


@pytest.mark.parametrize("name", ["deit", "dinov2", "dinov2-registers", "clip", "siglip"])
@pytest.mark.parametrize(("size", "patches"), [(16, 4), (36, 16), (48, 36)])
def test_a_vision_backbone_takes_other_sizes_and_drops_what_fills_no_patch(name, size, patches, tmp_path):
    resolved = resolve(config(vision=saved(VISION[name], tmp_path), image_size=size))
    assert DualEncoder(resolved).encode_image(pixels(size)).shape == (2, 1 + patches, 16)


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_a_backbone_without_cls_puts_the_mean_of_its_patches_first(name, tmp_path):
    model = DualEncoder(resolve(config(vision=saved(VISION[name], tmp_path)))).eval()
    tokens = model.encode_image(pixels())
    assert torch.allclose(tokens[:, 0], tokens[:, 1:].mean(1), atol=1e-6)


def test_distillation_and_register_tokens_are_no_patches(tmp_path):
    for name, extra in (("deit", 2), ("dinov2-registers", 5)):
        model = DualEncoder(resolve(config(vision=saved(VISION[name], tmp_path / name)))).eval()
        states = model.vision.backbone(pixel_values=pixels()).last_hidden_state
        expected = torch.cat([states[:, :1], states[:, extra:]], 1)
        assert torch.allclose(model.encode_image(pixels()), expected, atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_a_text_backbone_of_a_folder_gives_a_state_a_token_and_needs_the_folder_no_more(name, tmp_path):
    folder = saved(TEXT[name], tmp_path / "text")
    resolved = resolve(config(text=folder))
    model = DualEncoder(resolved, pretrained=True).eval()
    original = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.text.backbone.state_dict().items())
    (tmp_path / "text").rename(tmp_path / "gone")
    ids, mask = captions()
    with torch.no_grad():
        states = model.encode_text(ids, mask)
        assert states.shape == (3, 12, 16) and model.text.word_embeddings.shape == (40, 16)
        assert torch.equal(rebuilt(model, resolved).encode_text(ids, mask), states)
        assert model.encode_text(ids[:0], mask[:0]).shape == (0, 12, 16)


@pytest.mark.parametrize("name", TEXT)
def test_the_first_state_sees_every_word_and_no_padding(name, tmp_path):
    model = DualEncoder(resolve(config(text=saved(TEXT[name], tmp_path)))).eval()
    ids, mask = captions()
    first = model.encode_text(ids, mask)[:, 0]
    for word in range(1, 5):
        changed = ids.clone()
        changed[:2, word] = ids[:2, word] % 35 + 4  # another word
        other = model.encode_text(changed, mask)[:, 0]
        assert not torch.allclose(other[:2], first[:2], atol=1e-5)
    padded = ids.masked_fill(~mask, 7)
    if name != "roberta":  # numbers its positions by what is no [PAD]
        assert torch.allclose(model.encode_text(padded, mask)[:, 0], first, atol=1e-5)
    assert torch.allclose(model.encode_text(ids[1:2, :5], mask[1:2, :5])[:, 0], first[1:2], atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_captions_longer_than_the_position_table_are_refused(name, tmp_path):
    folder = saved(TEXT[name], tmp_path)
    resolve(config(text=folder, max_tokens=12))
    with pytest.raises(InputError, match=r"encoder\.text\.max_tokens: 13 is more than the 12 positions"):
        resolve(config(text=folder, max_tokens=13))


def test_a_two_tower_folder_gives_the_tower_that_is_meant(tmp_path):
    pair = CLIPConfig(text_config=TEXT["clip"].to_dict(), vision_config=VISION["clip"].to_dict(), projection_dim=8)
    folder = saved(pair, tmp_path)
    resolved = resolve(config(vision=folder, text=folder))
    model, original = DualEncoder(resolved, pretrained=True), AutoModel.from_pretrained(folder)
    assert torch.equal(model.text.word_embeddings, original.text_model.get_input_embeddings().weight)
    ids, mask = captions()
    with torch.no_grad():
        states = original.vision_model(pixel_values=pixels()).last_hidden_state
        assert torch.equal(model.eval().encode_image(pixels()), states)
        assert torch.equal(rebuilt(model, resolved).encode_text(ids, mask), model.encode_text(ids, mask))


def test_a_model_stored_in_sixteen_bits_is_trained_in_thirty_two(tmp_path):
    AutoModel.from_config(TEXT["bert"]).to(torch.bfloat16).save_pretrained(tmp_path)
    resolved = resolve(config(text=str(tmp_path)))
    for pretrained in (False, True):
        model = DualEncoder(resolved, pretrained=pretrained)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision.backbone": "/no/such/folder"},
            r"encoder\.vision\.backbone: no transformers model at '/no/such/folder'",
        ),
        ({"text.backbone": "/no/such/folder"}, r"encoder\.text\.backbone: no transformers model"),
        ({"vision.heads": 3}, r"encoder\.vision\.heads: 3 does not divide encoder\.vision\.width 16"),
        ({"text.heads": 5}, r"encoder\.text\.heads: 5 does not divide encoder\.text\.width 16"),
        ({"vision.image_size": 7}, r"encoder\.vision\.image_size: 7 is less than a patch \(8\)"),
        ({"text.max_tokens": 13}, r"encoder\.text\.max_tokens: 13 is more than the 12 positions"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        resolve(config().override(changes))
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_of_an_unknown_kind_is_refused(tmp_path):
    TEXT["bert"].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights in safetensors"):
        DualEncoder(resolve(config(text=str(tmp_path))), pretrained=True)
    (tmp_path / "config.json").write_text('{"model_type": "encoder-decoder-of-nobody"}')
    with pytest.raises(InputError, match="no transformers model"):
        resolve(config(text=str(tmp_path)))


def test_fusion_heads_must_divide_the_width_of_the_text_tower(tmp_path):
    odd = BertConfig(hidden_size=18, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=40)
    resolved = resolve(config(text=saved(odd, tmp_path)).override({"text.heads": 4}))
    DualEncoder(resolved)
    with pytest.raises(InputError, match="4 does not divide the text tower's width 18"):
        DualEncoder(resolved, Heads(matching=True))


@pytest.mark.parametrize("size", [16, 19])
def test_the_built_vision_tower_is_a_vit_of_the_given_size(size):
    resolved = resolve(
        EncoderConfig(vision=tiny.encoder().vision.model_copy(update={"architecture": {}, "image_size": size}))
    )
    model = DualEncoder(resolved)
    assert model.encode_image(pixels(size)).shape == (2, 17, 16)
    assert len(model.vision.backbone.layers) == 1 and not any("pooler" in n for n, _ in model.named_parameters())
    norm = model.vision.backbone.layernorm
    assert norm.eps == 1e-6 and model.text.backbone.embeddings.LayerNorm.eps == 1e-12


def test_a_sample_is_encoded_alike_alone_and_in_a_batch():
    model = DualEncoder(tiny.encoder()).double().eval()
    rows = tiny.batch(4)
    image, text = model.encode_image(rows.view1), model.encode_text(rows.ids, rows.mask)
    for b in range(4):
        length = int(rows.mask[b].sum())
        alone = model.encode_text(rows.ids[b : b + 1, :length], rows.mask[b : b + 1, :length])
        assert torch.allclose(alone, text[b : b + 1, :length], atol=1e-12)
        assert torch.allclose(model.encode_image(rows.view1[b : b + 1]), image[b : b + 1], atol=1e-12)


def test_vectors_have_length_one():
    model = DualEncoder(tiny.encoder())
    for vectors in (model.project_image(torch.randn(3, 5, 16)), model.project_text(torch.randn(4, 16))):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(1)) and vectors.shape[-1] == 8


def test_an_empty_batch_still_reaches_every_parameter():
    model = DualEncoder(tiny.encoder())
    image = model.project_image(model.encode_image(pixels(16, rows=0))[:, 0])
    text = model.project_text(model.encode_text(torch.zeros(0, 6).long(), torch.zeros(0, 6).bool())[:, 0])
    assert image.shape == text.shape == (0, 8)
    (image.sum() + text.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name != "temperature"}
    assert all(g is not None and not g.any() for g in gradients.values())


def test_matching_looks_at_the_image_and_at_words_but_not_at_padding():
    torch.manual_seed(0)
    model = DualEncoder(tiny.encoder(), Heads(matching=True)).double().eval()
    rows = tiny.batch(3)
    image, text = model.encode_image(rows.view1), model.encode_text(rows.ids, rows.mask)
    logits = model.fusion.match_logits(text, rows.mask, image)
    assert logits.shape == (3, 2)
    garbage = torch.where(rows.mask[:, :, None], text, torch.full_like(text, 9.0))
    assert torch.allclose(model.fusion.match_logits(garbage, rows.mask, image), logits, atol=1e-12)
    assert not torch.allclose(model.fusion.match_logits(text, rows.mask, image.flip(0))[0], logits[0], atol=1e-6)
