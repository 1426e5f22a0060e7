"""Agreement of two people against contingency tables and rank correlations worked out the long way."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.errors import UsageError, UserError
from mmgpt.evaluate.agreement import Agreement, compare, read_judgements
from mmgpt.label import main

RANKS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=7)


def judgement(person: str, ranks: list[int], prompt: str = "p", **more: Any) -> str:
    record = {"id": prompt, "labeller": person, "answers": [f"answer {n}" for n in range(len(ranks))], "ranks": ranks, **more}
    return json.dumps(record) + "\n"


def counted(folder: Path, first: list[int], second: list[int]) -> Agreement:
    for name, ranks in (("a", first), ("b", second)):
        (folder / f"{name}.jsonl").write_text(judgement(name, ranks))
    return compare(*(read_judgements(folder / f"{name}.jsonl") for name in "ab"))


@given(RANKS)
def test_kappa_is_that_of_the_table_with_every_pair_in_both_orders(tmp_path_factory: pytest.TempPathFactory, ranks: Any):
    found = counted(tmp_path_factory.mktemp("labels"), *map(list, zip(*ranks)))
    table = dict.fromkeys(itertools.product("<=>", repeat=2), 0)
    for (a, b), (c, d) in itertools.permutations(ranks, 2):
        table[tuple("=" if x == y else "<" if x < y else ">" for x, y in ((a, c), (b, d)))] += 1  # type: ignore[index]
    total = sum(table.values())
    same = sum(table[sign, sign] for sign in "<=>") / total
    rows = {sign: sum(table[sign, other] for other in "<=>") / total for sign in "<=>"}
    columns = {sign: sum(table[other, sign] for other in "<=>") / total for sign in "<=>"}
    chance = sum(rows[sign] * columns[sign] for sign in "<=>")
    assert found.prompts == 1 and found.pairs == math.comb(len(ranks), 2) and found.share == pytest.approx(same)
    assert math.isnan(found.kappa) if chance == 1 else found.kappa == pytest.approx((same - chance) / (1 - chance))


@given(RANKS)
def test_tau_is_the_correlation_of_the_signs(tmp_path_factory: pytest.TempPathFactory, ranks: Any):
    """Kendall's general coefficient: the sum of products of signs over the root of the sums of squares."""
    found = counted(tmp_path_factory.mktemp("labels"), *map(list, zip(*ranks)))
    signs = [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in itertools.combinations(ranks, 2)]
    spread = math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
    assert math.isnan(found.tau) if spread == 0 else found.tau == pytest.approx(sum(x * y for x, y in signs) / spread)


def test_a_worked_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """1 > 2 = 3 against 1 > 2 > 3: two alike, one tied by the first alone; and a prompt that both tied, in their other files."""
    for name, ranks in (("a", [1, 2, 2]), ("b", [1, 2, 3])):
        (tmp_path / f"{name}.jsonl").write_text(judgement(name, ranks) + judgement(name, [1, 2], f"only {name}"))
        (tmp_path / f"{name}.ties.jsonl").write_text(judgement(name, [1, 1], "tied"))
    assert main(["--agreement", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    # 4 pairs: p = 3/4, t = 2/4, u = 1/4, e = 1/8 + 3/16 = 5/16, kappa = (12 - 5)/(16 - 5); tau = 2 / sqrt(2 * 3).
    told = capsys.readouterr().out
    assert "2 prompts and 4 pairs" in told and "alike: 75.0% (2 with the same preference, 1 tied by both)" in told
    assert "0 the other way round, 1 tied by the first alone, 0 by the second" in told
    assert f"kappa {7 / 11:.3f}" in told and f"tau-b {2 / math.sqrt(6):.3f}" in told


def test_what_cannot_be_compared_is_told(tmp_path: Path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text(judgement("a", [1, 2]))
    other.write_text(judgement("b", [1, 2], "another prompt"))
    with pytest.raises(UserError, match="share no pair"):
        main(["--agreement", str(one), str(other)])
    with pytest.raises(UsageError, match="no such file"):
        read_judgements(tmp_path / "c.jsonl")
    for line, words in (
        (judgement("b", [1, 2]), r"a\.jsonl:2: judged by b, lines before it by a"),
        ("{\n", r"a\.jsonl:2"),
        ('{"prompt": "x"}\n', "id is missing"),
        (judgement("a", [1, 2], answers=["x"]), "one whole number each"),
    ):
        one.write_text(judgement("a", [1, 2]) + line)
        with pytest.raises(UserError, match=words):
            read_judgements(one)
