"""What a run is: typed settings, each with its default here and nowhere else.

`python -m mmgpt.train --config FILE --data.max_length 512 ...` fills a `RunConfig`; `--print_config` shows it with
these comments. The same dataclasses are stored in a run's `config.yaml` and in an exported model's `config.json`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mmgpt.errors import UsageError

Stage = Literal["align", "instruct", "reward", "ppo", "preference"]


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + alpha / rank * B A, with W frozen.

    Args:
        rank: Rank of the update; 0 trains the whole weight (or nothing, where the part's learning rate is 0).
        alpha: Scale of the update, divided by `rank`.
        dropout: Dropout in front of A.
        targets: Names of the linear layers that get an adapter; `all-linear` is every one of them.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


@dataclass
class VisionConfig:
    """The image encoder.

    Args:
        name: A named part (`python -m mmgpt.artifacts` lists them), `timm:NAME`, `open_clip:NAME/WEIGHTS`, or a directory.
        layer: Which block's output becomes the patch features: -2 is the last but one, as in LLaVA.
        image_size: Side of the square the image is brought to, a multiple of the patch; null is the encoder's own.
            Position embeddings are interpolated, so that a smaller square trades detail for speed.
        resize: `crop` the centre as CLIP does, `squash` to a square (everything stays visible), or `pad` the short side.
        options: Architecture arguments for `timm.create_model`, for an encoder from scratch (`pretrained: false`).
        lora: Adapters in the encoder; they train at `optimizer.lr.vision`.
    """

    name: str = "clip-vit-b16"
    layer: int = -2
    image_size: int | None = None
    resize: Literal["crop", "squash", "pad"] = "crop"
    options: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ProjectorConfig:
    """From patch features to rows of the language model's input.

    Args:
        kind: `linear`; `mlp2x_gelu` (LLaVA-1.5); `pixel_shuffle` (factor x factor patches become one token, then two layers);
            `pool` (the mean of factor x factor patches, then two layers);
            `resampler` (learned queries attend to the patches: a fixed number of tokens).
        factor: Side of the block of patches that `pixel_shuffle` or `pool` joins; must divide the patch grid.
        drop: Share of the patches that `pool` leaves out of its means in training, others each time: against learning by heart.
        noise: Deviation of the noise that `pool` and `pixel_shuffle` add to the normalised features (deviation 1) in training:
            against learning by heart where the features of a frozen encoder are the same in every epoch.
        queries: Tokens an image that `resampler` makes.
        heads: Attention heads of `resampler`.
        width: Hidden width of the two layers; null is the language model's width.
    """

    kind: Literal["linear", "mlp2x_gelu", "pixel_shuffle", "pool", "resampler"] = "pixel_shuffle"
    factor: int = 2
    drop: float = 0.0
    noise: float = 0.0
    queries: int = 64
    heads: int = 8
    width: int | None = None


@dataclass
class LanguageConfig:
    """The decoder-only language model.

    Args:
        name: A named part, a hub id, or a directory with config.json, model.safetensors and tokenizer.json.
        architecture: Arguments of a transformers configuration (with `model_type`) for a GPT from scratch; replaces `name`.
        tokenizer: Where the tokenizer comes from if not from `name`; `bytes` is one token a byte, nothing to download.
        lora: Adapters in the language model; they train at `optimizer.lr.language`.
    """

    name: str = "smollm2-135m-instruct"
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ModelConfig:
    """The whole model: encoder, projector, language model, chat template.

    Args:
        vision: The image encoder; null is a model of text alone.
        projector: Joins the two.
        language: The language model.
        template: Chat template by name: `chatml`, `vicuna` or `plain`.
        init_from: An exported model or a run folder to start from (stage 2 starts from stage 1); its parts replace the above.
    """

    vision: VisionConfig | None = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    template: str = "chatml"
    init_from: str | None = None


@dataclass
class SourceConfig:
    """One data source.

    Args:
        path: A file, a folder, `NAME` of a named data set, or an id that `datasets.load_dataset` takes.
        format: How to read it; `auto` looks at the path.
        split: Rows whose `split` column has this value, or the split of a named or hub data set; null takes all.
        question: What the user asks where the source has only captions or class names; one is drawn a sample.
        answer: Turns a caption or class name into the answer; `{}` stands for it.
        caption: Which caption of several becomes the answer: `first`, or `all` (one sample each).
        candidates: For stages that learn from preferences, where the source has several captions a picture: so many of
            its own, altered and other captions are ranked by how far they agree with what people wrote (4 to 9; 0 looks for
            ranked answers).
        image_root: Folder that relative image paths start from; null is the folder of the file.
        image_column: Column with the image, where the source has columns.
        text_column: Column with the caption, class name or messages; null tries the usual names.
        limit: At most this many samples.
        repeat: How often the source is seen in one epoch (a mixture weight).
    """

    path: str = "fruit"
    format: Literal["auto", "messages", "llava", "folder", "parquet", "webdataset", "datasets"] = "auto"
    split: str | None = None
    question: str | list[str] = "Describe this image."
    answer: str = "{}"
    caption: Literal["first", "all"] = "first"
    candidates: int = 0
    image_root: str | None = None
    image_column: str = "image"
    text_column: str | None = None
    limit: int | None = None
    repeat: int = 1


@dataclass
class DataConfig:
    """Sources, and how samples become batches.

    Args:
        train: Sources to train on.
        validation: Sources to validate on; empty sets `holdout` of the training samples aside.
        holdout: Share of the training samples for validation where no validation source is named.
        fold: Which part is held out: 0, 1, ... are disjoint, and with a `holdout` of 1 / k there are k (cross-validation).
        batching: `packed` fills rows of `row_length` tokens with whole samples, attention blocked between them;
            `grouped` puts samples of like length into one padded batch.
        max_length: Longest sample in tokens, images included; a longer one is a bad sample (never cut inside an image).
        batch_size: Samples in one forward (`grouped`), or as many as make `row_length` rows (`packed`, see there).
        row_length: Tokens of a packed row; null is `max_length`. A sample that is longer than a row is a bad sample, too.
        augment: Random crop, mirror and colour of the training pictures, anew in every epoch; rules the feature cache out.
        feature_cache: Keep the features of a frozen encoder on disk.
        feature_cache_gb: Most the cache may take; the oldest features go first.
        max_bad: Share of bad samples that stops the run.
        stream: Read sources as they come, without counting or shuffling beyond a buffer (WebDataset, sources too large to index).
        workers: Loader processes; 0 loads in the training process, and is what exact resume is proven with.
    """

    train: list[SourceConfig] = field(default_factory=list)
    validation: list[SourceConfig] = field(default_factory=list)
    holdout: float = 0.05
    fold: int = 0
    batching: Literal["packed", "grouped"] = "packed"
    max_length: int = 1024
    batch_size: int = 16
    row_length: int | None = None
    augment: bool = False
    feature_cache: bool = True
    feature_cache_gb: float = 8.0
    max_bad: float = 0.01
    stream: bool = False
    workers: int = 0


@dataclass
class PartRates:
    """Peak learning rate of each part; 0 freezes it.

    Args:
        projector: Of the projector.
        language: Of the language model, or of its adapters.
        vision: Of the image encoder, or of its adapters.
        head: Of the scalar head, where the stage has one; null is the language model's.
    """

    projector: float = 1e-3
    language: float = 0.0
    vision: float = 0.0
    head: float | None = None


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: Peak learning rate of each part; 0 freezes it.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: On matrices only, never on norms, biases or embeddings.
        warmup: Share of the steps that the learning rate rises over.
        final_lr: Where the cosine ends, as a share of the peak.
        clip: Gradient norm that larger gradients are scaled down to; 0 is off.
        label_smoothing: Share of every target's probability that is spread over the whole vocabulary, in training: with few
            samples it keeps the model from certainty (Szegedy et al. 2016, section 7).
    """

    lr: PartRates = field(default_factory=PartRates)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.03
    final_lr: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.0


@dataclass
class TrainerConfig:
    """What Lightning's Trainer is told.

    Args:
        epochs: Passes over the training samples.
        max_steps: Stops after this many optimizer steps; null follows `epochs`.
        accumulate: Forwards that are summed into one optimizer step.
        precision: `auto` is bf16 where the machine has it in hardware, else fp32.
        accelerator: `auto`, `cpu`, `gpu`, ...
        devices: How many, or `auto`.
        strategy: `auto`, `ddp`, `fsdp`, ...
        validate_every: Epochs between validations; 0 validates only at the end.
        checkpoint_every: Optimizer steps between checkpoints; null is once an epoch.
        logger: `csv` always writes metrics.csv; `tensorboard` and `wandb` add theirs.
        seed: Seeds weights, order, sampling.
        threads: CPU threads; null is the number of physical cores.
        compile: `torch.compile` of each decoder block: pays off after some hundred steps, needs a C++ compiler on a CPU.
        progress: Show the progress bar.
    """

    epochs: int = 1
    max_steps: int | None = None
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    validate_every: int = 1
    checkpoint_every: int | None = None
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    seed: int = 0
    threads: int | None = None
    compile: bool = False
    progress: bool = True


@dataclass
class EvaluateConfig:
    """What is measured on the validation samples.

    Args:
        generate: Validation samples that are answered at each validation; their text is printed and kept in samples.md.
        final: Samples answered after training for the exact-match accuracy; null is all of them, 0 counts none.
        max_new_tokens: Length limit of an answer.
        source: What the final accuracy is measured on; null is the validation sources.
        examples: Pictures written to `examples/` beside samples.md.
        batch_size: Answers generated side by side.
    """

    generate: int = 4
    final: int | None = 256
    max_new_tokens: int = 48
    source: SourceConfig | None = None
    examples: int = 8
    batch_size: int = 16


@dataclass
class RewardConfig:
    """What the stage `reward` is told.

    Args:
        demonstrations: Good answers, which score 0 on average once the model is trained; empty takes the preferred answers of
            the training prompts.
        demonstration_limit: At most this many of them are scored.
    """

    demonstrations: list[SourceConfig] = field(default_factory=list)
    demonstration_limit: int = 256


@dataclass
class PreferenceConfig:
    """What the stage `preference` (DPO) is told.

    Args:
        beta: Weight of staying near the model that the run begins with: the smaller, the further the policy may go.
        supervised: Weight of the preferred answers' own loss, per token. DPO asks for a difference alone, and may lower both
            answers in favour of text that is neither; this keeps the preferred ones likely (Pang et al. 2024, equation 2).
    """

    beta: float = 0.1
    supervised: float = 0.0


@dataclass
class PtxConfig:
    """The pretraining mix of PPO-ptx (Ouyang et al. 2022, equation 2).

    Args:
        sources: Plain text (.txt, .jsonl with `text`, folders of them) or conversations; empty is PPO without the mix.
        coefficient: gamma, the weight of the language model's loss (per token) in the common gradient.
        batch_size: Texts of one optimizer step; the paper has 8 for each answer.
        length: Tokens of a text; a longer one is cut into several.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    coefficient: float = 27.8
    batch_size: int = 16
    length: int = 256


@dataclass
class PpoConfig:
    """What the stage `ppo` is told. The prompts are those of `data.train`; an answer that stands behind one is left away.

    Args:
        iterations: Rounds of drawing answers and learning from them; `trainer.epochs` stays 1.
        batch_size: Prompts of an iteration.
        samples: Answers to each prompt.
        minibatch_size: Answers of one optimizer step.
        microbatch_size: Answers in one forward; null is `minibatch_size`.
        epochs: Passes over the answers of an iteration.
        max_new_tokens: Length limit of an answer.
        temperature: At which answers are drawn and their probabilities taken.
        engine: What draws them: `own` decoder, or `vllm` on one GPU (`pip install mmgpt[vllm]`).
        engine_memory: Share of the GPU's memory for `vllm`.
        rewards: Reward functions; their weighted sum is the score of an answer. Each is a mapping of `class_path` (as
            `package.module.Name`: a class whose objects, or a function which, takes (prompts, answers, images) and gives a number
            for each answer), `init_args` (arguments of the class, or further ones of the function), and `weight` (1; `fit` finds
            the weight with which the sum ranks the answers of `ppo.ranked` best).
        ranked: Ranked answers that a weight `fit` is fitted on.
        no_eos_score: Score of an answer that reached the limit without an end; null lets the reward judge it.
        empty_score: Score of an answer without text, which nobody ranks, so that no reward model knows of it; null lets the
            reward judge it.
        kl: `fixed` keeps `beta`; `adaptive` steers it towards `kl_target` nats an answer.
        beta: Weight of the KL penalty, per token.
        kl_target: See `kl`.
        gamma: Discount.
        lam: GAE's lambda.
        clip: Of the probability ratio.
        value_clip: Of the predicted value.
        value_coefficient: Of the value loss.
        value_from: A reward model (a run folder) that the value network begins as; null puts a head on the policy's own states.
        warmup: Iterations over which the learning rate rises from a tenth of its peak; it stays there.
        ema: Decay of the moving average of the weights, which is what is evaluated and exported; 0 takes the weights themselves.
        evaluate_every: Iterations between evaluations on held-out prompts; the best weights by held-out reward are kept.
        evaluate_prompts: At most this many of them.
        max_kl: Stops the run when an iteration's mean KL passes it (nats an answer); null never.
        max_growth: Stops the run when answers have become this many times as long as at first; null never.
        ptx: The pretraining mix.
    """

    iterations: int = 100
    batch_size: int = 32
    samples: int = 1
    minibatch_size: int = 16
    microbatch_size: int | None = None
    epochs: int = 1
    max_new_tokens: int = 48
    temperature: float = 1.0
    engine: Literal["own", "vllm"] = "own"
    engine_memory: float = 0.3
    rewards: list[dict[str, Any]] = field(default_factory=list)
    ranked: list[SourceConfig] = field(default_factory=list)
    no_eos_score: float | None = -1.0
    empty_score: float | None = None
    kl: Literal["fixed", "adaptive"] = "fixed"
    beta: float = 0.02
    kl_target: float = 6.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    value_from: str | None = None
    warmup: int = 10
    ema: float = 0.992
    evaluate_every: int = 10
    evaluate_prompts: int = 64
    max_kl: float | None = 50.0
    max_growth: float | None = 4.0
    ptx: PtxConfig = field(default_factory=PtxConfig)


@dataclass
class RunConfig:
    """One run of `python -m mmgpt.train`.

    Args:
        stage: The objective: `align` trains the projector alone, `instruct` whatever has a learning rate; `reward` learns from
            preferences to score answers, `preference` (DPO) to give those that are preferred; `ppo` improves a policy against a
            reward.
        run_dir: Where everything goes; must not hold another run unless `resume` is set.
        first: Configurations (by name or file) of runs that this one stands on; each is run unless its model is there already.
        model: The model.
        data: The data.
        optimizer: The optimizer.
        trainer: The loop.
        evaluate: What is measured.
        reward: The reward model.
        preference: Direct preference optimisation.
        ppo: The policy's training against a reward.
        export: `trained` stores what the run changed and names the rest; `all` stores every weight in one file.
        overwrite: Replace a finished run in `run_dir`.
        resume: Continue the run in `run_dir` from its last checkpoint.
        show_batch: Print one batch, supervised tokens coloured, and stop.
    """

    stage: Stage = "instruct"
    run_dir: str = "runs/run"
    first: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    export: Literal["trained", "all"] = "trained"
    overwrite: bool = False
    resume: bool = False
    show_batch: bool = False


_SHARE = (0.0, 1.0)
_BELOW_ONE = (0.0, math.nextafter(1.0, 0.0))
_ABOVE_ZERO = (math.nextafter(0.0, 1.0), math.inf)
_FROM_ZERO = (0.0, math.inf)
_FROM_ONE = (1.0, math.inf)

# Lowest and highest value of the keys whose type takes more than makes sense; a null is not looked at.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("model.vision.lora.rank", "model.language.lora.rank"), _FROM_ZERO),
    **dict.fromkeys(("model.vision.lora.alpha", "model.language.lora.alpha"), _ABOVE_ZERO),
    **dict.fromkeys(("model.vision.lora.dropout", "model.language.lora.dropout", "model.projector.drop"), _BELOW_ONE),
    **dict.fromkeys((f"model.projector.{key}" for key in ("factor", "queries", "heads", "width")), _FROM_ONE),
    "model.vision.image_size": _FROM_ONE,
    "model.projector.noise": _FROM_ZERO,
    **dict.fromkeys((f"data.{key}" for key in ("max_length", "batch_size", "row_length")), _FROM_ONE),
    **dict.fromkeys(("data.feature_cache_gb", "data.workers", "data.fold"), _FROM_ZERO),
    "data.holdout": _BELOW_ONE,
    "data.max_bad": _SHARE,
    **dict.fromkeys((f"optimizer.lr.{key}" for key in ("projector", "language", "vision")), _FROM_ZERO),
    "optimizer.betas": _BELOW_ONE,
    "optimizer.eps": _ABOVE_ZERO,
    **dict.fromkeys(("optimizer.weight_decay", "optimizer.clip"), _FROM_ZERO),
    **dict.fromkeys(("optimizer.warmup", "optimizer.final_lr"), _SHARE),
    "optimizer.label_smoothing": _BELOW_ONE,
    **dict.fromkeys(
        (f"trainer.{key}" for key in ("epochs", "max_steps", "accumulate", "checkpoint_every", "threads")), _FROM_ONE
    ),
    "trainer.validate_every": _FROM_ZERO,
    "trainer.seed": (0, 2**32 - 1),
    **dict.fromkeys((f"evaluate.{key}" for key in ("generate", "final", "examples")), _FROM_ZERO),
    **dict.fromkeys((f"evaluate.{key}" for key in ("max_new_tokens", "batch_size")), _FROM_ONE),
    **dict.fromkeys(
        (
            f"ppo.{key}"
            for key in (
                "iterations", "batch_size", "samples", "minibatch_size", "microbatch_size", "epochs", "max_new_tokens",
                "evaluate_every", "evaluate_prompts", "ptx.batch_size", "max_growth",
            )
        ),
        _FROM_ONE,
    ),
    "preference.beta": _ABOVE_ZERO,
    "preference.supervised": _FROM_ZERO,
    "ppo.ptx.length": (2, math.inf),
    **dict.fromkeys((f"ppo.{key}" for key in ("temperature", "kl_target", "clip", "value_clip", "max_kl")), _ABOVE_ZERO),
    **dict.fromkeys((f"ppo.{key}" for key in ("beta", "value_coefficient", "warmup", "ptx.coefficient")), _FROM_ZERO),
    **dict.fromkeys(("ppo.gamma", "ppo.lam", "ppo.engine_memory"), _SHARE),
    "ppo.ema": _BELOW_ONE,
}


def check_values(config: RunConfig) -> None:
    """Refuse numbers of the right type with which no run can be, before anything is loaded or written.

    Raises:
        UsageError: names the key, its value and what it may be.
    """
    for key, (low, high) in LIMITS.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        for number in value if isinstance(value, tuple | list) else [value]:
            # A comparison with NaN is never true.
            if number is None or (low <= number <= high and math.isfinite(number)):
                continue
            raise UsageError(f"{key} is {number}, but must be {_range(low, high)}")
    data = config.data
    if data.fold and (data.validation or data.stream or data.holdout == 0):
        other = "data.validation" if data.validation else "data.stream" if data.stream else "data.holdout 0"
        raise UsageError(f"data.fold {data.fold} says which part of data.train is held out, and with {other} none is")


def _range(low: float, high: float) -> str:
    if low == _ABOVE_ZERO[0]:
        return "above 0"
    if high == math.inf:
        return f"at least {low:g}"
    return f"at least {low:g} and below 1" if high == _BELOW_ONE[1] else f"from {low:g} to {high:.10g}"
