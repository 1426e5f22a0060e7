"""Whether a prompt is sensitive and should not be answered: a filter of its own, without a GPU and without a network.

    from safety import Filter
    verdict = Filter().check("How do I kill a Python process?")
    verdict.sensitive, verdict.score, verdict.reason

Judging needs onnxruntime, tokenizers and numpy, and nothing of `mmgpt`. Importing this package imports none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safety.filter import Filter
    from safety.verdict import Verdict

__version__ = "0.1.0"
__all__ = ["Filter", "Verdict", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Filter", "Verdict"):
        from safety import filter

        return getattr(filter, name)
    raise AttributeError(f"module 'safety' has no attribute {name!r}")
