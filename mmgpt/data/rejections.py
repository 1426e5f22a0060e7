"""Bad samples: counted by reason, written down with file and line, and too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from mmgpt.data.messages import Rejected
from mmgpt.errors import UserError


class RejectionReport:
    """The bad samples of a run, in `path` (`bad_samples.jsonl`) as lines {"reason", "where", "detail"}.

    A line is one append of the operating system: several processes may share the file, and a killed run leaves whole
    lines. The same sample is counted once, however often it is met; a resumed run does not write it again. Without a path
    they are only counted.
    """

    def __init__(self, path: Path | None):
        self.path = None if path is None else Path(path)
        self.counts: Counter[str] = Counter()
        self.examples: list[Rejected] = []
        self._seen: set[tuple[str, str]] = set()
        self._written = _read_keys(self.path) if self.path is not None else set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, rejected: Rejected) -> None:
        """Count a bad sample and write it down."""
        key = (rejected.reason, rejected.where)
        if key in self._seen:
            return
        self._seen.add(key)
        self.counts[rejected.reason] += 1
        if len(self.examples) < 3:
            self.examples.append(rejected)
        if self.path is None or key in self._written:
            return
        record = {"reason": rejected.reason, "where": rejected.where, "detail": rejected.detail}
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cannot write the report of bad samples {self.path}: {error.strerror or error}") from error

    def check(self, total: int, max_bad: float) -> None:
        """Stop when too many samples are bad.

        Args:
            total: Samples met so far, good and bad.
            max_bad: Share of bad samples that is let through (`data.max_bad`).

        Raises:
            UserError: with the counts, the first examples, the report and the key to raise.
        """
        bad = len(self)
        if bad == 0 or bad <= max_bad * total:
            return
        examples = "\n".join(f"  {item.where}: {item.reason}: {item.detail[:200]}" for item in self.examples)
        raise UserError(
            f"{bad} of {total} samples are bad ({bad / max(total, bad):.1%}, data.max_bad allows {max_bad:.1%}): "
            f"{self._by_reason()}\n{examples}\n"
            + (f"All of them are in {self.path}. " if self.path is not None else "")
            + "Repair them, or raise data.max_bad to train without them."
        )

    def summary(self) -> str:
        """One line for the log."""
        if not self._seen:
            return "no bad samples"
        return f"{len(self)} bad sample{'s' if len(self) != 1 else ''} left out ({self._by_reason()})" + (
            f", see {self.path}" if self.path is not None else ""
        )

    def _by_reason(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())


def _read_keys(path: Path) -> set[tuple[str, str]]:
    keys = set()
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                keys.add((record["reason"], record["where"]))
            except (ValueError, KeyError, TypeError):
                continue  # not a line of ours; it stays, and is not counted
    return keys
