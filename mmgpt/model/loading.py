"""A trained model made ready to answer: device, precision, threads."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from mmgpt import machine
from mmgpt.errors import UsageError

if TYPE_CHECKING:
    from mmgpt.model.multimodal import MultimodalGPT


def load_for_answering(path: str | Path, *, device: str = "auto", precision: str = "auto") -> MultimodalGPT:
    """See `mmgpt.load`."""
    import torch

    from mmgpt.model.decoder import Decoder
    from mmgpt.model.multimodal import MultimodalGPT

    if precision not in ("auto", "fp32", "bf16", "fp16", "int8"):
        raise UsageError(f"precision {precision!r}: choose auto, fp32, bf16, fp16 or int8")
    machine.set_threads()
    place = machine.pick_device(device)
    if precision == "auto":
        precision = "bf16" if place.type == "cuda" and machine.has_bf16(place) else "fp32"
    if precision in ("fp16", "int8") and place.type != "cpu":
        raise UsageError(f"precision {precision} is for the CPU; a GPU is faster in bf16")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = _named(path) or MultimodalGPT.from_pretrained(path, dtype=dtype)
    _return_freed_memory()
    model.to(place, dtype)
    release = place.type == "cpu" and precision != "fp32"
    model.decoder = Decoder.from_language(model.language, precision, release=release)  # type: ignore[arg-type]
    _return_freed_memory()
    return model.eval()


def _named(path: str | Path) -> MultimodalGPT | None:
    """The language model of that name, as it is; None where the name is another thing, or a folder."""
    from mmgpt.config import LanguageConfig, ModelConfig
    from mmgpt.model.multimodal import MultimodalGPT
    from mmgpt.parts import PARTS

    part = PARTS.get(str(path))
    if part is None or part.kind != "language" or Path(path).exists():
        return None
    return MultimodalGPT.from_config(ModelConfig(vision=None, language=LanguageConfig(name=part.name)))


def _return_freed_memory() -> None:
    """Give the system back what reading and joining weights freed; glibc keeps such holes, 240 MB for a model of 135M."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
