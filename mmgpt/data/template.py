"""From a conversation to token ids and loss mask, built together, segment by segment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmgpt.data.messages import Message, MessageError
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UsageError

_CONTROL = re.compile(r"(<\|[a-z_]+\|>|</?s>)")
END = "<|end|>"
"""In a template: whatever token the tokenizer ends an answer with."""


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around each message.

    Control tokens are recognised in these strings only, never in what a message says.

    Args:
        name: Name in the configuration.
        before: Text in front of a message, by role.
        end: What ends an answer; it is supervised, and generation stops at it.
        after: Text behind a message, by role, not supervised.
        start: Text in front of the conversation.
    """

    name: str
    before: dict[str, str]
    end: str
    after: dict[str, str] = field(default_factory=dict)
    start: str = ""


TEMPLATES = {
    "chatml": ChatTemplate(
        "chatml",
        before={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
        end="<|im_end|>",
        after={"system": "<|im_end|>\n", "user": "<|im_end|>\n", "assistant": "\n"},
    ),
    # Vicuna 1.1, the format of LLaVA-1.5.
    "vicuna": ChatTemplate(
        "vicuna",
        start="<s>",
        before={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
        end="</s>",
        after={"system": " ", "user": " "},
    ),
    # Image, then caption, without words around them: LLaVA's first stage, and plain text.
    "plain": ChatTemplate("plain", before={"system": "", "user": "", "assistant": ""}, end=END),
}


def control_id(tokenizer: Tokenizer, piece: str) -> int:
    """Id of a template's control token. Raises UserError where the tokenizer lacks it."""
    return tokenizer.eos_id if piece == END else tokenizer.control(piece)


def get_template(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        raise UsageError(f"unknown chat template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids.

    Args:
        ids: Token ids, [L]; the image token stands once for every feature row.
        supervised: Whether the token at a position is to be learnt (predicted from what stands before it), [L].
        images: The images in the order of their placeholders.
    """

    ids: list[int]
    supervised: list[bool]
    images: list[Any]

    def __len__(self) -> int:
        return len(self.ids)


class _Builder:
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.supervised: list[bool] = []
        self.text = ""
        self.text_supervised = False

    def flush(self) -> None:
        ids = self.tokenizer.encode(self.text) if self.text else []
        self.text = ""
        self._extend(ids, self.text_supervised)

    def _extend(self, ids: Sequence[int], supervised: bool) -> None:
        self.ids.extend(ids)
        self.supervised.extend([supervised] * len(ids))

    def add_text(self, text: str, supervised: bool) -> None:
        # Neighbouring text of one kind is tokenised together, so that merges do not depend on how it was cut.
        if supervised != self.text_supervised:
            self.flush()
            self.text_supervised = supervised
        self.text += text

    def add_ids(self, ids: Sequence[int], supervised: bool = False) -> None:
        self.flush()
        self._extend(ids, supervised)

    def add_template(self, text: str, supervised: bool = False) -> None:
        for piece in _CONTROL.split(text):
            if _CONTROL.fullmatch(piece):
                self.add_ids([control_id(self.tokenizer, piece)], supervised)
            elif piece:
                self.add_text(piece, supervised)


def encode(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tokens_per_image: int,
    *,
    prompt: bool = False,
) -> Encoded:
    """Render a conversation.

    Args:
        messages: A conversation in canonical form (`messages.normalize`).
        tokenizer: Encodes text; what a message says never becomes a control token.
        template: The chat template.
        tokens_per_image: Feature rows the projector makes of one image (0: a model without eyes).
        prompt: End where the assistant begins to speak; otherwise the conversation is rendered whole for training.

    Raises:
        MessageError: `no_vision` for an image where the model takes none.
    """
    builder = _Builder(tokenizer)
    images: list[Any] = []
    builder.add_template(template.start)
    for message in messages:
        role = message["role"]
        answer = role == "assistant"
        builder.add_template(template.before[role])
        lead = " " if answer and template.before[role].endswith(":") else ""
        for part in message["content"]:
            if part["type"] == "text":
                builder.add_text(lead + part["text"], answer)
                lead = ""
                continue
            if tokens_per_image == 0:
                raise MessageError("no_vision", "the conversation has an image, but this model reads text only")
            builder.add_ids([tokenizer.image_id] * tokens_per_image)
            images.append(part["image"])
        if answer:
            builder.add_template(template.end, supervised=True)
        builder.add_template(template.after.get(role, ""))
    if prompt:
        builder.add_template(template.before["assistant"])
    builder.flush()
    return Encoded(builder.ids, builder.supervised, images)
