"""A trained model made ready to answer: device, precision, threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    with _freed_memory_returned():
        model = _named(path) or MultimodalGPT.from_pretrained(path, dtype=dtype)
        model.to(place, dtype)
        release = place.type == "cpu" and precision != "fp32"
        model.decoder = Decoder.from_language(model.language, precision, release=release)  # type: ignore[arg-type]
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


# glibc's malloc.h, and how far its thresholds move by themselves in a process that frees large blocks.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
APART, LARGEST = 1 << 18, 1 << 25


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Give the system back what is freed inside, a weight at a time.

    glibc keeps blocks of up to 32 MB in its heap, where the copies that reading, joining and rearranging weights make leave
    holes: 90 MB at the peak of a model of 135M with its encoder, 400 MB in the end. Setting its thresholds ends their moving by
    themselves; afterwards they stand where a process that frees large blocks would have moved them. Those that the user has set
    stay, and the heap is trimmed all the same.
    """
    library = _glibc()
    if library is None:
        yield
        return
    ours = not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if ours:
        library.mallopt(M_MMAP_THRESHOLD, APART)
    try:
        yield
    finally:
        library.malloc_trim(0)
        if ours:
            library.mallopt(M_MMAP_THRESHOLD, LARGEST)
            library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)


def _glibc() -> Any:
    """The C library, if it is one whose allocator can be told."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (OSError, AttributeError, TypeError):  # another C library
        return None
