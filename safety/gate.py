"""The gate before and behind a model: the question is judged, then the answer while it comes.

    gate = Gate(audit="audit.jsonl")
    verdict = gate.check_prompt(messages)
    if verdict.allowed:
        for text in gate.stream(messages, model_pieces): show(text)
    else:
        show(verdict.refusal)

What goes wrong refuses: `Gate` never raises for a fault of its own, it says no and why. `Gate.problem` is not empty where the
filter could not be loaded, so that a program can tell "refused" from "broken".
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety import verdict as verdict_
from safety.filter import Filter, content_text
from safety.stream import AnswerStream

REFUSAL = "I'm sorry, but I can't help with that."
"""The one style of a refusal: grade A of `safety.rules`."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided.

    Args:
        allowed: Whether the text may pass.
        reason: A code of `safety.verdict.REASONS`.
        score: Calibrated probability that the text is sensitive.
        refusal: What the user is told instead; empty where the text may pass.
    """

    allowed: bool
    reason: str
    score: float
    refusal: str


class Gate:
    """Refuses sensitive questions, and answers that turn out to be.

    Args:
        operating_point: `strict`, `balanced` or `loose`.
        audit: A file to which every decision is appended as a line of JSON.
        log_text: Write the text itself into the audit log instead of its salted hash alone.
        weights: Another folder of weights.
    """

    def __init__(
        self,
        operating_point: str = "balanced",
        *,
        audit: str | Path | None = None,
        log_text: bool = False,
        weights: str | Path | None = None,
    ) -> None:
        self.filter = Filter(operating_point, weights=weights)
        self.audit = None if audit is None else AuditLog(Path(audit), log_text=log_text)

    @property
    def problem(self) -> str:
        """Why nothing can be judged: a code, or empty."""
        return self.filter.problem

    @property
    def detail(self) -> str:
        return self.filter.detail

    def check_prompt(self, messages: Sequence[Any]) -> Verdict:
        """Judge a conversation before it is answered."""
        try:
            found = self.filter.check_conversation(messages)
        except (Exception, SystemExit):
            found = self.filter.blocked("failed_gate")
        return self._decided("prompt", found, lambda: "\n".join(content_text(message["content"]) for message in messages))

    def stream(self, messages: Sequence[Any], pieces: Iterable[str]) -> Generator[str, None, Verdict]:
        """Let an answer through once it is cleared; see `stream.AnswerStream`.

        What comes out, joined, is what went in as long as nothing is found; wherever the pieces are cut, the same is found.
        Then everything still held is dropped, the refusal comes out, and the stream ends. An exception of `pieces` itself
        passes through, and what was held is dropped; the log has a line "cut" then, and where the reader stops before the end.

        Returns:
            (As the generator's return value) the verdict on the answer.
        """
        checker = self.filter.answer_stream()
        said: list[str] = []
        released = False
        try:
            for piece in pieces:
                cleared = self._step(checker, lambda piece=piece: list(checker.feed(piece)))  # type: ignore[misc]
                if isinstance(piece, str):
                    said.append(piece)
                if checker.verdict.sensitive:
                    break
                for text in cleared:
                    released = True
                    yield text
        except BaseException:
            self._decided("cut", checker.verdict, lambda: "".join(said))
            raise
        rest = [] if checker.verdict.sensitive or not said else self._step(checker, lambda: list(checker.close()))
        verdict = self._decided("answer", checker.verdict, lambda: "".join(said))
        if verdict.allowed:
            yield from rest
        else:
            yield ("\n\n" if released else "") + verdict.refusal
        return verdict

    def _step(self, checker: AnswerStream, act: Any) -> list[str]:
        try:
            cleared: list[str] = act()
            return cleared
        except (Exception, SystemExit):
            checker.verdict = self.filter.blocked("failed_gate")
            return []

    def _decided(self, event: str, found: verdict_.Verdict, text: Any) -> Verdict:
        if self.audit is not None:
            try:
                said = ""
                with contextlib.suppress(Exception):
                    said = text()
                self.audit.write(event, found, said)
            except (Exception, SystemExit):
                # What cannot be accounted for is not done.
                found = self.filter.blocked("failed_audit")
        return Verdict(found.allowed, found.reason, found.score, "" if found.allowed else REFUSAL)


class AuditLog:
    """Decisions, a line of JSON each: enough to count and to recognise a text again, not enough to read it.

    A text is named by its HMAC-SHA256 under a salt that lies beside the log (`audit.jsonl.salt`, readable by its owner
    alone). Whoever has a text and the salt can find it in the log; without the salt no list of likely prompts can be tried.

    Args:
        path: The log; lines are appended.
        log_text: Write the text as well.
    """

    def __init__(self, path: Path, *, log_text: bool = False) -> None:
        self.path, self.log_text = path, log_text
        self._salt = b""

    def write(self, event: str, verdict: verdict_.Verdict, text: str) -> None:
        """Append a decision. Raises OSError."""
        data = text.encode("utf-8", "surrogatepass")
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": event,
            "allowed": verdict.allowed,
            "reason": verdict.reason,
            "score": round(verdict.score, 6),
            "operating_point": verdict.operating_point,
            "model": verdict.model,
            "hash": hmac.new(self.salt(), data, hashlib.sha256).hexdigest(),
            "bytes": len(data),
        }
        if self.log_text:
            line["text"] = text
        # One write to a file that was opened to append: lines of several processes do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode("ascii"))
        finally:
            os.close(handle)

    def salt(self) -> bytes:
        """The salt beside the log, made when it is first needed."""
        if not self._salt:
            path = self.path.with_name(self.path.name + ".salt")
            with contextlib.suppress(FileExistsError):
                partial = path.with_name(f"{path.name}.{os.getpid()}")
                handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(handle, os.urandom(32))
                os.close(handle)
                try:
                    os.link(partial, path)  # atomic, and it fails where another process was first
                finally:
                    partial.unlink()
            self._salt = path.read_bytes()
            if len(self._salt) < 32:
                raise OSError(f"{path} is no salt")
        return self._salt
