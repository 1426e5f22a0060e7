"""Accuracy, calibration and the length rule on rankings whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmgpt.evaluate.ranking import Ranking, kendall_tau_c, pool, write_ranking


def ranking(margins: list[float], lengths: list[tuple[int, int]] | None = None, prompts: list[int] | None = None) -> Ranking:
    """One prompt a pair unless said otherwise; the preferred answer scores the margin, the other 0."""
    count = len(margins)
    lengths = lengths or [(5, 5)] * count
    owners = np.array(prompts or range(count))
    return Ranking(
        scores=np.array([score for margin in margins for score in (margin, 0.0)]),
        lengths=np.array(lengths).reshape(-1),
        prompts=np.repeat(owners, 2),
        better=np.arange(count) * 2,
        worse=np.arange(count) * 2 + 1,
    )


def test_accuracy_counts_a_draw_as_half():
    assert ranking([1.0, -1.0, 0.0, 2.0]).accuracy == 2.5 / 4


def test_the_length_rule_in_its_better_direction():
    longer = ranking([1.0] * 4, [(9, 1), (9, 1), (9, 1), (1, 9)])
    assert longer.length_accuracy == 0.75
    shorter = ranking([1.0] * 4, [(1, 9), (1, 9), (1, 9), (2, 2)])
    assert shorter.length_accuracy == (3 + 0.5) / 4
    assert ranking([1.0]).length_accuracy == 0.5


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error():
    """Sure by 3/4 on 8 pairs, of which it ranks 6 right."""
    margin = float(np.log(3))
    found = ranking([margin] * 6 + [-margin] * 2)
    assert found.calibration() == [(pytest.approx(0.75), 0.75, 8)]
    assert found.calibration_error == pytest.approx(0, abs=1e-9)
    overconfident = ranking([9.0, -9.0])
    assert overconfident.calibration_error == pytest.approx(0.5, abs=1e-3)


def test_the_interval_widens_when_pairs_belong_together():
    """Ten prompts of ten pairs that are all right or all wrong say less than a hundred prompts."""
    right = [1.0 if i % 2 else -1.0 for i in range(10)]
    together = ranking(list(np.repeat(right, 10)), prompts=list(np.repeat(range(10), 10)))
    apart = ranking(list(np.repeat(right, 10)))
    (low, high), (low_apart, high_apart) = together.interval(), apart.interval()
    assert low < low_apart < 0.5 < high_apart < high
    assert high_apart - low_apart == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_length_correlation_is_within_prompts():
    """Each prompt's longer answer scores more, though the prompt with the longer answers scores less."""
    found = Ranking(
        scores=np.array([11.0, 10.0, 2.0, 1.0]), lengths=np.array([2, 1, 12, 11]), prompts=np.array([0, 0, 1, 1]),
        better=np.array([0, 2]), worse=np.array([1, 3]),
    )  # fmt: skip
    assert found.length_correlation == pytest.approx(1.0)
    assert ranking([1.0, 2.0]).length_correlation == 0.0


def test_the_report(tmp_path: Path):
    write_ranking(tmp_path, {"here": ranking([1.0, 2.0, -1.0, 0.2])}, seconds=3.0)
    assert "| here | 4 | 75.0% |" in (tmp_path / "report.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.png", "ranking.json", "report.md"]
    kept = json.loads((tmp_path / "ranking.json").read_text())["here"]
    assert kept["accuracy"] == 0.75 and [margin for _, margin, _, _ in kept["pairs"]] == [1.0, 2.0, -1.0, 0.2]


def test_pooled_rankings_are_one_with_the_prompts_of_each_apart():
    parts = [ranking([1.0, 2.0, -1.0], prompts=[0, 0, 1]), ranking([0.5, -2.0], prompts=[0, 1])]
    together = pool([part.to_json() for part in parts])
    np.testing.assert_allclose(together.margins, [1.0, 2.0, -1.0, 0.5, -2.0])
    assert together.accuracy == 0.6
    assert together.prompts[together.better].tolist() == [0, 0, 1, 2, 3]
    whole = ranking([1.0, 2.0, -1.0, 0.5, -2.0], prompts=[0, 0, 1, 2, 3])
    assert together.interval() == whole.interval() and together.length_accuracy == whole.length_accuracy
    assert together.calibration_error == pytest.approx(whole.calibration_error)


def test_tau_c_is_what_counting_pairs_gives():
    rng = np.random.default_rng(0)
    for steps in (2, 4, 7):
        ratings = rng.integers(0, steps, 60)
        scores = np.round(ratings + rng.normal(0, 2, 60), 1)
        pairs = [(i, j) for i in range(60) for j in range(i)]
        balance = sum(np.sign(scores[i] - scores[j]) * np.sign(ratings[i] - ratings[j]) for i, j in pairs)
        fewer = min(len(set(scores)), len(set(ratings)))
        assert kendall_tau_c(scores, ratings) == pytest.approx(2 * balance / (60**2 * (fewer - 1) / fewer))


def test_tau_c_of_the_same_of_the_opposite_and_of_no_order():
    ratings = np.repeat(np.arange(4), 500)  # more than one block of rows
    assert kendall_tau_c(ratings * 2.0, ratings) == pytest.approx(1)
    assert kendall_tau_c(-ratings, ratings) == pytest.approx(-1)
    assert kendall_tau_c(np.ones(5), np.arange(5)) == 0


def test_tau_c_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    ratings = rng.integers(1, 5, 200)
    scores = ratings + rng.normal(0, 1, 200)
    assert kendall_tau_c(scores, ratings) == pytest.approx(stats.kendalltau(scores, ratings, variant="c").statistic)
