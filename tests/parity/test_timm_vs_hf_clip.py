"""timm's ViT, as converted, against transformers' CLIP tower, at every layer."""

from dataclasses import replace

import pytest
import torch
from tiny_models import enliven, write_clip

from mmgpt.model.vision import load_vision


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def tower(request, tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

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
    return model, write_clip(tmp_path_factory.mktemp("clip"), model)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 2])
def test_features_equal_hidden_states(tower, layer):
    model, config = tower
    encoder = load_vision(replace(config, layer=layer)).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = model(pixels, output_hidden_states=True).hidden_states
    # hidden_states[0] stands before the first block.
    expected = states[layer if layer < 0 else layer + 1][:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)


def test_every_weight_of_the_tower_is_used(tower):
    model, config = tower
    encoder = load_vision(replace(config, layer=-1))
    unused = sum(p.numel() for n, p in model.named_parameters() if "post_layernorm" in n)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in model.parameters()) - unused
