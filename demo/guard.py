"""Between `demo/ask.py` and a gate that may be broken: whatever a gate does wrong, no answer comes of it.

`safety.gate` decides; here its decisions are checked, and told from the model's errors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmgpt.errors import UserError

if TYPE_CHECKING:
    from mmgpt.data.messages import Message
    from safety.gate import Verdict


class GateError(UserError):
    """The gate could not be built, raised, or answered with something that is no verdict. Exit code 3."""

    exit_code = 3


@dataclass
class Answer:
    """What became of one question.

    Args:
        text: What the user was shown, a refusal included.
        generated: What the model said, cleared or not.
        refusal: The verdict that refused; None where the question was answered.
        first_token: When the first text was shown (`time.perf_counter`); None where there was none.
    """

    text: str = ""
    generated: str = ""
    refusal: Verdict | None = None
    first_token: float | None = None

    def add(self, text: str) -> None:
        if text and self.first_token is None:
            self.first_token = time.perf_counter()
        self.text += text


def described(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def build_gate(make_gate: Callable[[], Any]) -> Any:
    """Build the gate. Raises GateError."""
    with _blame("the gate cannot be loaded, so nothing is answered"):
        return make_gate()


def check_prompt(gate: Any, messages: Sequence[Message]) -> Verdict:
    """The gate's verdict on a conversation. Raises GateError."""
    with _blame("the gate failed on the question, so nothing is answered"):
        return _verdict(gate.check_prompt(messages))


def gated_answer(
    gate: Any, messages: Sequence[Message], pieces: Iterator[str], show: Callable[[str], None], answer: Answer
) -> None:
    """Show what the gate clears of an answer, and record it in `answer` while it comes.

    Where the gate's stream is a generator, the verdict it returns says whether the answer was refused in the end.

    Raises:
        GateError: the gate raised, or made something that is no text; nothing more is shown.
        Exception: what the model raised.
    """
    source = _Pieces(pieces, answer)
    with _blame("the gate failed on the answer, which is withheld", source):
        cleared = iter(gate.stream(messages, source))
    while True:
        with _blame("the gate failed on the answer, the rest of which is withheld", source):
            try:
                text = next(cleared)
            except StopIteration as end:
                verdict = None if end.value is None else _verdict(end.value)
                break
            if not isinstance(text, str):
                raise TypeError(f"expected text, got {type(text).__name__}")
        answer.add(text)
        show(text)
    if source.error is not None:
        raise source.error
    if verdict is not None and not verdict.allowed:
        answer.refusal = verdict


class _Pieces(Iterator[str]):
    """The model's pieces on their way to the gate.

    Remembers what the model raised: it passes through the gate's code, and must neither be taken for the gate's failure
    nor be lost where the gate swallows it.
    """

    def __init__(self, pieces: Iterator[str], answer: Answer):
        self.pieces = pieces
        self.answer = answer
        self.error: BaseException | None = None

    def __next__(self) -> str:
        try:
            piece = next(self.pieces)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise
        self.answer.generated += piece
        return piece


@contextmanager
def _blame(what: str, source: _Pieces | None = None) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        if source is not None and source.error is not None:
            raise source.error from None
        raise GateError(f"{what}: {described(error)}") from error


def _verdict(value: Any) -> Verdict:
    from safety.gate import Verdict

    if not isinstance(value, Verdict) or not isinstance(value.allowed, bool) or not math.isfinite(value.score):
        raise TypeError(f"expected a verdict, got {value!r:.80}")
    if not value.allowed and not (isinstance(value.refusal, str) and value.refusal):
        raise ValueError("a refusal without words")
    return value
