"""Image encoders: a ViT from timm or open_clip, read out before its last block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmgpt.config import VisionConfig
from mmgpt.errors import UsageError, UserError

if TYPE_CHECKING:
    from mmgpt.data.images import Preprocess


class VisionEncoder(nn.Module):
    """Patch features of an image.

    The features are the output of block `layer` (-2: the last but one), class and register tokens dropped and no final norm
    applied, as LLaVA reads CLIP (Liu et al. 2023, section 4.1). Blocks behind `layer` are removed: they are never run.

    Args:
        trunk: A timm `VisionTransformer`.
        layer: Block whose output is returned; negative counts from the end.
        preprocess: Brings an image to what the encoder was trained on.
        name: What to call it in messages and cache keys.
        info: What `load_vision` needs to build the same architecture again without its weights.
    """

    def __init__(self, trunk: Any, *, layer: int, preprocess: Preprocess, name: str, info: dict[str, Any]):
        super().__init__()
        depth = len(trunk.blocks)
        self.depth = depth
        self.layer = layer if layer >= 0 else depth + layer
        if not 0 <= self.layer < depth:
            raise UsageError(f"model.vision.layer {layer}: {name} has {depth} blocks, so -{depth} to {depth - 1}")
        trunk.blocks = nn.Sequential(*list(trunk.blocks)[: self.layer + 1])
        for unused in ("norm", "fc_norm", "head_drop", "head"):
            if hasattr(trunk, unused):
                setattr(trunk, unused, nn.Identity())
        if getattr(trunk, "attn_pool", None) is not None:
            trunk.attn_pool = None
        self.trunk = trunk
        self.preprocess = preprocess
        self.name = name
        self.info = info
        self.width = int(trunk.embed_dim)
        self.grid: tuple[int, int] = tuple(trunk.patch_embed.grid_size)
        self.gradient_checkpointing = False

    @property
    def patches(self) -> int:
        """Feature rows of one image."""
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S] float, normalised by `preprocess` -> [N, patches, width]."""
        trunk = self.trunk
        hidden = trunk.patch_embed(pixels)
        hidden = trunk._pos_embed(hidden)
        hidden = trunk.patch_drop(hidden)
        hidden = trunk.norm_pre(hidden)
        if self.gradient_checkpointing and self.training:
            from torch.utils.checkpoint import checkpoint

            for block in trunk.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False)
        else:
            hidden = trunk.blocks(hidden)
        return hidden[:, trunk.num_prefix_tokens :]


def load_vision(
    config: VisionConfig, *, info: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Build the encoder that `config.name` stands for, with its weights.

    Args:
        config: `name` is a named part or directory (config.json + model.safetensors in timm's naming), `timm:NAME` or
            `open_clip:NAME/WEIGHTS` (both with their own pretrained weights from the hub).
        info: What `VisionEncoder.info` held when a model was saved: builds the architecture alone, without looking for `name`.
        dtype: Of the weights; those of a directory never stand in memory in another.

    Raises:
        UserError: the part cannot be found, or is not a vision transformer.
    """
    if info is not None:
        trunk = _create(config, info)
    elif config.name.startswith("timm:"):
        trunk, info = _from_timm(config)
    elif config.name.startswith("open_clip:"):
        trunk, info = _from_open_clip(config)
    else:
        trunk, info = _from_directory(config, dtype)
    if not hasattr(trunk, "blocks") or not hasattr(trunk, "_pos_embed"):
        raise UserError(f"{config.name} is not a vision transformer; choose one whose timm class is VisionTransformer")
    from mmgpt.data.images import Preprocess

    preprocess = Preprocess(
        size=int(info["image_size"]),
        resize=config.resize,
        mean=tuple(info["mean"]),
        std=tuple(info["std"]),
        interpolation=info["interpolation"],
    )
    return VisionEncoder(trunk, layer=config.layer, preprocess=preprocess, name=config.name, info=info).to(dtype)


def _create(config: VisionConfig, info: dict[str, Any], *, pretrained: bool = False) -> Any:
    """Make a timm model from `info`: `architecture` names it, or `vit` holds a VisionTransformer's own arguments."""
    if "vit" in info:
        from timm.models.vision_transformer import VisionTransformer

        vit = dict(info["vit"])
        return VisionTransformer(**vit, img_size=info["image_size"], num_classes=0, norm_layer=_LayerNorm)
    import timm

    options = {key: value for key, value in config.options.items() if key != "pretrained"}
    if "image_size" in info:
        options["img_size"] = info["image_size"]
    try:
        return timm.create_model(info["architecture"], pretrained=pretrained, num_classes=0, **options)
    except Exception as error:
        hint = " (its weights come from the hub: is it reachable?)" if pretrained else ""
        raise UserError(f"timm cannot make {info['architecture']}{hint}: {error}") from error


class _LayerNorm(nn.LayerNorm):
    """open_clip's: timm's default has another epsilon."""

    def __init__(self, width: int, **place: Any):
        super().__init__(width, eps=1e-5, **place)


def _from_timm(config: VisionConfig) -> tuple[Any, dict[str, Any]]:
    info: dict[str, Any] = {"architecture": config.name.removeprefix("timm:")}
    size = config.image_size or config.options.get("img_size")
    if size:
        info["image_size"] = size
    trunk = _create(config, info, pretrained=bool(config.options.get("pretrained", True)))
    cfg = trunk.pretrained_cfg
    info.setdefault("image_size", cfg["input_size"][-1])
    return trunk, {**info, "mean": cfg["mean"], "std": cfg["std"], "interpolation": cfg["interpolation"]}


def _from_directory(config: VisionConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from accelerate import init_empty_weights
    from safetensors import SafetensorError, safe_open

    from mmgpt import artifacts

    folder = Path(artifacts.resolve(config.name, kind="vision"))
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = {key: info[key] for key in ("architecture", "image_size", "mean", "std", "interpolation")}
        with safe_open(folder / "model.safetensors", "pt") as file:
            # The positions may have to be interpolated first.
            state = {key: file.get_tensor(key).to(torch.float32 if key == "pos_embed" else dtype) for key in file.keys()}  # noqa: SIM118
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not an image encoder (config.json with a timm architecture): {error}") from error
    info = {**stored, "image_size": config.image_size or stored["image_size"]}
    # Without memory and random numbers for weights that the file's replace.
    with init_empty_weights(include_buffers=False):
        trunk = _create(config, info)
    if info["image_size"] != stored["image_size"]:
        from timm.layers import resample_abs_pos_embed

        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], list(trunk.patch_embed.grid_size), num_prefix_tokens=trunk.num_prefix_tokens
        )
    try:
        missing, unexpected = trunk.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit {info['architecture']}: {error}") from error
    missing = [key for key in missing if not key.startswith(("norm.", "fc_norm.", "head"))]
    if missing or unexpected:
        raise UserError(f"{folder} does not fit {info['architecture']}: missing {missing[:3]}, unknown {unexpected[:3]}")
    return trunk, info


def _from_open_clip(config: VisionConfig) -> tuple[Any, dict[str, Any]]:
    """open_clip's own ViTs are carried over into timm's modules by timm's filter; its timm towers are taken as they are."""
    import open_clip
    from timm.models.vision_transformer import checkpoint_filter_fn

    name = config.name.removeprefix("open_clip:")
    architecture, _, tag = name.partition("/")
    try:
        model = open_clip.create_model(architecture, pretrained=tag or None)
    except Exception as error:
        raise UserError(f"open_clip cannot make {name} (are its weights on the hub, and is it reachable?): {error}") from error
    visual: Any = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, list | tuple) else visual.image_size
    info: dict[str, Any] = {
        "image_size": config.image_size or size,
        "mean": getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN,
        "std": getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }
    if hasattr(visual, "trunk"):
        inner = visual.trunk.default_cfg["architecture"]
        raise UsageError(f"{config.name} is a timm tower inside open_clip: name it as timm:{inner}")
    block = visual.transformer.resblocks[0]
    width = visual.conv1.out_channels
    info["vit"] = {
        "patch_size": visual.conv1.kernel_size[0],
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "pre_norm": True,
        "act_layer": "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
    }
    trunk = _create(config, info)
    state = checkpoint_filter_fn({f"visual.{key}": value for key, value in visual.state_dict().items()}, trunk)
    trunk.load_state_dict(state, strict=False)
    return trunk, info
