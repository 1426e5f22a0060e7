"""How the two stages of the classifier learn: `safety.train` says from what, and what comes after.

    stage 1     an embedding bag over the hashed features, quantised to int8
    stage 2     all-MiniLM-L6-v2 with a pruned vocabulary and one head of 1 + K outputs on mean and maximum, trained several
                times, and the weights averaged
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safety.classifier import Linear, features
from safety.dataset import OUTPUTS, draw_seed, targets
from safety.sources import Row
from safety.taxonomy import KEYS

if TYPE_CHECKING:
    import torch

SLICES = 8  # of an epoch: a checkpoint is kept after each, and a run that was stopped goes on from there
RECIPE = 3  # of `_run`; a change that makes other weights of the same rows counts it up, and runs of before are run again


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
    start: str | None = None
    keep: float = 0.0
    vocabulary: int = 20_000
    length: int = 128
    train_length: int = 80
    frozen_layers: int = 2
    runs: int = 1
    epochs: int = 3
    batch_tokens: int = 2048
    lr: float = 3e-4
    smoothing: float = 0.02
    category_weight: float = 0.3


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


# Stage 1


def train_linear(rows: list[Row], config: LinearConfig, seed: int) -> Linear:
    """Fit stage 1 by Adagrad on the features of `classifier.features`, then round it to int8."""
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


# Stage 2


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
            # It comes in evaluation mode and stays there: in so few epochs dropout inside it costs more than it gives.
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


def train_encoder(
    draws: Sequence[Sequence[Row]],
    config: EncoderConfig,
    seed: int,
    run_dir: Path,
    look: Callable[[int, torch.nn.Module, dict[str, Any]], None] | None = None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Fine-tune stage 2 once on every draw of the rows, always from the same start, and average the weights.

    A uniform soup (Wortsman et al. 2022, arXiv 2203.05482): runs from one pretrained start mostly end in one basin, where the
    mean of their weights does as well as the mean of their answers, at the cost of one.

    Args:
        draws: Rows of each run. The first one's texts decide on the vocabulary, unless `config.start` brings its own.
        run_dir: Holds each run by the content of all that it depends on. Runs that are in it are not run again, whatever
            others they are averaged with, and one that was stopped goes on.
        look: Is given the number, the encoder and the tokenizer of each run.

    Returns:
        The encoder in evaluation mode, and its tokenizer.
    """
    from safetensors.torch import load_file, save_file

    from mmgpt import artifacts

    folder = artifacts.resolve(config.name, kind="text_encoder")
    spec, make = _beginning(folder, list(dict.fromkeys(row.text for row in draws[0])), config)
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(config, name="", start="", keep=0, length=0, runs=0)  # what no run depends on
    shared = hashlib.sha256(repr((RECIPE, seed, KEYS, settings, spec)).encode())
    for held in ("config.json", *sorted(path.name for path in folder.glob("*.safetensors"))):
        shared.update((folder / held).read_bytes())
    if config.start is not None:
        shared.update((Path(config.start) / "encoder.int8.onnx").read_bytes())
    encoder = make().eval()
    # Wortsman et al. 2022, arXiv 2109.01903: between what it went on from and where it came to it often does better on other
    # data than at either end.
    mean = {key: config.keep * value.float() for key, value in encoder.state_dict().items()}
    for number, rows in enumerate(draws):
        name = f"run {number + 1} of {len(draws)}"
        content = _content(shared, rows, number)
        file, checkpoint = (run_dir / f"run-{number}-{content}.{kind}" for kind in ("safetensors", "ckpt"))
        if file.exists():
            print(f"encoder: {name} is there: {file}", file=sys.stderr, flush=True)
        else:
            run = _run(rows, config, spec=spec, make=make, seed=seed, number=number, last=checkpoint, name=name)
            save_file({key: value.contiguous() for key, value in run.state_dict().items()}, part := file.with_suffix(".tmp"))
            part.rename(file)
            checkpoint.unlink(missing_ok=True)  # of a run that is done nothing is left to go on from
        weights = load_file(file)
        for key, value in weights.items():
            mean[key] += (1 - config.keep) * value.float() / len(draws)
        if look:
            encoder.load_state_dict(weights)
            look(number, encoder, spec)
    encoder.load_state_dict(mean)
    return encoder, spec


def _beginning(
    folder: Path, texts: list[str], config: EncoderConfig
) -> tuple[dict[str, Any], Callable[[], torch.nn.Module]]:
    """The tokenizer that training uses, and a function that makes the encoder that it starts from.

    The function raises UserError where the weights in `config.start` are another encoder's.
    """
    from safety.export import restore

    if config.start is None:
        source = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        spec, kept = prune_vocabulary(source, texts, config.vocabulary)
        return spec, lambda: encoder_module(folder, kept, config.frozen_layers)
    start = Path(config.start)
    spec = json.loads((start / "tokenizer.json").read_text(encoding="utf-8"))
    kept = list(range(len(spec["model"]["vocab"])))

    def make() -> torch.nn.Module:
        encoder = encoder_module(folder, kept, config.frozen_layers)
        restore(encoder, start / "encoder.int8.onnx")
        return encoder

    return spec, make


def _content(shared: hashlib._Hash, rows: Sequence[Row], number: int) -> str:
    """A name for what a run depends on: equal where it would come out equal, but for rounding on another processor."""
    digest = shared.copy()
    digest.update(repr(number).encode())
    for row in rows:
        digest.update(repr((row.text, row.label, row.categories, row.weight)).encode())
    return digest.hexdigest()[:12]


def _run(
    rows: Sequence[Row],
    config: EncoderConfig,
    *,
    spec: dict[str, Any],
    make: Callable[[], torch.nn.Module],
    seed: int,
    number: int,
    last: Path,
    name: str,
) -> torch.nn.Module:
    """One fine-tuning of the encoder that `make` makes; goes on from the checkpoint `last` where there is one."""
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tokenizers import Tokenizer

    from mmgpt.machine import pick_precision

    L.seed_everything(seed, verbose=False)  # a head that is new is the same in all runs
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    ends = spec["model"]["vocab"]["[CLS]"], spec["model"]["vocab"]["[SEP]"]
    rng = random.Random(draw_seed(seed, number))
    room = config.train_length - 2
    encoded: list[list[int]] = []
    for encoding in tokenizer.encode_batch([row.text for row in rows], add_special_tokens=False):
        start = rng.randrange(max(len(encoding.ids) - room, 0) + 1)
        encoded.append([ends[0], *encoding.ids[start : start + room], ends[1]])
    label, mask = targets(rows)
    weight = np.array([row.weight for row in rows], np.float32)

    def collate(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        longest = max(len(encoded[n]) for n in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        inside = torch.zeros(len(chosen), longest, dtype=torch.long)
        for place, n in enumerate(chosen):
            ids[place, : len(encoded[n])] = torch.tensor(encoded[n])
            inside[place, : len(encoded[n])] = 1
        return ids, inside, *(torch.from_numpy(part[chosen]) for part in (label, mask, weight))

    lengths = [len(ids) for ids in encoded]
    first = draw_seed(seed, number) * config.epochs
    plans = [token_batches(lengths, config.batch_tokens, random.Random(first + epoch)) for epoch in range(config.epochs)]
    steps, slices = sum(map(len, plans)), min(SLICES, *map(len, plans))

    class Tuned(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder: Any = make()

        def train_dataloader(self) -> Any:
            round_, part = divmod(self.current_epoch, slices)
            every: Any = range(len(encoded))
            return torch.utils.data.DataLoader(every, batch_sampler=plans[round_][part::slices], collate_fn=collate)

        def training_step(self, batch: tuple[torch.Tensor, ...], _: int) -> torch.Tensor:
            ids, inside, label, mask, weight = batch
            value = loss(
                self.encoder(ids, inside), label, mask, weight, categories=config.category_weight, smoothing=config.smoothing
            )
            if self.global_step % 100 == 0:
                place = f"encoder: {name}, step {self.global_step} of {steps}"
                print(f"{place}, loss {value.item():.4f}", file=sys.stderr, flush=True)
            return value

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            # Not the trainer's: it refuses a fused optimizer for the sake of float16, whose gradients that unscales itself.
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def configure_optimizers(self) -> Any:
            slow = [p for p in self.encoder.bert.parameters() if p.requires_grad]
            fast = list(self.encoder.head.parameters())
            optimizer = torch.optim.AdamW(
                [{"params": slow, "lr": config.lr}, {"params": fast, "lr": 5 * config.lr}], weight_decay=0.01, fused=True
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / max(1, steps // 20), max(0.02, 1 - step / steps))
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = Tuned()
    keep = ModelCheckpoint(last.parent, filename=last.stem, enable_version_counter=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"precision": pick_precision("auto", torch.device(device)), "callbacks": [keep]}
    trainer = _trainer(config.epochs * slices, accelerator=device, **options)
    trainer.fit(model, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    return model.encoder.cpu()


def _trainer(epochs: int, accelerator: str = "cpu", **options: Any) -> Any:
    import lightning as L

    options.setdefault("enable_checkpointing", "callbacks" in options)
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        **options,
    )
