"""Text to ids and back, without any text ever turning into a control token by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmgpt.errors import UserError

IMAGE_TOKEN = "<|image|>"


class Tokenizer:
    """A `tokenizers` tokenizer with the few control tokens that a conversation needs.

    `encode` treats its argument as text: `<|image|>` or `<|im_end|>` typed by a user becomes ordinary pieces.
    Control tokens are reached by name through `control`. The image token always exists; where the vocabulary lacks it,
    it takes the first free id, which the language model's embedding need not have: its row is never looked up.

    Args:
        backend: The `tokenizers.Tokenizer`.
        eos: The token that ends an answer.
        pad: Filler for short rows; never the same token as `eos`.
    """

    def __init__(self, backend: Any, *, eos: str | None = None, pad: str | None = None):
        from tokenizers import AddedToken

        self.backend = backend
        self.text_vocabulary = backend.get_vocab_size(with_added_tokens=True)
        backend.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
        backend.no_padding()
        backend.no_truncation()
        # With this set a special token inside text is split like any other text.
        backend.encode_special_tokens = True
        # SentencePiece vocabularies put a space in front of every text by themselves.
        self.prepends_space = "".join(backend.encode("x", add_special_tokens=False).tokens).startswith("▁")
        self.image_id = self.control(IMAGE_TOKEN)
        self.eos = eos or self._first_of("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<eos>", "[SEP]")
        self.eos_id = self.control(self.eos)
        # Padding that looks like the end of an answer teaches a model to stop early or never: it is another token.
        choices = [pad, "<|pad|>", "<|padding|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>", "<|unk|>"]
        choices += [backend.id_to_token(0), backend.id_to_token(1)]
        self.pad = next(name for name in choices if name and name != self.eos and self.has(name))
        self.pad_id = self.control(self.pad)

    def _first_of(self, *names: str) -> str:
        for name in names:
            if self.backend.token_to_id(name) is not None:
                return name
        raise UserError(f"the tokenizer has none of the control tokens {', '.join(names)}; name one in its config")

    def control(self, name: str) -> int:
        """Id of a control token. Raises UserError where the vocabulary has no such token."""
        token = self.backend.token_to_id(name)
        if token is None:
            raise UserError(f"the tokenizer has no token {name!r}; choose a chat template that fits the language model")
        return int(token)

    def has(self, name: str) -> bool:
        return self.backend.token_to_id(name) is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added in front or behind. A lone surrogate, which no UTF-8 has, becomes `?`."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        if self.prepends_space and text.startswith(" "):
            text = text[1:]
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "pad_token": self.pad,
            "additional_special_tokens": [IMAGE_TOKEN],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json (and the names of the end and pad tokens beside it).

        Raises:
            UserError: there is no tokenizer.json, or it cannot be read.
        """
        from tokenizers import Tokenizer as Backend

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder} has no tokenizer.json: name a folder saved by transformers' fast tokenizers")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:
            raise UserError(f"{file} is not a tokenizer: {error}") from error
        settings = _settings(Path(folder) / "tokenizer_config.json")
        eos, pad = _name(settings.get("eos_token")), _name(settings.get("pad_token"))
        known = [name if name and backend.token_to_id(name) is not None else None for name in (eos, pad)]
        return cls(backend, eos=known[0], pad=known[1])

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token a byte, plus the control tokens of the chat templates: 261 ids, nothing to download."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        return cls(backend)


def _settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
