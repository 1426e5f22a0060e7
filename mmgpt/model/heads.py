"""Models that end in a number instead of a word: the reward of an answer, the value of a position.

Letters in shapes: B rows, L tokens, H width of the language model, N answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmgpt.data.branching import PreferenceBatch, collate_answers
from mmgpt.data.messages import Message, normalize
from mmgpt.data.ranked import Preference, RankedItem, rank_item
from mmgpt.errors import UserError
from mmgpt.model.language import width_of
from mmgpt.model.multimodal import MultimodalGPT, find_model

HEAD_FILE = "reward.safetensors"


class ScalarHead(nn.Linear):
    """Hidden state to number: w . h + b, in fp32.

    w begins as N(0, 1 / sqrt(d + 1)) and b at 0 (Stiennon et al. 2020, appendix B.1, which InstructGPT follows).
    """

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.normal_(self.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class RewardModel(nn.Module):
    """A language model, with or without eyes, that scores whole answers: a scalar head in the unembedding's place.

    The score of an answer is read at the token that ends it (Ouyang et al. 2022, section 3.5).

    Args:
        model: The model; its unembedding is not used.
        head: The head; None makes a new one.
    """

    def __init__(self, model: MultimodalGPT, head: ScalarHead | None = None):
        super().__init__()
        self.model = model
        self.head = head or ScalarHead(width_of(model.language)).to(model.device)

    # The optimizer and `freeze` find the parts of a model by these names.

    @property
    def vision(self) -> nn.Module | None:
        return self.model.vision

    @property
    def projector(self) -> nn.Module | None:
        return self.model.projector

    @property
    def language(self) -> nn.Module:
        return self.model.language

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """[N] scores in fp32 of the answers of a batch whose `images` are tensors."""
        return self.head(self.model.hidden(batch)[batch.rows, batch.columns])

    @torch.inference_mode()
    def score(self, prompts: Sequence[Any], answers: Sequence[str], images: Any = None, *, batch_size: int = 16) -> Tensor:
        """The reward of answers: a reward function in the form that `ppo` takes.

        Args:
            prompts: Conversations whose next turn is the assistant's, with their images.
            answers: One an element of `prompts`.
            images: What rewards that look at pictures alone are given; the prompts hold the same ones, so it is not used here.
            batch_size: Answers scored side by side.

        Returns:
            [N] in fp32 on the CPU.

        Raises:
            UserError: a conversation that breaks the form, or is longer than the model's window.
        """
        items: list[RankedItem] = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            canonical: list[Message] = normalize(prompt)
            item = rank_item(Preference(canonical, [answer], [], 1, f"answer {number}"), self.model.encode, self.model.context)
            if not isinstance(item, RankedItem):
                raise UserError(f"{item.where} cannot be scored: {item.detail.replace('data.max_length', 'the window')}")
            items.append(item)
        scores = torch.empty(len(items))
        # Answers of like length share a batch, so that little is padded.
        order = sorted(range(len(items)), key=lambda index: -len(items[index]))
        training = {module: module.training for module in self.modules()}
        self.eval()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate_answers([[items[index]] for index in chosen], self.model.tokenizer.pad_id, share=False)
            batch.images = self.model.image_features(batch.images) if batch.images else None
            scores[chosen] = self(batch.to(self.model.device)).cpu()
        for module, was in training.items():
            module.training = was
        return scores

    # Files

    def save_pretrained(self, folder: str | Path, *, full: bool = True) -> None:
        """Write the model as `MultimodalGPT.save_pretrained` does, with the head, its shift included, beside it."""
        from safetensors.torch import save_file

        head = {name: value.detach().contiguous().cpu() for name, value in self.head.state_dict().items()}
        self.model.save_pretrained(folder, full=full, beside=lambda fresh: save_file(head, fresh / HEAD_FILE))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardModel:
        """Read a reward model, or that of a run folder.

        Raises:
            UserError: the folder holds no model, or one without a head.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = find_model(folder)
        if not (folder / HEAD_FILE).is_file():
            raise UserError(f"{folder} is no reward model: it has no {HEAD_FILE}; train one with stage: reward")
        model = MultimodalGPT.from_pretrained(folder)
        head = ScalarHead(width_of(model.language))
        try:
            head.load_state_dict(load_file(folder / HEAD_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder / HEAD_FILE} does not fit the model beside it: {str(error).splitlines()[0]}") from error
        return cls(model, head).eval()
