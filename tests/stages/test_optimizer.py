"""Freezing, optimizer groups, and the schedule against its closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import nn

from mmgpt.config import LoraConfig, OptimizerConfig
from mmgpt.errors import UsageError
from mmgpt.model.adapters import add_lora
from mmgpt.stages.optimizer import freeze, make_optimizer, parameter_groups, rate_factor


def names(model, group):
    chosen = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


@given(st.integers(1, 400), st.floats(0, 0.5), st.floats(0, 1))
def test_the_schedule_rises_then_falls_to_its_end(total, warmup, final):
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    factors = [rate_factor(step, total, warmup, final) for step in range(total)]
    assert all(0 < f <= 1 for f in factors) or final == 0
    assert factors[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert all(a >= b - 1e-12 for a, b in zip(factors[rise:], factors[rise + 1 :]))
    for end in (total, total + 1, 10 * total + 10):
        if rise < total:
            assert rate_factor(end, total, warmup, final) == pytest.approx(final)


def test_the_schedule_at_known_points():
    assert rate_factor(0, 100, 0.0, 0.1) == 1.0
    assert rate_factor(0, 100, 0.1, 0.1) == pytest.approx(0.1) and rate_factor(9, 100, 0.1, 0.1) == 1.0
    assert rate_factor(10, 100, 0.1, 0.1) == 1.0
    assert rate_factor(55, 100, 0.1, 0.1) == pytest.approx(0.55)  # half of the cosine: the middle of 1 and 0.1
    assert rate_factor(100, 100, 0.1, 0.1) == pytest.approx(0.1)
    assert rate_factor(40, 100, 0.1, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_freezing_by_part():
    model = tiny_model("gpt2")
    freeze(model, {"vision": 0.0, "projector": 1e-3, "language": 0.0})
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}
    assert model.projector.training and not model.language.training and not model.vision.training
    freeze(model, {"vision": 1e-5, "projector": 0.0, "language": 1e-5})
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"vision", "language"}
    assert all(m.training for m in model.language.modules()) and not model.projector.training
    with pytest.raises(UsageError, match=r"optimizer\.lr\.projector"):
        freeze(model, {"vision": 0.0, "projector": 0.0, "language": 0.0})
    with pytest.raises(UsageError):
        freeze(tiny_model("llama", vision=False), {"vision": 1e-3, "projector": 1e-3, "language": 0.0})


def test_with_adapters_only_they_learn():
    model = tiny_model("llama")
    add_lora(model.language, LoraConfig(rank=2))
    rates = {"vision": 0.0, "projector": 1e-3, "language": 1e-4}
    freeze(model, rates)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("projector.") or ".lora_" in name for name in learnt)
    groups = {group["name"]: group for group in parameter_groups(model, rates, 0.1)}
    assert groups["language"]["lr"] == 1e-4 and all(".lora_" in name for name in names(model, groups["language"]))
    freeze(model, {**rates, "language": 0.0})
    assert not any(p.requires_grad for p in model.language.parameters())


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("projector", ["pixel_shuffle", "resampler"])
def test_only_matrices_of_layers_decay(family, projector):
    model = tiny_model(family, projector=projector)
    rates = {"vision": 1e-4, "projector": 1e-3, "language": 1e-5}
    freeze(model, rates)
    groups = parameter_groups(model, rates, 0.1)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})  # each once, tied weights too
    assert {(g["name"].split(",")[0], g["lr"]) for g in groups} == set(rates.items())
    decayed = set().union(*(names(model, g) for g in groups if g["weight_decay"] > 0))
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            matrix = isinstance(module, kinds) or type(module).__name__ == "Conv1D"
            expected = matrix and name.endswith("weight")
            if (f"{path}.{name}") == "language.lm_head.weight" and family != "llama":
                expected = False  # it is the embedding of tokens
            if f"{path}.{name}" in names(model, {"params": list(model.parameters())}):
                assert (f"{path}.{name}" in decayed) == expected, f"{path}.{name}"
    assert all(g["weight_decay"] in (0.0, 0.1) for g in groups)


def test_the_optimizer_follows_the_schedule():
    model = nn.Module()
    model.projector = nn.Linear(3, 3)
    config = OptimizerConfig(warmup=0.2, final_lr=0.1, betas=(0.8, 0.9), eps=1e-6)
    optimizer, schedule = make_optimizer(model, config, {"projector": 2e-3}, total_steps=10)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([2e-3 * rate_factor(step, 10, 0.2, 0.1) for step in range(10)])
