"""AdamW with a rate for each part of the model, linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmgpt.config import OptimizerConfig
from mmgpt.errors import UsageError


def freeze(model: nn.Module, rates: dict[str, float]) -> None:
    """Let only the parts with a rate learn; in a part with adapters, only the adapters.

    Frozen parts are put into eval mode, so that they have no dropout.

    Args:
        model: Has the parts as attributes.
        rates: Peak learning rate by part; 0 freezes it.

    Raises:
        UsageError: no part would learn.
    """
    for part, rate in rates.items():
        module = getattr(model, part, None)
        if module is None:
            continue
        adapted = any(".lora_" in name for name, _ in module.named_parameters())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(rate > 0 and (not adapted or ".lora_" in name))
        module.train(rate > 0)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("every part is frozen: give optimizer.lr.projector, .language or .vision a value above 0")


def freeze_unembedding(language: nn.Module) -> None:
    """No gradient for an unembedding that is no embedding as well, where a scalar head stands in its place."""
    unembedding = language.get_output_embeddings()  # type: ignore[operator]
    embedding = language.get_input_embeddings()  # type: ignore[operator]
    if isinstance(unembedding, nn.Module) and unembedding.weight is not embedding.weight:
        unembedding.requires_grad_(False)


def no_gradient(module: nn.Module, unreached: Callable[[str], bool]) -> Any:
    """0, with a gradient of 0 for every learning parameter that a loss does not reach: backward, and every rank, must find one.

    Args:
        module: The stage.
        unreached: Says it of a parameter's name.
    """
    return 0.0 * sum(p.sum() for name, p in module.named_parameters() if p.requires_grad and unreached(name))


def beside_language(name: str) -> bool:
    """Whether a parameter is one that text alone does not reach: of an encoder or a projector."""
    return ".language." not in name


def learnt_state(module: nn.Module, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What learns of a state dict: frozen parts are found by name again, and a checkpoint stays small."""
    learnt = {f"{prefix}{name}" for name, p in module.named_parameters() if p.requires_grad}
    return {key: value for key, value in state.items() if key in learnt}


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: by part, and by whether weight decay applies.

    It does to the matrices of layers, not to embeddings: of tokens, of positions, the class token, a resampler's queries.
    """
    groups = []
    for part, rate in rates.items():
        module = getattr(model, part, None)
        if module is None or rate == 0:
            continue
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.dim() >= 2 and name.endswith("weight") and id(parameter) not in embeddings
                (matrices if matrix else rest).append(parameter)
        groups.append({"name": part, "params": matrices, "lr": rate, "weight_decay": weight_decay})
        groups.append({"name": f"{part}, no decay", "params": rest, "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def rate_factor(step: int, total: int, warmup: float, final: float) -> float:
    """Share of the peak rate at a step: linear from 0 over the warm-up, then half a cosine down to `final`.

    Args:
        step: Optimizer steps done, from 0.
        total: Optimizer steps of the run.
        warmup: Share of `total` that the rise takes.
        final: Where the cosine ends.
    """
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, total - rise))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, rates: dict[str, float], total_steps: int, *, fused: bool = True
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its schedule, to be stepped once an optimizer step; not `fused` where a loss scaler unscales in between."""
    groups = parameter_groups(model, rates, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, config.warmup, config.final_lr)
    )
    return optimizer, schedule
