"""timm's ViT, as converted, against transformers' CLIP tower, at every layer."""

import pytest
import torch
from tiny_models import enliven

from mmgpt.config import VisionConfig
from mmgpt.convert import CLIP_MEAN, CLIP_STD, clip_to_timm, write_vision
from mmgpt.model.vision import load_vision

ARCHITECTURE = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}


@pytest.fixture(scope="module", params=ARCHITECTURE)
def tower(request, tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp(request.param)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act=request.param,
    )
    model = enliven(CLIPVisionModel(config)).eval()
    state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in model.state_dict().items()}
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
    description = {"image_size": 32, "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "options": options}
    write_vision(folder, clip_to_timm(state), {"architecture": ARCHITECTURE[request.param], **description})
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 2])
def test_features_equal_hidden_states(tower, layer):
    model, folder = tower
    encoder = load_vision(VisionConfig(name=str(folder), layer=layer)).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = model(pixels, output_hidden_states=True).hidden_states
    # hidden_states[0] stands before the first block.
    expected = states[layer if layer < 0 else layer + 1][:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)


def test_every_weight_of_the_tower_is_used(tower):
    model, folder = tower
    encoder = load_vision(VisionConfig(name=str(folder), layer=-1))
    unused = sum(p.numel() for n, p in model.named_parameters() if "post_layernorm" in n)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in model.parameters()) - unused
