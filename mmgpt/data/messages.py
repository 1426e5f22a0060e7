"""Conversations with images: the one form that every reader produces and every stage consumes.

A conversation is a list of messages in the form transformers and OpenAI use::

    [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is this?"}]},
     {"role": "assistant", "content": "A pear."}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, runtime_checkable

from mmgpt.errors import UserError

Role = Literal["system", "user", "assistant"]


@runtime_checkable
class LazyImage(Protocol):
    """An encoded image that is read when it is needed: a row of a parquet file, a member of a tar."""

    name: str

    def read(self) -> bytes: ...


ImageRef = Any  # str | Path | bytes | LazyImage | PIL.Image.Image
"""Whatever `mmgpt.data.images.open_image` opens."""


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    type: Literal["image"]
    image: Any  # an ImageRef


Part = TextPart | ImagePart


class Message(TypedDict):
    role: Role
    content: list[Part]


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from, and where it came from (`captions.jsonl:17`) for messages about it."""

    messages: list[Message]
    where: str

    @property
    def images(self) -> list[Any]:
        return images_of(self.messages)


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used: a short reason to count by, where it stood, and what was wrong with it."""

    reason: str
    where: str
    detail: str


class MessageError(UserError):
    """A conversation that breaks the form; `reason` is the word that bad samples are counted by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The images of a conversation in the order they appear."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def text_of(message: Message) -> str:
    """The text of a message without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def user(text: str, images: Sequence[Any] = ()) -> Message:
    """A user's message: the images first, then the text."""
    parts: list[Part] = [{"type": "image", "image": image} for image in images]
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def assistant(text: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def normalize(messages: Any, *, supervised: bool = False) -> list[Message]:
    """Check a conversation and bring it to the canonical form (content as a list of parts).

    Args:
        messages: What a user or a file handed in.
        supervised: Also require a non-empty answer to learn from.

    Raises:
        MessageError: with reason `not_messages`, `bad_role`, `bad_part` or `empty_answer`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise MessageError("not_messages", "a conversation is a non-empty list of {role, content} messages")
    result: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise MessageError("not_messages", f"message {number} needs the keys role and content")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise MessageError("bad_role", f"message {number} has role {role!r}; roles are system, user, assistant")
        result.append({"role": role, "content": _parts(message["content"], number)})
    if supervised:
        answers = [message for message in result if message["role"] == "assistant"]
        if not any(text_of(message).strip() for message in answers):
            raise MessageError("empty_answer", "no assistant message with text: there is nothing to learn from")
    return result


def _parts(content: Any, number: int) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, Sequence):
        raise MessageError("bad_part", f"content of message {number} is neither a string nor a list of parts")
    parts: list[Part] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is not None:
            parts.append({"type": "image", "image": part["image"]})
        else:
            raise MessageError("bad_part", f"message {number} has a part that is neither text nor image: {str(part)[:80]}")
    return parts
