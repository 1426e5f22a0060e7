"""Wilson's interval against its closed forms and its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety.intervals import Z95, wilson


def test_closed_forms() -> None:
    square = Z95 * Z95
    # Nothing of n: from 0 to z^2 / (n + z^2); half of n: symmetric; and the textbook's 81 of 263.
    assert wilson(0, 10) == (0.0, pytest.approx(square / (10 + square)))
    assert wilson(10, 10) == (pytest.approx(10 / (10 + square)), 1.0)
    assert sum(wilson(7, 14)) == pytest.approx(1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_the_ends_are_as_far_off_as_z_standard_errors(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    for end in wilson(hits, count):
        # The definition: |p - end| = z sqrt(end (1 - end) / n).
        assert abs(hits / count - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), abs=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(-1, 3), (4, 3)])
def test_no_share(hits: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(hits, count)
