"""mmgpt: images and text in, text out; trained on a laptop or a cluster.

>>> import mmgpt
>>> model = mmgpt.load("runs/quickstart")  # doctest: +SKIP
>>> model.ask("photo.jpg", "What fruit is this?")  # doctest: +SKIP
'Granny Smith'
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmgpt.model.multimodal import MultimodalGPT

__all__ = ["load"]
__version__ = "0.1.0"


def load(path: str | Path, *, device: str = "auto", precision: str = "auto") -> MultimodalGPT:
    """Load a trained model for answering.

    Args:
        path: A run folder (`runs/quickstart`), a folder written by `save_pretrained`, or the name of a language model
            (`smollm2-135m-instruct`), which then answers as it is, without pictures.
        device: `auto` (the GPU where there is one), `cpu`, `cuda`, `mps`.
        precision: `auto` is bf16 on a GPU that has it and fp32 elsewhere (exact text); `fp32`; `bf16`; or
            `fp16`, `int8` (weights of the language model only, on the CPU). All but fp32 are faster, and the text may differ.

    Raises:
        UserError: there is no model, or its files do not fit each other.
    """
    from mmgpt.model.loading import load_for_answering

    return load_for_answering(path, device=device, precision=precision)
