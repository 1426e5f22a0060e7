"""Models of a few ten thousand random weights, pictures of noise and conversations about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

from mmgpt.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mmgpt.convert import CLIP_MEAN, CLIP_STD, clip_to_timm
from mmgpt.data.messages import normalize
from mmgpt.data.packing import Batch, collate
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.model.multimodal import MultimodalGPT

_COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_LIKE = {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "tied": {"model_type": "llama", **_LLAMA_LIKE, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE},
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON, "max_position_embeddings": 512},
    # Windows shorter than the conversations of the tests.
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        **_LLAMA_LIKE,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
VIT = {"pretrained": False, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def tiny_config(family: str = "llama", *, projector: str = "mlp2x_gelu", vision: bool = True, **changes: Any) -> ModelConfig:
    """16 patches an image; `pixel_shuffle` makes 4 tokens of them, `resampler` 3."""
    encoder = VisionConfig(name="timm:vit_tiny_patch16_224", layer=-1, options=dict(VIT))
    return ModelConfig(
        vision=encoder if vision else None,
        projector=ProjectorConfig(kind=projector, queries=3, heads=4),  # type: ignore[arg-type]
        language=LanguageConfig(architecture=dict(ARCHITECTURES[family])),
        **changes,
    )


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> MultimodalGPT:
    torch.manual_seed(seed)
    return enliven(MultimodalGPT.from_config(tiny_config(family, **changes)), seed).eval()


def enliven(model: Any, seed: int = 0, scale: float = 0.15) -> Any:
    """Weights large enough that every input matters: fresh ones of std 0.02 hide a leak or a wrong mask in rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def write_clip(folder: Path, model: Any, **options: Any) -> VisionConfig:
    """A CLIP tower of transformers (`CLIPVisionModel`) as an encoder directory in timm's names."""
    settings = model.config
    state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in model.state_dict().items()}
    names = {"quick_gelu": "vit_base_patch16_clip_quickgelu_224", "gelu": "vit_base_patch16_clip_224"}
    description = {
        "architecture": names[settings.hidden_act],
        "image_size": settings.image_size,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
    }
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in clip_to_timm(state).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description))
    shape = {
        "patch_size": settings.patch_size,
        "embed_dim": settings.hidden_size,
        "depth": settings.num_hidden_layers,
        "num_heads": settings.num_attention_heads,
        "mlp_ratio": settings.intermediate_size / settings.hidden_size,
    }
    return VisionConfig(name=str(folder), options=shape, **options)


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def talk(question: Sequence[Any] | str, answer: str = "yes") -> list[dict[str, Any]]:
    """One question, as text or as a list of texts and images, and its answer."""
    parts = [question] if isinstance(question, str) else question
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def make_batch(model: MultimodalGPT, rows: Sequence[Sequence[Any]]) -> Batch:
    """Conversations in rows -> a batch with its pixels."""
    encoded = [[model.encode(normalize(conversation)) for conversation in row] for row in rows]
    batch = collate(encoded, model.tokenizer.pad_id)
    batch.images = model.pixels(batch.images) if batch.images else None
    return batch


def bpe_tokenizer(extra: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Backend:
    """A byte-level BPE with some hundred merges, trained on its own documentation."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(extra),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = Path(__file__).read_text(encoding="utf-8")
    backend.train_from_iterator([*text.splitlines(), *["user\nWhat is this? assistant\nThis is a pear."] * 20], trainer)
    return backend


def bpe(**names: str) -> Tokenizer:
    return Tokenizer(bpe_tokenizer(), **names)


def grads(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
