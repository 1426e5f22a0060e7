"""Low-rank adapters (Hu et al. 2021) in any part of the model, through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmgpt.config import LoraConfig
from mmgpt.errors import UsageError


def add_lora(module: nn.Module, config: LoraConfig) -> None:
    """Put adapters into a module in place; B starts at 0, so its output does not change (section 4.1).

    `all-linear` takes every linear layer but the output embedding.

    Raises:
        UsageError: none of the named layers exists.
    """
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model

    linear = sorted({name for name, layer in module.named_modules() if _is_linear(layer) and "lm_head" not in name})
    targets = config.targets
    chosen = linear if targets == "all-linear" else [n for n in linear if n.split(".")[-1] in targets]
    if not chosen:
        names = sorted({name.split(".")[-1] for name in linear})
        raise UsageError(f"no layer is called {targets}; LoRA targets can be {', '.join(names)}, or all-linear")
    alpha: Any = config.alpha  # peft's annotation says int; its arithmetic is that of floats
    settings = PeftLora(r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, target_modules=chosen)
    inject_adapter_in_model(settings, module)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def merge_lora(module: nn.Module) -> None:
    """Add every adapter to the weight it adapts and remove it, in place: W + alpha / rank * B A."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            merged = merged_weight(layer)
            if not torch.isfinite(merged).all():
                raise ValueError(f"the adapters of {name} are broken: the merged weight is not finite")
            base.weight.data = merged
            parent_name, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent_name), child, base)
    # peft's note that there are adapters: it would warn of a second set when the next run adds its own.
    module.__dict__.pop("peft_config", None)


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """An adapted layer's weight with its adapters in it, added up in single precision and rounded once; the layer stays as it is.

    Args:
        layer: A `LoraLayer` of peft.
    """
    weight = layer.get_base_layer().weight
    change = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    merged: torch.Tensor = (weight.float() + change).to(weight.dtype)
    return merged


def only_adapters_learn(module: nn.Module) -> bool:
    """Whether `adapters_off` gives back the module that training began with: nothing but adapters learns."""
    return all(".lora_" in name for name, parameter in module.named_parameters() if parameter.requires_grad)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module as it was before its adapters learnt anything: policy and reference share the weights that both stand on."""
    from peft.tuners.lora import LoraLayer

    adapted: list[Any] = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    learnt = {parameter: parameter.requires_grad for parameter in module.parameters()}
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)
        # peft lets every adapter learn that it turns on.
        for parameter, learns in learnt.items():
            parameter.requires_grad_(learns)
