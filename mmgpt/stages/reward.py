"""The reward model: from which answer people preferred to a number for every answer.

The objective is InstructGPT's (Ouyang et al. 2022, equation 1): mean over prompts of
- 1 / C(K, 2) * sum over pairs of log sigmoid(r(x, y_better) - r(x, y_worse)), all pairs of a prompt in one batch element.
"""

from __future__ import annotations

from typing import Any

import torch

from mmgpt.config import RunConfig
from mmgpt.data.branching import PreferenceBatch
from mmgpt.data.features import ImageSource
from mmgpt.data.packing import Batch
from mmgpt.model.heads import RewardModel
from mmgpt.rl.losses import reward_loss
from mmgpt.stages.instruct import Instruct
from mmgpt.stages.optimizer import beside_language, freeze_unembedding, no_gradient


class Reward(Instruct):
    """Optimizer, precision and checkpoints of the supervised stages, on another model and objective.

    Args:
        model: The reward model; it has no dropout while it trains.
        config: The run.
        images: Finishes what the loader prepared; None for text alone.
        total_steps: Optimizer steps of the whole run, for the schedule.
    """

    model: RewardModel  # type: ignore[assignment]

    def __init__(self, model: RewardModel, config: RunConfig, images: ImageSource | None, total_steps: int):
        super().__init__(model, config, images, total_steps)  # type: ignore[arg-type]
        self._settle()
        self._margins: list[tuple[float, int, int, int]] = []

    def _settle(self) -> None:
        """No dropout: a comparison must not depend on luck. No gradient for an unembedding, where it is not the embedding."""
        self.model.eval()
        freeze_unembedding(self.model.language)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._settle()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, PreferenceBatch)
        scores = self.model(batch)
        prompts = max(1, batch.samples)
        own = reward_loss(scores, batch.better, batch.worse, batch.weights, prompts)
        # The divisor counts the prompts of the whole optimizer step over all ranks.
        loss = own * (prompts * self.config.trainer.accumulate * self.trainer.world_size / max(1, batch.target_count))
        if batch.images is None:
            loss = loss + no_gradient(self, beside_language)
        margins = (scores[batch.better] - scores[batch.worse]).detach()
        pairs = max(1, len(margins))
        measured = {"train/accuracy": int((margins > 0).sum()) / pairs, "train/margin": float(margins.sum()) / pairs}
        self.log_train(batch, float(own.detach()), measured)
        return loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._margins = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert isinstance(batch, PreferenceBatch)
        scores = self.model(batch)
        loss = reward_loss(scores, batch.better, batch.worse, batch.weights, 1.0)
        right = int((scores[batch.better] > scores[batch.worse]).sum())
        self._margins.append((float(loss), batch.samples, right, len(batch.better)))

    def on_validation_epoch_end(self) -> None:
        totals = torch.tensor(self._margins or [(0.0, 0, 0, 0)], dtype=torch.float32).sum(0)
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather(totals)
            totals = gathered.sum(0).cpu()
        loss, prompts, right, pairs = totals.tolist()
        if pairs:
            self.log("val/loss", loss / prompts, prog_bar=True, batch_size=1)
            self.log("val/accuracy", right / pairs, batch_size=1)
