"""Low-rank adapters: nothing changes at the start, and merging changes nothing at the end."""

import copy
import warnings

import pytest
import torch
from tiny_models import VIT, enliven, make_batch, noise, talk, tiny_config, tiny_model

from mmgpt.config import LoraConfig, VisionConfig
from mmgpt.errors import UsageError
from mmgpt.model.adapters import add_lora, merge_lora, only_adapters_learn
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.model.vision import load_vision
from mmgpt.stages.optimizer import freeze

LORA = LoraConfig(rank=4, alpha=8.0)
ROWS = [[talk([noise(0), "What?"], "A pear.")]]


def adapters(module):
    return {name: p for name, p in module.named_parameters() if ".lora_" in name}


def move(module) -> None:
    """As training would."""
    with torch.no_grad():
        for number, parameter in enumerate(adapters(module).values()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_output_does_not_change_until_b_does_and_merging_keeps_it(family):
    model = tiny_model(family)
    batch = make_batch(model, ROWS)
    before = model(batch)
    names = {name for name, _ in model.named_parameters()}
    add_lora(model.language, LORA)
    add_lora(model.vision, LORA)
    model.eval()
    assert torch.equal(model(batch), before)
    move(model.language)
    move(model.vision)
    adapted = model(batch)
    assert (adapted - before).abs().max() > 0.05
    merge_lora(model.language)
    merge_lora(model.vision)
    assert {name for name, _ in model.named_parameters()} == names
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Already found a .peft_config.")
        add_lora(model.language, LORA)
    merge_lora(model.language)
    torch.testing.assert_close(model(batch), adapted, atol=1e-4, rtol=1e-4)  # 5e-5 seen, by the order of fp32 sums


@torch.no_grad()
def test_the_update_is_alpha_over_rank_times_b_a():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    weight = layer[0].weight.clone()
    add_lora(layer, LoraConfig(rank=2, alpha=6.0))
    move(layer)
    a, b = layer[0].lora_A["default"].weight, layer[0].lora_B["default"].weight
    expected = weight + 6.0 / 2 * b @ a
    merge_lora(layer)
    torch.testing.assert_close(layer[0].weight, expected)


def test_all_linear_is_every_linear_layer_but_the_output_embedding():
    model = tiny_model("llama")
    add_lora(model.language, LORA)
    adapted = {name.split(".lora_")[0] for name in adapters(model.language)}
    linear = {name.removesuffix(".base_layer") for name, m in model.language.named_modules() if type(m) is torch.nn.Linear}
    linear = {name for name in linear if ".lora_" not in name}
    assert adapted == linear - {"lm_head"} and len(adapted) == 2 * 7
    encoder = load_vision(VisionConfig(name="timm:vit_tiny_patch16_224", layer=-1, options=dict(VIT)))
    add_lora(encoder, LORA)
    assert {name.split(".")[-4] for name in adapters(encoder)} == {"qkv", "proj", "fc1", "fc2"}


def test_named_targets():
    language = tiny_model("llama", vision=False).language
    add_lora(language, LoraConfig(rank=2, targets=["q_proj", "v_proj"]))
    assert {name.split(".")[-4] for name in adapters(language)} == {"q_proj", "v_proj"} and len(adapters(language)) == 8
    with pytest.raises(UsageError, match=r"no layer is called.*q_proj.*all-linear"):
        add_lora(tiny_model("llama", vision=False).language, LoraConfig(rank=2, targets=["query"]))


def test_dropout_applies_in_training_only():
    model = enliven(copy.deepcopy(tiny_model("llama", vision=False)))
    add_lora(model.language, LoraConfig(rank=4, dropout=0.5))
    move(model.language)
    batch = make_batch(model, [[talk("What?", "A pear.")]])
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(batch), model(batch))
        model.eval()
        assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(("rates", "alone"), [((0.0, 0.0, 1e-3), True), ((0.0, 1e-3, 1e-3), False), ((1e-3, 0.0, 1e-3), False)])
def test_adapters_off_is_a_reference_where_adapters_alone_learn(rates: tuple[float, float, float], alone: bool) -> None:
    """Adapters in the decoder do not make a reference of a model whose encoder or projector learns whole."""
    config = tiny_config()
    config.language.lora = LoraConfig(rank=2)
    model = MultimodalGPT.from_config(config)
    freeze(model, dict(zip(("vision", "projector", "language"), rates)))
    assert only_adapters_learn(model) == alone


def test_broken_adapters_are_not_merged():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    add_lora(layer, LoraConfig(rank=2))
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(layer)
