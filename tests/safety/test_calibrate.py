"""Platt scaling and operating points: against closed forms and counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safety.calibrate import POINTS, Bounds, above, clear_below, operating_points, platt, sigmoid

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=50)


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.4, -1.5), (2.5, 0.7)])
def test_platt_recovers_the_line_that_made_the_labels(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, 40_000)
    label = rng.random(len(z)) < sigmoid(a * z + b)
    assert platt(z, label) == pytest.approx((a, b), abs=0.06)


def test_platt_of_a_constant_logit_is_the_share_of_sensitive() -> None:
    label = np.array([1] * 30 + [0] * 70)
    a, b = platt(np.full(100, 2.0), label)
    expected = (30 * 31 / 32 + 70 * 1 / 72) / 100  # Platt's targets
    assert sigmoid(np.array([2 * a + b]))[0] == pytest.approx(expected, abs=1e-6)


def test_platt_is_finite_where_the_classes_do_not_overlap() -> None:
    a, b = platt(np.array([-3.0, -2.0, 2.0, 3.0]), np.array([0, 0, 1, 1]))
    assert 0 < a < 5 and abs(b) < 1e-6


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [([1.0, np.nan], [0, 1], "finite"), ([1.0, 2.0], [1, 1], "label 0"), ([1.0, 2.0], [0, 0], "label 1")],
)
def test_platt_refuses(logits: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        platt(np.array(logits), np.array(labels))


@given(SCORES, st.floats(0, 1))
def test_above_is_the_lowest_threshold_within_the_share(scores: list[float], share: float) -> None:
    values = np.array(scores)
    threshold = above(values, share)
    allowed = int(share * len(values) + 1e-9)
    assert (values >= threshold).sum() <= allowed
    lower = values[values < threshold]
    if len(lower):
        assert (values >= lower.max()).sum() > allowed


@given(SCORES, SCORES, SCORES)
@settings(max_examples=60)
def test_operating_points_keep_their_bounds_and_their_order(bad: list[float], good: list[float], alike: list[float]) -> None:
    bounds = {"strict": Bounds(0.1, 0.3), "balanced": Bounds(0.05, 0.2), "loose": Bounds(0.0, 0.1)}
    found = operating_points(*map(np.array, (bad, good, alike)), bounds)
    assert list(found) == list(POINTS)
    for name, point in found.items():
        assert point.fpr == (np.array(good) >= point.threshold).mean() <= bounds[name].everyday
        assert point.lookalike_fpr == (np.array(alike) >= point.threshold).mean() <= bounds[name].lookalikes
        assert point.recall == (np.array(bad) >= point.threshold).mean()
    assert found["strict"].threshold <= found["balanced"].threshold <= found["loose"].threshold


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60), st.floats(0, 0.3))
def test_stage_1_clears_no_more_than_it_may_lose(pairs: list[tuple[float, float]], loss: float) -> None:
    first, second = np.array(pairs).T
    bound = clear_below(first, second, 0.5, loss)
    assert bound <= 0.5
    assert ((first < bound) & (second >= 0.5)).sum() <= loss * len(first) + 1e-6
