"""Exact answers: what counts as the same, and how sure the share is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgpt.data.messages import assistant, user
from mmgpt.evaluate.captioning import Answered, Score, fold, prompt_of


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("Granny  Smith.", "granny smith"), (" a red\nsquare ", "A red square"), ("ＦＵＬＬ", "full"), ("Straße!", "STRASSE")],
)
def test_case_spacing_and_final_punctuation_do_not_count(answer: str, reference: str) -> None:
    assert Answered([], "", reference, answer).exact


@pytest.mark.parametrize(("answer", "reference"), [("red square", "a red square"), ("", "red"), ("3.5", "35")])
def test_other_words_do_count(answer: str, reference: str) -> None:
    assert not Answered([], "", reference, answer).exact


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_folding_twice_changes_nothing_for_ascii(text: str) -> None:
    text = text.encode("ascii", "ignore").decode()
    assert fold(fold(text)) == fold(text) == fold(text.upper()) == fold(f"  {text}  ")


@given(st.integers(1, 2000), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_interval(total: int, share: float) -> None:
    """Its ends are the shares p whose own standard error puts the observed share z away (Wilson 1927)."""
    correct = round(share * total)
    observed = correct / total
    low, high = Score(correct, total).interval()
    assert -1e-9 <= low <= observed + 1e-9 and observed - 1e-9 <= high <= 1 + 1e-9
    for end in (low, high):
        assert (observed - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / total, abs=1e-9)


def test_prompt_is_what_stands_before_the_last_answer() -> None:
    messages = [user("one?"), assistant("1"), user("two?"), assistant("2")]
    assert prompt_of(messages) == (messages[:3], "2")
