"""Supervised training on conversations: `align` (the projector alone) and `instruct` (whatever has a learning rate).

The objective is the language model's own, on the answers only (Liu et al. 2023, equation 2):
L = - sum over supervised tokens of log p(x_i | image, x_<i), divided by their number.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from mmgpt.config import RunConfig
from mmgpt.data.features import ImageSource, Prepared
from mmgpt.data.packing import Batch
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.stages.optimizer import beside_language, freeze, learnt_state, make_optimizer, no_gradient


def stage_rates(config: RunConfig) -> dict[str, float]:
    """Learning rate by part; `align` freezes all but the projector; `reward` and `ppo` have a head, or a value network."""
    rates = {part: float(getattr(config.optimizer.lr, part)) for part in ("vision", "projector", "language")}
    if config.stage == "align":
        rates.update(vision=0.0, language=0.0)
    if config.stage in ("reward", "ppo"):
        head = config.optimizer.lr.head
        rates["head"] = rates["language"] if head is None else head
    return rates


class Instruct(L.LightningModule):
    """Model and objective of the supervised stages.

    Args:
        model: The model.
        config: The run.
        images: Finishes what the loader prepared; None for text alone.
        total_steps: Optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, model: MultimodalGPT, config: RunConfig, images: ImageSource | None, total_steps: int):
        super().__init__()
        self.model = model
        self.config = config
        self.images = images
        self.total_steps = total_steps
        self.rates = stage_rates(config)
        freeze(model, self.rates)
        self._validation: list[tuple[float, int, int]] = []
        self._seen = {"samples": 0, "tokens": 0}
        self._clock = time.perf_counter()

    def configure_optimizers(self) -> Any:
        make = self.model, self.config.optimizer, self.rates, self.total_steps
        optimizer, schedule = make_optimizer(*make, fused=not self._loss_is_scaled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _loss_is_scaled(self) -> bool:
        """Whether a loss scaler stands between loss and optimizer (fp16)."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's mixed precision refuses to clip for a fused optimizer, because behind a loss scaler that one would unscale
        # the gradients itself, after the clipping. In bf16 there is no scaler, and nothing to refuse.
        plugin = self.trainer.precision_plugin
        if self.config.trainer.strategy == "fsdp":
            # A rank holds a part of every gradient: the norm is that of all parts, which FSDP adds up over the ranks.
            sharded: Any = self.trainer.model
            if gradient_clip_val:
                sharded.clip_grad_norm_(gradient_clip_val)
        elif isinstance(plugin, MixedPrecision) and not self._loss_is_scaled:
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if isinstance(batch.images, Prepared):
            batch.images = self.images.finish(batch.images) if self.images is not None else None
        return batch.to(device)

    def on_train_epoch_start(self) -> None:
        freeze(self.model, self.rates)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        result = self.model.loss(batch, label_smoothing=self.config.optimizer.label_smoothing)
        # The divisor counts the supervised tokens of the whole optimizer step over all ranks, so that accumulation and
        # data-parallel averaging (which divide once more) leave the mean over tokens.
        scale = self.config.trainer.accumulate * self.trainer.world_size
        loss = result.loss * scale / max(1, batch.target_count)
        if batch.images is None:
            loss = loss + no_gradient(self, beside_language)
        supervised = batch.supervised
        measured = {
            "train/accuracy": int(result.correct) / max(1, supervised),
            "train/supervised_share": supervised / max(1, batch.tokens),
        }
        self.log_train(batch, float(result.loss.detach()) / max(1, result.count), measured)
        return loss

    def log_train(self, batch: Batch, loss: float, measured: dict[str, float]) -> None:
        """Log a training batch: its loss, what else was measured on it, and the throughput."""
        tokens = batch.tokens
        self._seen["samples"] += batch.samples
        self._seen["tokens"] += tokens
        seconds = max(1e-9, time.perf_counter() - self._clock)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict(
            {
                **measured,
                "train/fill": tokens / batch.input_ids.numel(),
                "train/samples_per_s": self._seen["samples"] / seconds,
                "train/tokens_per_s": self._seen["tokens"] / seconds,
                "train/lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            },
            batch_size=1,
        )

    def on_train_start(self) -> None:
        self._clock = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self._validation = []
        self._pause = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        result = self.model.loss(batch)
        self._validation.append((float(result.loss), result.count, int(result.correct)))

    def on_validation_epoch_end(self) -> None:
        loss, count, correct = (sum(column) for column in zip(*self._validation)) if self._validation else (0.0, 0, 0)
        totals = torch.tensor([loss, count, correct], dtype=torch.float64)
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather(totals.float())
            totals = gathered.double().sum(0).cpu()
        if totals[1] > 0:
            self.log("val/loss", float(totals[0] / totals[1]), prog_bar=True, batch_size=1)
            self.log("val/token_accuracy", float(totals[2] / totals[1]), batch_size=1)

    def on_validation_end(self) -> None:
        # Throughput is of training: the time spent here, and on answering samples, does not count.
        self._clock += time.perf_counter() - self._pause

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return learnt_state(self, super().state_dict(*args, **kwargs), kwargs.get("prefix", ""))
