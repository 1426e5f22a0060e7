"""`python -m safety.train [--config FILE] [--key value ...]`: data, both stages, calibration, export, card.

    1  data        named collections, contrast pairs, composed requests, own files -> rows (`sources`)
    2  linear      stage 1, an embedding bag over the hashed features, quantised to int8
    3  encoder     stage 2, all-MiniLM-L6-v2 with a pruned vocabulary and one head of 1 + K outputs, exported to int8 ONNX
    4  calibrate   Platt scaling on one half of the development split, operating points on all of it (`calibrate`)
    5  check       int8 against fp32; the weights' sizes; calibration.json with every file's sha256
    6  evaluate    the development tests, and the card (`evaluate`)

Exit codes: 0 done, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgpt.errors import UsageError, UserError, run_cli
from safety import calibrate, card, sources, weights
from safety.classifier import Linear, Transformer, features
from safety.dataset import OUTPUTS, Data, Split, build, targets
from safety.evaluate import auroc, ece
from safety.export import export, full_precision
from safety.filter import CANARIES
from safety.sources import Row
from safety.taxonomy import KEYS

if TYPE_CHECKING:
    import torch

LIMIT = 30_000_000  # bytes that are shipped
MAX_SHIFT, MAX_AUROC_LOSS = 0.02, 0.005  # int8 against fp32
SLICES = 8  # of an epoch: a checkpoint is kept after each, and a run that was stopped goes on from there
PARITY = 800  # development prompts that both are compared on


@dataclass
class LinearConfig:
    bits: int = 18
    epochs: int = 12
    batch_size: int = 128
    lr: float = 0.05
    decay: float = 2e-7


@dataclass
class EncoderConfig:
    name: str = "all-minilm-l6-v2"
    vocabulary: int = 20_000
    length: int = 128
    train_length: int = 80
    frozen_layers: int = 2
    epochs: int = 3
    batch_tokens: int = 2048
    lr: float = 3e-4
    smoothing: float = 0.02
    category_weight: float = 0.3


@dataclass
class Config:
    """A training run."""

    data: Data
    linear: LinearConfig = field(default_factory=LinearConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    points: dict[str, calibrate.Bounds] = field(default_factory=dict)
    clear_loss: float = 0.0025
    output: str = "safety/weights"
    run_dir: str = "runs/safety"
    seed: int = 0


def parse(arguments: list[str] | None = None) -> Config:
    """Read the command line; YAML first, later arguments override it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m safety.train", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_class_arguments(Config)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.startswith(("--config", "-h", "--help")) for argument in arguments):
        arguments = ["--config", "configs/safety.yaml", *arguments]
    try:
        settings = parser.parse_args(arguments)
        settings.pop("config", None)
        config = Config(**parser.instantiate(settings).as_dict())
    except Exception as error:
        raise UsageError(" ".join(str(error).split())) from error
    if missing := [name for name in calibrate.POINTS if name not in config.points]:
        raise UsageError(f"points: {', '.join(missing)} missing; give `everyday` and `lookalikes` for each")
    return config


def loss(
    logits: torch.Tensor,
    label: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    *,
    categories: float,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Weighted mean of the cross-entropies: column 0, and `categories` times the mean over the known categories.

    Args:
        logits, label, mask: [B, 1 + K]; weight: [B].
    """
    import torch.nn.functional as F

    smooth = label * (1 - 2 * smoothing) + smoothing
    each = F.binary_cross_entropy_with_logits(logits.float(), smooth, reduction="none") * mask
    total = each[:, 0] + categories * each[:, 1:].sum(1) / mask[:, 1:].sum(1).clamp(min=1) * (logits.shape[1] - 1) / 4
    return (total * weight).sum() / weight.sum()


# 2 linear


def train_linear(rows: list[Row], config: LinearConfig, seed: int) -> Linear:
    """Fit stage 1 by AdamW on the features of `classifier.features`, then round it to int8."""
    import lightning as L
    import torch

    L.seed_everything(seed, verbose=False)
    kinds = list(features([row.text for row in rows], config.bits))
    bags = [np.concatenate([index[offsets[n] : offsets[n + 1]] for index, offsets in kinds]) for n in range(len(rows))]
    label, mask = targets(rows)
    weight = np.array([row.weight for row in rows], np.float32)

    def collate(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        sizes = np.array([len(bags[n]) for n in chosen])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        index = torch.from_numpy(np.concatenate([bags[n] for n in chosen]))
        norm = torch.from_numpy(1 / np.sqrt(np.maximum(sizes, 1)).astype(np.float32))
        return index, torch.from_numpy(starts), norm, *(torch.from_numpy(part[chosen]) for part in (label, mask, weight))

    class Bag(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.EmbeddingBag(1 << config.bits, OUTPUTS, mode="sum", sparse=True)
            torch.nn.init.zeros_(self.table.weight)
            self.bias = torch.nn.Parameter(torch.full((OUTPUTS,), -2.0))

        def training_step(self, batch: tuple[torch.Tensor, ...], _: int) -> torch.Tensor:
            index, starts, norm, label, mask, weight = batch
            logits = self.table(index, starts) * norm[:, None] + self.bias
            touched = self.table.weight[index].square().sum()
            return loss(logits, label, mask, weight, categories=1.0) + config.decay * touched

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Adagrad: rare features learn as fast as frequent ones, and a sparse gradient touches only their rows.
            return torch.optim.Adagrad(self.parameters(), lr=config.lr)

    model = Bag()
    every: Any = range(len(rows))
    loader: Any = torch.utils.data.DataLoader(
        every,
        config.batch_size,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )
    _trainer(config.epochs).fit(model, loader)
    table = model.table.weight.detach().numpy()
    return quantise(table, model.bias.detach().numpy())


def quantise(table: np.ndarray, bias: np.ndarray) -> Linear:
    """Round a table, float32 [2^bits, 1 + K], to int8 with one scale a column, which holds its largest entry."""
    scale = np.maximum(np.abs(table).max(0), 1e-8).astype(np.float32) / 127
    return Linear(np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale, bias.astype(np.float32))


# 3 encoder


def prune_vocabulary(tokenizer: dict[str, Any], texts: list[str], size: int) -> tuple[dict[str, Any], list[int]]:
    """Keep the `size` tokens of a WordPiece tokenizer.json that matter most, renumbered.

    Special tokens and single characters stay, with and without `##`, so that every text that could be spelt still can be;
    then the tokens of `texts` by frequency, then the rest in their order, which is by frequency in BERT's vocabulary.

    Returns:
        The tokenizer, and the old number of every new token.
    """
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    counts: Counter[int] = Counter()
    for encoding in Tokenizer.from_str(json.dumps(tokenizer)).encode_batch(texts, add_special_tokens=False):
        counts.update(encoding.ids)

    def rank(token: str) -> tuple[int, int]:
        index = vocabulary[token]
        if token in special or len(token.removeprefix("##")) == 1:
            return (0, index)
        if token.startswith("[unused"):
            return (3, index)
        return (1, -counts[index]) if counts[index] else (2, index)

    kept = sorted(sorted(vocabulary, key=rank)[:size], key=vocabulary.__getitem__)
    numbers = {token: number for number, token in enumerate(kept)}
    pruned = json.loads(json.dumps(tokenizer))
    pruned["model"]["vocab"] = numbers
    for entry in pruned["added_tokens"]:
        entry["id"] = numbers[entry["content"]]
    post = pruned["post_processor"]
    for name, entry in post.get("special_tokens", {}).items():
        entry["ids"] = [numbers[name]]
    for side in ("sep", "cls"):
        if side in post:
            post[side][1] = numbers[post[side][0]]
    pruned["truncation"] = pruned["padding"] = None
    return pruned, [vocabulary[token] for token in kept]


def encoder_module(folder: Path, kept: list[int], frozen_layers: int) -> torch.nn.Module:
    """The pretrained encoder with the rows `kept` of its token table, and one linear head on mean and maximum.

    The embeddings and the first `frozen_layers` layers stay as they are: tokens that training does not show keep their place
    beside those that it does.
    """
    import torch
    from transformers import BertModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # It comes in evaluation mode and stays there: in three epochs dropout inside it costs more than it gives.
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
            table = self.bert.embeddings.word_embeddings.weight.detach()[kept]
            self.bert.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(table.clone(), freeze=True)
            self.bert.config.vocab_size = len(kept)
            for part in (self.bert.embeddings, *self.bert.encoder.layer[:frozen_layers]):
                part.requires_grad_(False)
            self.dropout = torch.nn.Dropout(0.1)
            self.head = torch.nn.Linear(2 * table.shape[1], OUTPUTS)
            torch.nn.init.normal_(self.head.weight, std=0.02)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            """ids and mask [B, T] -> logits [B, 1 + K]; without a mask every token counts."""
            if mask is None:
                states = self.bert(input_ids=ids).last_hidden_state
                mean, peak = states.mean(1), states.amax(1)
            else:
                states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
                inside = mask[..., None].to(states.dtype)
                mean = (states * inside).sum(1) / inside.sum(1)
                peak = states.masked_fill(inside == 0, float("-inf")).amax(1)
            return self.head(self.dropout(torch.cat([mean, peak], dim=-1)))

    return Encoder()


def token_batches(lengths: list[int], budget: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of similar length, at most `budget` tokens each with padding; the batches in random order."""
    order = sorted(range(len(lengths)), key=lambda n: lengths[n] + rng.random() * 4)
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    rng.shuffle(batches)
    return batches


def train_encoder(rows: list[Row], config: EncoderConfig, seed: int, run_dir: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Fine-tune stage 2; returns it with its tokenizer. Goes on from `run_dir`/last.ckpt where there is one."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tokenizers import Tokenizer

    from mmgpt import artifacts

    L.seed_everything(seed, verbose=False)
    folder = artifacts.resolve(config.name, kind="text_encoder")
    texts = [row.text for row in rows]
    source = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec, kept = prune_vocabulary(source, texts, config.vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    ends = spec["model"]["vocab"]["[CLS]"], spec["model"]["vocab"]["[SEP]"]
    rng = random.Random(seed)
    room = config.train_length - 2
    encoded: list[list[int]] = []
    owner: list[int] = []
    for n, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        start = rng.randrange(max(len(encoding.ids) - room, 0) + 1)
        encoded.append([ends[0], *encoding.ids[start : start + room], ends[1]])
        owner.append(n)
    label, mask = targets(rows)
    weight = np.array([row.weight for row in rows], np.float32)

    def collate(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        longest = max(len(encoded[n]) for n in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        inside = torch.zeros(len(chosen), longest, dtype=torch.long)
        for place, n in enumerate(chosen):
            ids[place, : len(encoded[n])] = torch.tensor(encoded[n])
            inside[place, : len(encoded[n])] = 1
        owners = [owner[n] for n in chosen]
        return ids, inside, *(torch.from_numpy(part[owners]) for part in (label, mask, weight))

    lengths = [len(ids) for ids in encoded]
    plans = [token_batches(lengths, config.batch_tokens, random.Random(seed + n)) for n in range(config.epochs)]
    steps = sum(map(len, plans))

    class Tuned(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder: Any = encoder_module(folder, kept, config.frozen_layers)

        def train_dataloader(self) -> Any:
            round_, part = divmod(self.current_epoch, SLICES)
            every: Any = range(len(encoded))
            return torch.utils.data.DataLoader(every, batch_sampler=plans[round_][part::SLICES], collate_fn=collate)

        def training_step(self, batch: tuple[torch.Tensor, ...], _: int) -> torch.Tensor:
            ids, inside, label, mask, weight = batch
            value = loss(
                self.encoder(ids, inside), label, mask, weight, categories=config.category_weight, smoothing=config.smoothing
            )
            if self.global_step % 100 == 0:
                print(f"encoder: step {self.global_step} of {steps}, loss {value.item():.4f}", file=sys.stderr, flush=True)
            return value

        def configure_optimizers(self) -> Any:
            slow = [p for p in self.encoder.bert.parameters() if p.requires_grad]
            fast = list(self.encoder.head.parameters())
            optimizer = torch.optim.AdamW(
                [{"params": slow, "lr": config.lr}, {"params": fast, "lr": 5 * config.lr}], weight_decay=0.01
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / max(1, steps // 20), max(0.02, 1 - step / steps))
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = Tuned()
    run_dir.mkdir(parents=True, exist_ok=True)
    last = run_dir / "last.ckpt"
    keep = ModelCheckpoint(run_dir, filename="last", enable_version_counter=False)
    trainer = _trainer(config.epochs * SLICES, precision="bf16-mixed", gradient_clip_val=1.0, callbacks=[keep])
    trainer.fit(model, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    last.unlink(missing_ok=True)  # of a run that is done nothing is left to go on from
    return model.encoder.eval(), spec


def _trainer(epochs: int, **options: Any) -> Any:
    import lightning as L

    options.setdefault("enable_checkpointing", "callbacks" in options)
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        **options,
    )


# 4, 5 calibration and checks


def fit_calibration(split: Split, first: np.ndarray, second: np.ndarray, config: Config) -> dict[str, Any]:
    """Everything in calibration.json but the hashes.

    Args:
        first, second: Logits of both stages on the development split, [N, 1 + K].
    """
    label, mask = targets(split.dev)
    half = np.array([sources.held_out(row, 0.5, config.seed + 1) for row in split.dev])
    result: dict[str, Any] = {"version": 2, "categories": list(KEYS)}
    scaled, probabilities, unseen = {}, {}, ~half

    def unseen_figures(p: np.ndarray) -> dict[str, float]:
        return {"dev_auroc": round(auroc(label[unseen, 0], p[unseen]), 4), "dev_ece": round(ece(label[unseen, 0], p[unseen]), 4)}

    for name, logits in (("linear", first), ("transformer", second)):
        ab = [calibrate.platt(logits[half, 0], label[half, 0])]
        for column in range(1, OUTPUTS):
            known = half & (mask[:, column] == 1)
            enough = label[known, column].sum() >= 5
            ab.append(calibrate.platt(logits[known, column], label[known, column]) if enough else ab[0])
        result[name] = {"a": [round(a, 6) for a, _ in ab], "b": [round(b, 6) for _, b in ab]}
        scaled[name] = logits[:, 0] * result[name]["a"][0] + result[name]["b"][0]
        probabilities[name] = calibrate.sigmoid(scaled[name])
        result[name] |= unseen_figures(probabilities[name])
    fitted = calibrate.together(scaled["linear"][half], scaled["transformer"][half], label[half, 0])
    one, two, bias = (round(value, 6) for value in fitted)
    result["together"] = {"linear": one, "transformer": two, "bias": bias}
    p = calibrate.sigmoid(one * scaled["linear"] + two * scaled["transformer"] + bias)
    result["together"] |= unseen_figures(p)
    harmful = label[:, 0] == 1
    lookalike = ~harmful & np.array([row.source in ("pairs", "requests") for row in split.dev])
    points = calibrate.operating_points(p[harmful], p[~harmful & ~lookalike], p[lookalike], config.points)
    result["thresholds"] = {name: point.to_json() for name, point in points.items()}
    bound = calibrate.clear_below(probabilities["linear"][harmful], p[harmful], points["strict"].threshold, config.clear_loss)
    passed = probabilities["linear"] < bound
    result["linear"] |= {
        "clear_below": round(bound, 6),
        "clear_share": round(float(passed[~harmful].mean()), 4),
        "clear_loss": round(float((passed & harmful & (p >= points["balanced"].threshold)).sum() / harmful.sum()), 4),
    }
    result["transformer"] |= {"length": config.encoder.length, "overlap": config.encoder.length // 4}
    result["development"] = {
        "sensitive": int(harmful.sum()),
        "everyday": int((~harmful & ~lookalike).sum()),
        "lookalikes": int(lookalike.sum()),
    }
    return result


def check_parity(label: np.ndarray, full: np.ndarray, int8: np.ndarray) -> dict[str, float]:
    """How far int8 is from fp32.

    Raises:
        UserError: further than the project allows.
    """
    a, b = calibrate.sigmoid(full[:, 0]), calibrate.sigmoid(int8[:, 0])
    result = {
        "mean_dp": float(np.abs(a - b).mean()),
        "max_dp": float(np.abs(a - b).max()),
        "auroc_fp32": auroc(label, a),
        "auroc_int8": auroc(label, b),
    }
    if result["mean_dp"] > MAX_SHIFT or result["auroc_fp32"] - result["auroc_int8"] > MAX_AUROC_LOSS:
        raise UserError(f"int8 is too far from fp32: {result}")
    return {name: round(value, 5) for name, value in result.items()}


def execute(config: Config) -> Path:
    """Run all steps; returns the folder of the weights."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    split = build(config.data, config.seed)
    say(f"data: {json.dumps(split.counts)}")
    # The weights that are there work until new ones are whole: files of two trainings do not fit each other.
    output, target = Path(config.output), Path(config.run_dir) / "weights"
    target.mkdir(parents=True, exist_ok=True)
    texts = [row.text for row in split.dev]
    label = np.array([row.label for row in split.dev])

    linear = train_linear(split.train, config.linear, config.seed)
    linear.save(target / "linear.npz")
    first = linear.logits(texts)
    say(f"linear: development AUROC {auroc(label, first[:, 0]):.4f}")

    encoder, spec = train_encoder(split.train, config.encoder, config.seed, Path(config.run_dir))
    (target / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    export(encoder, target / "encoder.int8.onnx")
    length = config.encoder.length
    transformer = Transformer(target / "encoder.int8.onnx", target / "tokenizer.json", length=length, overlap=length // 4)
    second = transformer.logits(texts)
    say(f"encoder: development AUROC {auroc(label, second[:, 0]):.4f}")
    chosen = sorted(random.Random(config.seed).sample(range(len(texts)), min(PARITY, len(texts))))
    full = full_precision(encoder, transformer, [texts[n] for n in chosen])
    parity = check_parity(label[chosen], full, second[chosen])
    say(f"int8 against fp32 {json.dumps(parity)}")

    calibration = fit_calibration(split, first, second, config) | {"parity": parity, "data": split.counts}
    (target / weights.CALIBRATION).write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    weights.seal(target)
    size = sum((target / name).stat().st_size for name in (*weights.FILES, weights.CALIBRATION))
    if config.data.tests:
        # A folder of weights beside the shipped one has its own canaries.
        shutil.copyfile(CANARIES, target / CANARIES.name)
    say(f"thresholds {json.dumps(calibration['thresholds'])}; {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise UserError(f"the weights take {size:,} bytes, {LIMIT:,} are allowed: lower encoder.vocabulary or linear.bits")
    if config.data.tests:
        (target / card.NAME).write_text(card.render(target, config.data.tests), encoding="utf-8")
    shipped = output.resolve() == weights.FOLDER.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(target.iterdir()):
        if not (shipped and file.name == CANARIES.name):
            shutil.copyfile(file, fresh := output / f".{file.name}.tmp")  # the run may lie on another disk
            os.replace(fresh, output / file.name)
    shutil.rmtree(target)
    say("done")
    return output


def main(arguments: list[str] | None = None) -> int:
    config = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|treespec|Checkpoint directory|in eval mode).*")
    print(execute(config))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
