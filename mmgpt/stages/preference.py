"""Direct preference optimisation: a policy from preferences alone, without a reward model and without drawing answers.

The objective is Rafailov et al. 2023, equation 7, - log sigmoid(beta (log pi(y_w) / ref(y_w) - log pi(y_l) / ref(y_l))): the mean
over prompts of the mean over comparisons, as the reward model has it; and, if asked for, the supervised loss of the preferred
answers (Pang et al. 2024, equation 2).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from mmgpt.config import RunConfig
from mmgpt.data.branching import PreferenceBatch
from mmgpt.data.features import ImageSource
from mmgpt.data.packing import Batch
from mmgpt.model.adapters import adapters_off, only_adapters_learn
from mmgpt.model.language import logits_of
from mmgpt.model.multimodal import LOSS_CHUNK, MultimodalGPT
from mmgpt.rl.losses import dpo_loss, log_probs_of
from mmgpt.stages.instruct import Instruct
from mmgpt.stages.optimizer import beside_language, no_gradient


class DirectPreference(Instruct):
    """Optimizer, precision and checkpoints of the supervised stages, on preferences.

    Where adapters alone learn, the reference is the model with its adapters off, and costs no memory; else it is a copy of the
    model as the run begins, which a resumed run makes again from its configuration.

    Args:
        model: The policy; it has no dropout while it trains.
        config: The run.
        images: Finishes what the loader prepared; None for text alone.
        total_steps: Optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, model: MultimodalGPT, config: RunConfig, images: ImageSource | None, total_steps: int):
        super().__init__(model, config, images, total_steps)
        self.model.eval()
        # In a list, so that it is no submodule: neither trained, nor moved, nor saved with the stage.
        self._copy: list[MultimodalGPT] = []
        if not only_adapters_learn(model):
            self._copy.append(copy.deepcopy(model).requires_grad_(False).eval())
        self._validated: list[tuple[float, int, int, float, int]] = []

    @property
    def has_copy(self) -> bool:
        """Whether the reference is a model of its own."""
        return bool(self._copy)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.eval()

    @torch.no_grad()
    def reference(self, batch: PreferenceBatch) -> torch.Tensor:
        """[N] log-probabilities of the answers under the reference."""
        if self._copy:
            if self._copy[0].device != self.model.device:
                self._copy[0].to(self.model.device)
            return answer_log_probs(self._copy[0], batch)
        with adapters_off(self.model):
            return answer_log_probs(self.model, batch)

    @torch.no_grad()
    def implied(self, batch: PreferenceBatch) -> torch.Tensor:
        """[N] the reward that the policy implies, beta log pi / ref, but for what the answers to one prompt have in common."""
        return self.config.preference.beta * (answer_log_probs(self.model, batch) - self.reference(batch))

    def _losses(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over prompts of the mean over comparisons, and the margin of each pair.

        The supervised term is the mean over the tokens by which a preferred answer differs, those behind the common beginning.
        """
        policy, reference = answer_log_probs(self.model, batch), self.reference(batch)
        sides = [scores[places] for scores in (policy, reference) for places in (batch.better, batch.worse)]
        losses, margins = dpo_loss(*sides, beta=self.config.preference.beta)
        if supervised := self.config.preference.supervised:
            tokens = torch.bincount(batch.token_answers, minlength=len(policy))
            losses = losses - supervised * sides[0] / tokens[batch.better]
        return (losses * batch.weights).sum(), margins

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, PreferenceBatch)
        total, margins = self._losses(batch)
        # The divisor counts the prompts of the whole optimizer step over all ranks.
        loss = total * self.config.trainer.accumulate * self.trainer.world_size / max(1, batch.target_count)
        if batch.images is None:
            loss = loss + no_gradient(self, beside_language)
        pairs = max(1, len(margins))
        measured = {"train/accuracy": int((margins > 0).sum()) / pairs, "train/margin": float(margins.sum()) / pairs}
        self.log_train(batch, float(total.detach()) / max(1, batch.samples), measured)
        return loss

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validated = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert isinstance(batch, PreferenceBatch)
        total, margins = self._losses(batch)
        self._validated.append((float(total), batch.samples, int((margins > 0).sum()), float(margins.sum()), len(margins)))

    def on_validation_epoch_end(self) -> None:
        totals = torch.tensor(self._validated or [(0.0, 0, 0, 0.0, 0)], dtype=torch.float32).sum(0)
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather(totals)
            totals = gathered.sum(0).cpu()
        loss, prompts, right, margin, pairs = totals.tolist()
        if pairs:
            self.log("val/loss", loss / prompts, prog_bar=True, batch_size=1)
            self.log("val/accuracy", right / pairs, batch_size=1)
            self.log("val/margin", margin / pairs, batch_size=1)


def answer_log_probs(model: MultimodalGPT, batch: PreferenceBatch) -> torch.Tensor:
    """[N] log-probabilities of whole answers, their end tokens included.

    Tokens that all answers to a prompt begin with are left out where they share it: they are the same on both sides of any
    difference. Logits exist for `LOSS_CHUNK` tokens at one time.
    """
    hidden = model.hidden(batch)[batch.token_rows, batch.token_sources]
    ids = batch.input_ids[batch.token_rows, batch.token_columns]
    total = hidden.new_zeros(len(batch.rows), dtype=torch.float32)

    def chunk(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return log_probs_of(logits_of(model.language, states), tokens)

    for start in range(0, len(ids), LOSS_CHUNK):
        part = hidden[start : start + LOSS_CHUNK], ids[start : start + LOSS_CHUNK]
        if len(ids) > LOSS_CHUNK and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            found = checkpoint(chunk, *part, use_reentrant=False)
        else:
            found = chunk(*part)
        total = total.index_add(0, batch.token_answers[start : start + LOSS_CHUNK], found)
    return total
