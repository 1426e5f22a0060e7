"""How near in meaning two sentences are, by a sentence encoder (Reimers and Gurevych 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgpt import artifacts
from mmgpt.errors import UserError

LONGEST = 128
"""Tokens of a sentence that are read; what all-MiniLM-L6-v2 was trained on."""


class SentenceEncoder:
    """Sentences to unit vectors whose inner products say how alike they are: mean of the last states over real tokens.

    Args:
        name: A named text encoder, or a folder with config.json, model.safetensors and tokenizer.json.
    """

    def __init__(self, name: str = "all-minilm-l6-v2"):
        from tokenizers import Tokenizer
        from transformers import AutoModel

        folder = Path(artifacts.resolve(name, kind="text_encoder"))
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.model = AutoModel.from_pretrained(folder).eval()
        except Exception as error:
            raise UserError(f"{folder} is no text encoder: {str(error).splitlines()[0][:200]}") from error
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.no_padding()

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str], batch_size: int = 128) -> Tensor:
        """[N, H] unit vectors in fp32; sentences of like length go together, so that little is padded."""
        found = self.tokenizer.encode_batch(list(sentences))
        order = sorted(range(len(found)), key=lambda place: len(found[place].ids))
        vectors = torch.empty(len(found), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [torch.tensor(found[place].ids) for place in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            vectors[chosen] = F.normalize(mean, dim=-1)
        return vectors
