"""How far two people agree on which answers are better: pairs ranked alike, and the same beyond chance."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgpt.data.labels import TIES
from mmgpt.data.messages import Rejected
from mmgpt.data.readers import json_records
from mmgpt.errors import UsageError, UserError

Pair = tuple[str, str, str]
"""Id of a prompt, and two answers to it, the smaller text first."""


@dataclass(frozen=True)
class Agreement:
    """The pairs of answers that two people judged, counted.

    Args:
        prompts: Prompts with such a pair.
        alike: Both prefer the same answer.
        opposite: They prefer different ones.
        both_tied: Neither prefers any.
        first_tied: Only the first person does not.
        second_tied: Only the second person does not.
    """

    prompts: int
    alike: int
    opposite: int
    both_tied: int
    first_tied: int
    second_tied: int

    @property
    def pairs(self) -> int:
        return self.alike + self.opposite + self.both_tied + self.first_tied + self.second_tied

    @property
    def share(self) -> float:
        """Share of the pairs that both judged the same, a tie being a judgement like another."""
        return (self.alike + self.both_tied) / self.pairs

    @property
    def decided(self) -> float:
        """Share of those ranked alike among the pairs that neither tied; NaN where there is none."""
        return _ratio(self.alike, self.alike + self.opposite)

    @property
    def kappa(self) -> float:
        """Cohen's kappa (1960), (p - e) / (1 - e): `share` p beyond what chance e would give.

        Which answer of a pair comes first means nothing, so each pair counts in both orders. With t and u the shares that the two
        tied, e = t u + (1 - t) (1 - u) / 2. NaN where chance leaves nothing to agree on: both tied everything.
        """
        tied = [(self.both_tied + alone) / self.pairs for alone in (self.first_tied, self.second_tied)]
        chance = tied[0] * tied[1] + (1 - tied[0]) * (1 - tied[1]) / 2
        return _ratio(self.share - chance, 1 - chance)

    @property
    def tau(self) -> float:
        """Kendall's tau-b (1945) over the pairs of all prompts: (alike - opposite) / sqrt of the pairs that each did not tie.

        NaN where one person tied everything.
        """
        untied = [self.pairs - self.both_tied - alone for alone in (self.first_tied, self.second_tied)]
        return _ratio(self.alike - self.opposite, math.sqrt(untied[0] * untied[1]))

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.prompts} prompts and {self.pairs} pairs of answers were judged by both",
                f"ranked alike: {self.share:.1%} ({self.alike} with the same preference, {self.both_tied} tied by both)",
                f"ranked otherwise: {self.opposite} the other way round, {self.first_tied} tied by the first alone, "
                f"{self.second_tied} by the second alone",
                f"ranked alike where neither tied: {_shown(self.decided, '.1%')}",
                f"Cohen's kappa {_shown(self.kappa, '.3f')}, Kendall's tau-b {_shown(self.tau, '.3f')}",
            ]
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _shown(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else format(value, form)


def compare(first: dict[Pair, int], second: dict[Pair, int]) -> Agreement:
    """Count the pairs that are in both.

    Args:
        first, second: 1 where the first answer of a pair is better, -1 where the second is, 0 for a tie.
    """
    shared = first.keys() & second.keys()
    both = [(first[pair], second[pair]) for pair in shared]
    return Agreement(
        prompts=len({prompt for prompt, _, _ in shared}),
        alike=sum(a == b != 0 for a, b in both),
        opposite=sum(a == -b != 0 for a, b in both),
        both_tied=sum(a == b == 0 for a, b in both),
        first_tied=sum(a == 0 != b for a, b in both),
        second_tied=sum(b == 0 != a for a, b in both),
    )


def read_judgements(path: Path) -> dict[Pair, int]:
    """The pairs that one person judged, as `compare` takes them: of a file of `mmgpt.label` and of its ties.

    Where a pair was judged twice, the later judgement counts.

    Raises:
        UsageError: there is no such file.
        UserError: a line that is no judgement, or of a second person.
    """
    ties = path.with_name(path.stem + TIES)
    files = [file for file in (path, ties) if file.is_file()]
    if not files:
        raise UsageError(f"no such file: {path}")
    judged: dict[Pair, int] = {}
    person = None
    for file in files:
        for where, record in json_records(file):
            name = _checked(record, where)
            if person not in (None, name):
                raise UserError(f"{where}: judged by {name}, lines before it by {person}; give each person a file")
            person = name
            for (one, rank), (other, its) in itertools.combinations(zip(record["answers"], record["ranks"]), 2):
                order = (its > rank) - (its < rank)
                judged[(record["id"], *sorted((one, other)))] = order if one < other else -order  # type: ignore[index]
    return judged


def _checked(record: Any, where: str) -> str:
    """Who made a judgement."""
    if isinstance(record, Rejected):
        raise UserError(f"{where}: {record.detail}")
    fields = {"id": str, "labeller": str, "answers": list, "ranks": list}
    for name, kind in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise UserError(f"{where}: not a line of mmgpt.label: {name} is missing, or is no {kind.__name__}")
    answers, ranks = record["answers"], record["ranks"]
    if (
        len(answers) != len(ranks)
        or not all(isinstance(answer, str) for answer in answers)
        or not all(type(r) is int for r in ranks)
    ):
        raise UserError(f"{where}: not a line of mmgpt.label: answers must be texts, with one whole number each in ranks")
    return str(record["labeller"])
