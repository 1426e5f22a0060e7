"""What the filter says of a text: the verdict, its reason codes, the operating points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safety.taxonomy import KEYS

MAX_BYTES = 10_000_000
"""A text of so many bytes of UTF-8 is not read but blocked."""

POINTS = ("strict", "balanced", "loose")

REASONS: dict[str, str] = {
    "clear": "not sensitive",
    "sensitive": "sensitive, of no single category",
    **{key: "sensitive; its likeliest category" for key in KEYS},
    "empty": "no text, or nothing visible in it",
    "not_text": "None, a number, bytes: not a string",
    "invalid_utf8": "bytes that are no UTF-8",
    "surrogates": "lone surrogates, which are no characters",
    "bad_line": "a line that is no JSON object with the field",
    "bad_messages": "a conversation that is no list of messages",
    "too_long": f"{MAX_BYTES:,} bytes or more",
    "budget_exceeded": "disguises nested too deep, or growing too long when they are taken off",
    "not_finite": "a stage gave NaN, infinity or the wrong number of outputs",
    "failed_normalize": "an exception while the text was normalised or decoded",
    "failed_windows": "an exception while windows were cut",
    "failed_linear": "an exception in stage 1",
    "failed_transformer": "an exception in stage 2",
    "failed_decision": "an exception in the decision",
    "weights_missing": "a file of the weights is not there",
    "weights_truncated": "a file of the weights is shorter than it was",
    "weights_altered": "a file of the weights is not the one whose hash was written down",
    "weights_unreadable": "a file of the weights cannot be read or used",
    "canary_failed": "the prompts that are tried at the start are not told apart",
    "failed_load": "another exception while the filter was loaded",
    "failed_gate": "an exception in the gate",
    "failed_audit": "the audit log cannot be written",
}
"""Every reason code. All but `clear` block."""


@dataclass(frozen=True)
class Verdict:
    """What the filter decided.

    Args:
        sensitive: Whether the text should not be answered.
        score: Calibrated probability that it is sensitive; 1 where it could not be judged.
        reason: A code of `REASONS`.
        categories: A calibrated probability for each category of the taxonomy, of the window that decided; empty where the
            text could not be judged.
        span: Characters of the text that fired, start and end; None where nothing did.
        view: The reading in which they fired: `canonical`, or the decoders that led to it.
        operating_point: strict, balanced or loose.
        model: Hash of the weights, 12 digits; empty where there are none.
    """

    sensitive: bool
    score: float
    reason: str
    categories: Mapping[str, float] = field(default_factory=dict)
    span: tuple[int, int] | None = None
    view: str = ""
    operating_point: str = "balanced"
    model: str = ""

    @property
    def allowed(self) -> bool:
        return not self.sensitive

    def to_json(self) -> dict[str, Any]:
        """A dict for one line of JSON."""
        return {
            "sensitive": self.sensitive,
            "score": round(self.score, 6),
            "reason": self.reason,
            "categories": {key: round(value, 4) for key, value in self.categories.items()},
            "span": None if self.span is None else list(self.span),
            "view": self.view,
            "operating_point": self.operating_point,
            "model": self.model,
        }
