"""Platt scaling and operating points: against closed forms and counting."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safety.calibrate import POINTS, Bounds, OperatingPoint, above, bent, clear_below, logistic, operating_points, platt, sigmoid
from safety.evaluate import ece

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


@pytest.mark.parametrize("truth", [(0.5, 0.06, -0.3), (0.2, 0.1, 0.4)])
def test_bent_recovers_the_curve_that_made_the_labels(truth: tuple[float, float, float]) -> None:
    a, c, b = truth
    z = np.random.default_rng(0).uniform(-4, 4, 60_000)
    label = np.random.default_rng(1).random(len(z)) < sigmoid(a * z + c * z**3 + b)
    found = bent(z, label)
    assert found == pytest.approx(truth, abs=0.06) and found[1] == pytest.approx(c, abs=0.012)


@pytest.mark.parametrize("truth", [lambda z: 2 * np.tanh(z), lambda z: 0.05 * z**3 - 0.3 * z])
def test_bent_is_the_line_where_it_would_not_rise_everywhere(truth: Callable[[np.ndarray], np.ndarray]) -> None:
    z = np.random.default_rng(0).uniform(-4, 4, 20_000)
    label = np.random.default_rng(1).random(len(z)) < sigmoid(truth(z))
    a, c, b = bent(z, label)
    assert c == 0 and (a, b) == platt(z, label)


def test_bent_is_finite_where_the_classes_do_not_overlap() -> None:
    z, label = np.array([-4.1] * 60 + [4.1] * 60), np.array([0] * 60 + [1] * 60)
    a, c, b = bent(z, label)
    assert sigmoid(a * z + c * z**3 + b) == pytest.approx(np.where(label, 61 / 62, 1 / 62), abs=1e-3)  # Platt's targets


def test_what_smoothed_labels_press_together_is_calibrated_by_the_bend_and_not_by_a_line() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 3, 40_000)
    label = rng.random(len(true)) < sigmoid(true)
    pressed = 0.02 + 0.96 * sigmoid(true)  # what a model learns of labels that are .98 and .02
    z = np.log(pressed / (1 - pressed))
    a, c, b = bent(z, label)
    slope, bias = platt(z, label)
    assert ece(label, sigmoid(a * z + c * z**3 + b)) < 0.5 * ece(label, sigmoid(slope * z + bias)) and a > 0 and c > 0


def test_logistic_regression_recovers_the_weights_that_made_the_labels() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0, 2, 40_000), rng.normal(0, 3, 40_000)
    label = rng.random(len(first)) < sigmoid(0.4 * first + 0.8 * second - 0.5)
    assert logistic(np.stack([first, second], axis=1), label) == pytest.approx((0.4, 0.8, -0.5), abs=0.06)


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


def test_thresholds_by_hand() -> None:
    everyday = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    alike, bad = np.array([0.15, 0.65, 0.85, 0.45]), np.array([0.05, 0.72, 0.81, 0.99])
    bounds = {"strict": Bounds(0.3, 0.5), "balanced": Bounds(0.1, 0.5), "loose": Bounds(0.2, 0.25)}
    found = operating_points(bad, everyday, alike, bounds)
    # Just above the first score that is one too many, rounded up to six digits. Of `loose` the bounds are laxer than of
    # `balanced`, whose threshold therefore holds.
    assert {name: point.threshold for name, point in found.items()} == {
        "strict": 0.700001,
        "balanced": 0.900001,
        "loose": 0.900001,
    }
    assert found["strict"] == OperatingPoint(0.700001, 0.3, 0.25, 0.75)
    assert found["balanced"] == found["loose"] == OperatingPoint(0.900001, 0.1, 0.0, 0.25)
    # The stricter of the two bounds decides; a threshold that is rounded is met by an equal score.
    one = {name: Bounds(1.0, 0.25) for name in POINTS}
    assert operating_points(np.array([0.650001]), everyday, alike, one)["strict"] == OperatingPoint(0.650001, 0.4, 0.25, 1.0)
    none = np.array([])
    assert operating_points(none, none, none, one)["loose"] == OperatingPoint(0.0, 0.0, 0.0, 0.0)


def test_an_operating_point_is_stored_with_six_digits() -> None:
    point = OperatingPoint(0.12345678, 0.5, 1 / 3, 2 / 3)
    assert point.to_json() == {"threshold": 0.123457, "fpr": 0.5, "lookalike_fpr": 0.333333, "recall": 0.666667}


def test_above_by_hand() -> None:
    scores = [0.2, 0.4, 0.6, 0.8]
    assert above(scores, 0.0) == np.nextafter(0.8, 1) and above(scores, 0.25) == np.nextafter(0.6, 1)
    assert above(scores, 0.24) == above(scores, 0.0) and above(scores, 0.99) == np.nextafter(0.2, 1)
    assert above(scores, 1.0) == above([], 0.5) == 0.0
    # A share that binary fractions miss by a hair: .07 of 100 is 7.
    assert above(np.arange(100) / 100, 0.07) == np.nextafter(0.92, 1)
    assert above(np.array([0.5], np.float32), 0.0) == np.nextafter(0.5, 1)


def test_clear_below_by_hand() -> None:
    first, second = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.01]), np.array([0.9, 0.9, 0.5, 0.9, 0.9, 0.49])
    assert clear_below(first, second, 0.5, 0.0) == 0.05
    # A third of six may be lost: the third lowest that stage 2 catches is the bound, and of those at .5 one is caught.
    assert clear_below(first, second, 0.5, 1 / 3) == 0.2
    assert clear_below(first, second, 0.5, 0.49) == 0.2 and clear_below(first, second, 0.5, 0.5) == 0.3
    assert clear_below(first, second, 0.25, 0.5) == 0.2
    # Where all may be lost, or nothing is caught, the threshold is the bound.
    assert clear_below(first, second, 0.5, 1.0) == 0.5 and clear_below(first, second, 0.95, 0.0) == 0.95
    assert clear_below(first[:5], second[:5], 0.5, 1.0) == 0.5
