"""An answer while it is being written: what may be shown of it so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from safety.verdict import MAX_BYTES, Verdict


class Judge(Protocol):
    """What judges the pieces: `filter.Filter`."""

    problem: str
    model: str

    def check(self, text: Any) -> Verdict: ...

    def blocked(self, reason: str) -> Verdict: ...


class AnswerStream:
    """Checks an answer while it comes and gives back what is cleared.

    At every `STEP` characters the last `TAIL` are judged, and all of the answer at its end; what is cleared is held back by
    `HOLD` more characters, so that a sentence is not half shown when its end gives it away. Where the answer is cut into
    pieces makes no difference, but for one of `MAX_BYTES`, which is not read further.
    """

    STEP, HOLD, TAIL = 96, 64, 768

    def __init__(self, judge: Judge) -> None:
        self.filter = judge
        self.verdict = judge.blocked(judge.problem) if judge.problem else Verdict(False, 0.0, "clear", model=judge.model)
        self._text: list[str] = []
        self._tail = ""
        self._held = ""
        self._since = 0
        self._bytes = 0
        self._worst: Verdict | None = None

    def feed(self, piece: Any) -> Iterator[str]:
        """Take a piece of the answer; gives what may be shown of it and of what came before."""
        if self.verdict.sensitive:
            return
        if not isinstance(piece, str):
            self.verdict = self.filter.blocked("not_text")
            return
        self._bytes += len(piece.encode("utf-8", "surrogatepass"))
        if self._bytes >= MAX_BYTES:
            self.verdict = self.filter.blocked("too_long")
            return
        at = 0
        while at < len(piece):
            part = piece[at : at + self.STEP - self._since]
            at += len(part)
            self._since += len(part)
            self._text.append(part)
            self._held += part
            self._tail = (self._tail + part)[-self.TAIL :]
            if self._since == self.STEP:
                self._since = 0
                if self._tail.strip():
                    self._judge(self._tail)
                if self.verdict.sensitive:
                    return
                cleared, self._held = self._held[: -self.HOLD], self._held[-self.HOLD :]
                if cleared:
                    yield cleared

    def close(self) -> Iterator[str]:
        """The answer has ended: gives what is left of it, if all of it may be shown."""
        if self.verdict.sensitive:
            return
        self._judge("".join(self._text))
        if not self.verdict.sensitive and self._held:
            cleared, self._held = self._held, ""
            yield cleared

    def _judge(self, text: str) -> None:
        found = self.filter.check(text)
        if self._worst is None or (found.sensitive, found.score) > (self._worst.sensitive, self._worst.score):
            self._worst = found
        self.verdict = self._worst
