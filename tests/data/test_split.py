import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmgpt.data.split import hold_out
from mmgpt.errors import UsageError


@given(st.integers(2, 12), st.integers(0, 60), st.integers(0, 5))
def test_k_folds_hold_everything_out_once(folds: int, more: int, seed: int):
    keys = [f"prompt {number}" for number in range(folds + more)]
    held = []
    for fold in range(folds):
        train, out = hold_out(keys, 1 / folds, seed, fold)
        assert train and out and sorted(train + out) == sorted(keys)
        held += out
    assert sorted(held) == sorted(keys)
    with pytest.raises(UsageError, match=f"data.fold is {folds}: with data.holdout .* there are {folds}, counted from 0"):
        hold_out(keys, 1 / folds, seed, folds)


@given(st.lists(st.integers(), max_size=30), st.floats(0, 0.99), st.integers(0, 5))
@example([0, 1], 5e-324, 0)  # of which 1 / share is no longer a finite number
def test_a_share_is_held_out_and_something_is_left(keys: list[int], share: float, seed: int):
    train, out = hold_out(keys, share, seed)
    assert sorted(train + out) == sorted(set(keys))
    several = len(set(keys)) > 1 and share > 0
    assert len(out) == (min(len(set(keys)) - 1, max(1, round(share * len(set(keys))))) if several else 0)


@given(st.integers(2, 30), st.floats(0.01, 0.99), st.integers(0, 3))
def test_folds_share_nothing_and_none_is_empty(count: int, share: float, seed: int):
    seen: set[int] = set()
    for fold in range(count + 1):
        try:
            train, out = hold_out(range(count), share, seed, fold)
        except UsageError:
            assert fold > 0
            return
        assert out and train and not seen & set(out)
        seen |= set(out)
    raise AssertionError("there is no last fold")
