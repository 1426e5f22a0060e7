"""A run on data that goes by prompt: nothing of a prompt is both learnt from and held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from mmgpt.config import SourceConfig
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.split import split_by_prompt
from mmgpt.errors import UsageError, UserError
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.run import Run, say


class PromptRun(Run):
    """What reward models, DPO and PPO have in common: sources are read whole and split by prompt."""

    noun: str
    """What an item is called."""

    def _read(self, sources: list[SourceConfig], model: MultimodalGPT, report: RejectionReport) -> list[Any]:
        """The usable items of sources."""
        raise NotImplementedError

    def _key(self, item: Any) -> str:
        """The same for the same prompt, and for no other (`prompt_key`)."""
        raise NotImplementedError

    def _items(self, model: MultimodalGPT, report: RejectionReport) -> tuple[list[Any], list[Any]]:
        data = self.config.data
        if data.stream:
            raise UsageError(
                f"data.stream: {self.noun}s are grouped by prompt, which takes the whole of a source; set it to false"
            )
        if not data.train:
            raise UsageError(f"data.train names no source: give at least one with {self.noun}s")
        train = self._read(data.train, model, report)
        if not train:
            raise UserError(f"no usable {self.noun} in {', '.join(source.path for source in data.train)}")
        if not data.validation:
            return split_by_prompt(train, data.holdout, self.config.trainer.seed, self._key, data.fold)
        held = self._read(data.validation, model, report)
        validation = self._unseen(held, train)
        if overlap := len(held) - len(validation):
            say(f"{overlap} prompts of data.validation are among those to train on; they are left out of the validation")
        return train, validation

    def _unseen(self, items: Sequence[Any], train: Sequence[Any]) -> list[Any]:
        """The items whose prompts are not trained on."""
        known = {self._key(item) for item in train}
        return [item for item in items if self._key(item) not in known]

    def _callbacks(self, validation: list[Any]) -> list[L.Callback]:
        return []
