"""The made-up task: its splits, what it pays, what its rankings hold."""

from __future__ import annotations

from collections import Counter

import pytest

from mmgpt.config import SourceConfig
from mmgpt.data.letters import LETTERS, MOST, LetterReward, draw_letters, letter_prompts, letter_reward, rank_letters
from mmgpt.data.messages import Sample, user
from mmgpt.data.sources import read_source


def test_one_count_of_every_letter_is_held_out_and_every_count_about_as_often():
    train, held, every = (letter_prompts(split) for split in ("train", "val", None))
    assert sorted(train + held) == sorted(every) and len(every) == len(set(every)) == len(LETTERS) * MOST
    assert sorted(letter for letter, _ in held) == sorted(LETTERS)
    counts = Counter(count for _, count in held)
    assert set(counts) == set(range(1, MOST + 1)) and max(counts.values()) - min(counts.values()) <= 1


def test_a_reward_is_the_share_of_right_places_less_what_is_too_much():
    prompt = [user("say c 4")]
    worth = {"cccc": 1.0, "ccc": 0.75, "ccxc": 0.75, "": 0.0, "xxxx": 0.0, "ccccc": 0.75, "c" * 12: -1.0, "c" * 40: -1.0}
    assert {answer: letter_reward(prompt, answer) for answer in worth} == worth


def test_rankings_follow_the_reward_and_hold_what_a_policy_tries():
    found = list(rank_letters("train", 400))
    near, signs = 0, 0
    for item in found:
        worths = [letter_reward(item.prompt, answer) for answer in item.answers]
        assert all(worths[better] > worths[worse] for better, worse in item.pairs) and item.pairs
        assert len(set(item.answers)) == len(item.answers) and all(answer.strip() for answer in item.answers)
        near += sum(0.5 <= worth < 1 for worth in worths)
        signs += sum("\N{REPLACEMENT CHARACTER}" in answer for answer in item.answers)
    # Near misses, and bytes that are no character: what a reward model has not seen, a policy finds.
    assert near > 100 and signs > 40


def test_the_task_of_letters():
    def worth(letter: str, count: int, answer: str) -> float:
        return letter_reward([user(f"say {letter} {count}")], answer)

    assert worth("c", 3, "ccc") == 1
    assert worth("c", 3, "cc") == pytest.approx(2 / 3)
    assert worth("c", 3, "cxc") == pytest.approx(2 / 3)
    assert worth("c", 3, "cccc") == pytest.approx(2 / 3)
    assert worth("c", 3, "") == 0 and worth("c", 1, "x" * 9) == -1
    assert not set(letter_prompts("train")) & set(letter_prompts("val"))
    assert sorted(letter_prompts("train") + letter_prompts("val")) == letter_prompts(None)
    assert {letter for letter, _ in letter_prompts("val")} == {letter for letter, _ in letter_prompts("train")}
    for preference in rank_letters("train", 50):
        values = [letter_reward(preference.prompt, answer) for answer in preference.answers]
        assert len(set(preference.answers)) == 4 and preference.pairs
        assert all(values[better] > values[worse] for better, worse in preference.pairs)
    samples = list(draw_letters("val", 50))
    assert list(read_source(SourceConfig(path="letters", split="val", limit=50))) == samples
    assert all(isinstance(sample, Sample) for sample in samples) and list(draw_letters("val", 50)) == samples
    assert LetterReward()([[user("say a 2")]], ["ab"]).tolist() == [0.5]
