"""Image encoders: the layer that is read, tokens that are dropped, parts that do not fit."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import VIT, enliven

from mmgpt.config import VisionConfig
from mmgpt.data.images import Preprocess
from mmgpt.errors import UsageError, UserError
from mmgpt.model.vision import VisionEncoder, load_vision

PREPROCESS = Preprocess(32)
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}


def encoder(layer=-2, **changes):
    torch.manual_seed(0)
    trunk = enliven(VisionTransformer(**{**SHAPE, **changes}))
    return VisionEncoder(trunk, layer=layer, preprocess=PREPROCESS, name="vit", info={}).eval()


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 2])
@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}, {"pre_norm": True}])
def test_features_equal_timms_intermediates(layer, changes):
    pixels = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    trunk = enliven(VisionTransformer(**{**SHAPE, **changes})).eval()
    expected = trunk.get_intermediate_layers(pixels, n=[layer % 3], norm=False)[0]
    mine = encoder(layer, **changes)
    found = mine(pixels)
    assert found.shape == (2, 16, 32) and mine.patches == 16 and mine.grid == (4, 4) and mine.width == 32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_blocks_behind_the_layer_are_gone():
    assert len(encoder(-2).trunk.blocks) == 2 and len(encoder(0).trunk.blocks) == 1
    names = [name for name, _ in encoder(-1).named_parameters()]
    assert not [name for name in names if name.startswith(("trunk.norm.", "trunk.head", "trunk.fc_norm"))]


def test_checkpointed_gradients_are_the_same():
    pixels = torch.randn(2, 3, 32, 32)
    found = []
    for checkpointing in (False, True):
        model = encoder().train()
        model.gradient_checkpointing = checkpointing
        model(pixels).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("layer", [3, -4, 7])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(UsageError, match=rf"model\.vision\.layer {layer}: vit has 3 blocks, so -3 to 2"):
        encoder(layer)


def from_scratch(**changes):
    torch.manual_seed(0)
    return load_vision(VisionConfig(**{"name": "timm:vit_tiny_patch16_224", "options": dict(VIT), **changes}))


def test_a_timm_encoder_from_scratch_and_its_size():
    assert from_scratch().preprocess.size == 32
    larger = from_scratch(image_size=48, resize="squash")
    assert larger.grid == (6, 6) and larger.preprocess.size == 48 and larger.preprocess.resize == "squash"
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 36, 32)


def test_info_builds_the_same_architecture_again():
    first = from_scratch(image_size=48, layer=-1)
    info = json.loads(json.dumps(first.info))
    second = load_vision(VisionConfig(name="anything", layer=-1, image_size=48, options=dict(VIT)), info=info)
    second.load_state_dict(first.state_dict())
    assert second.preprocess == first.preprocess


def write(folder, trunk, **changes):
    from safetensors.torch import save_file

    info = {"architecture": "vit_tiny_patch16_224", "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps({**info, "interpolation": "bicubic", **changes}))
    save_file(trunk.state_dict(), folder / "model.safetensors")
    return VisionConfig(name=str(folder), layer=-1, options=dict(VIT))


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    trunk = enliven(VisionTransformer(**{**SHAPE, "depth": 2, "qkv_bias": True}))
    return write(tmp_path, trunk), trunk.eval(), tmp_path


@torch.no_grad()
def test_a_directory_is_read_and_may_be_used_at_another_size(directory):
    from dataclasses import replace

    config, trunk, _ = directory
    pixels = torch.randn(1, 3, 32, 32)
    expected = trunk.get_intermediate_layers(pixels, n=[1], norm=False)[0]
    torch.testing.assert_close(load_vision(config).eval()(pixels), expected, atol=1e-6, rtol=1e-6)
    larger = load_vision(replace(config, image_size=64)).eval()
    assert larger.grid == (8, 8) and larger(torch.randn(1, 3, 64, 64)).shape == (1, 64, 32)
    # The class token's position stays, those of the patches are interpolated: their mean hardly moves.
    torch.testing.assert_close(larger.trunk.pos_embed[:, 0], trunk.pos_embed[:, 0])
    assert (larger.trunk.pos_embed[:, 1:].mean(1) - trunk.pos_embed[:, 1:].mean(1)).abs().max() < 0.02


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "no config", "bad config", "key missing", "other shape", "lacks", "unknown"]
)
def test_broken_directories_are_named(directory, damage):
    config, trunk, folder = directory
    weights, description = folder / "model.safetensors", folder / "config.json"
    state = trunk.state_dict()
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "no config":
        description.unlink()
    elif damage == "bad config":
        description.write_text("{")
    elif damage == "key missing":
        description.write_text("{}")
    elif damage == "other shape":
        write(folder, VisionTransformer(**{**SHAPE, "depth": 2, "embed_dim": 64}))
    else:
        from safetensors.torch import save_file

        state = {k: v for k, v in state.items() if k != "cls_token"} if damage == "lacks" else {**state, "extra": torch.zeros(1)}
        save_file(state, weights)
    with pytest.raises(UserError) as caught:
        load_vision(config)
    assert str(folder) in str(caught.value)


def test_what_is_no_vision_transformer_is_refused():
    with pytest.raises(UserError, match="not a vision transformer"):
        load_vision(VisionConfig(name="timm:resnet10t", options={"pretrained": False}))
    with pytest.raises(UserError, match="timm cannot make no_such_net"):
        load_vision(VisionConfig(name="timm:no_such_net", options={"pretrained": False}))


@torch.no_grad()
@pytest.mark.parametrize("quick", [True, False])
def test_an_open_clip_tower_becomes_timms(tmp_path, quick):
    import open_clip

    settings = {
        "embed_dim": 16,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    name = f"tiny-{quick}"
    (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).visual.eval()
    torch.manual_seed(0)
    mine = load_vision(VisionConfig(name=f"open_clip:{name}", layer=-2)).eval()
    seen = []
    theirs.transformer.resblocks[1].register_forward_hook(lambda module, arguments, output: seen.append(output))
    pixels = torch.randn(2, 3, 32, 32)
    theirs(pixels)
    torch.testing.assert_close(mine(pixels), seen[0][:, 1:], atol=1e-5, rtol=1e-5)
    again = load_vision(VisionConfig(name="anything", layer=-2), info=json.loads(json.dumps(mine.info))).eval()
    again.load_state_dict(mine.state_dict())
    torch.testing.assert_close(again(pixels), mine(pixels))
