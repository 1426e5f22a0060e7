"""Reward functions by name, their weighted sum, what cannot be judged, and the weight fitted on ranked answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import noise, tiny_model

from mmgpt.data.letters import LetterReward, rank_letters
from mmgpt.data.messages import user
from mmgpt.data.ranked import Preference
from mmgpt.errors import UsageError, UserError
from mmgpt.model.heads import RewardModel
from mmgpt.rl.rewards import LearnedReward, RewardTerm, WeightedReward, fit_weight, judge, load_reward

PROMPTS = [[user("say a 2")], [user("say b 1")], [user("say c 3")]]
ANSWERS = ["aa", "bb", "c"]


def length(prompts: Any, answers: Any, images: Any, scale: float = 1.0) -> list[float]:
    """A reward of this module, to be found by its path."""
    return [scale * len(answer) for answer in answers]


def picky(prompts: Any, answers: Any, images: Any) -> Any:
    """Fails on a batch with "bb" in it, and has no number for "c"."""
    if "bb" in answers:
        raise RuntimeError("cannot read bb")
    return torch.tensor([float("inf") if answer == "c" else 1.0 for answer in answers])


def term(name: str, **more: Any) -> RewardTerm:
    return RewardTerm.parse({"class_path": name, **more})


def test_the_sum_is_weighted():
    terms = [
        term("mmgpt.data.letters.LetterReward", weight=2.0),
        term(f"{__name__}.length", init_args={"scale": 10.0}, weight=0.5),
    ]
    scores = WeightedReward.from_terms(terms)(PROMPTS, ANSWERS)
    assert scores.values.tolist() == pytest.approx([2 * 1 + 10, 2 * 0 + 10, 2 / 3 + 5])
    assert scores.terms["LetterReward"].tolist() == pytest.approx([1, 0, 1 / 3])
    assert scores.terms["length"].tolist() == [20, 20, 10]
    assert scores.judged.all() and not scores.problem


def test_a_failure_costs_its_own_answer_alone():
    values, said = judge(picky, PROMPTS, ANSWERS)
    assert values[0] == 1 and math.isnan(values[1]) and math.isnan(values[2])
    assert said == "RuntimeError: cannot read bb"
    scores = WeightedReward([("picky", 1.0, picky), ("letters", 1.0, LetterReward())])(PROMPTS, ANSWERS)
    assert scores.judged.tolist() == [True, False, False]
    assert scores.problem == "picky: RuntimeError: cannot read bb"


def test_a_reward_of_the_wrong_length_is_no_reward():
    values, said = judge(lambda prompts, answers, images: [1.0, 2.0], PROMPTS, ANSWERS)
    assert values.isnan().all() and "2 numbers for 1 answers" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"class_path": "no.such.module.Name"}, "cannot import no.such.module.Name"),
        ({"class_path": "mmgpt.data.letters.Nothing"}, "cannot import mmgpt.data.letters.Nothing"),
        ({"class_path": "mmgpt.data.letters.LETTERS"}, "is no function or class"),
        ({"class_path": "Name"}, "is no function or class"),
        ({"class_path": "mmgpt.rl.rewards.LearnedReward", "init_args": {"folder": "x"}}, "does not take init_args"),
        ({"class_path": "mmgpt.data.messages.Sample", "init_args": {"messages": [], "where": ""}}, "cannot be called"),
    ],
)
def test_what_cannot_be_loaded_says_so(settings: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        load_reward(RewardTerm.parse(settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("mmgpt.data.letters.LetterReward", "needs a class_path"),
        ({"class_path": "a.b", "scale": 2}, "unknown key scale"),
        ({"class_path": "a.b", "weight": "much"}, "must be a number or fit"),
        ({"class_path": "a.b", "weight": float("nan")}, "must be a number or fit"),
        ({"class_path": "a.b", "init_args": [1]}, "init_args of a.b must be a mapping"),
    ],
)
def test_a_term_that_breaks_the_form_says_so(settings: Any, said: str):
    with pytest.raises(UsageError, match=said):
        RewardTerm.parse(settings)


def test_no_reward_and_nothing_to_fit_on_are_refused():
    with pytest.raises(UsageError, match="names no reward"):
        WeightedReward.from_terms([])
    fit = [term("mmgpt.data.letters.LetterReward"), term(f"{__name__}.length", weight="fit")]
    with pytest.raises(UsageError, match=r"name them under ppo\.ranked"):
        WeightedReward.from_terms(fit)
    with pytest.raises(UsageError, match="one weight of several"):
        WeightedReward.from_terms(fit[1:], list(rank_letters("train", 4)))
    ranked = [Preference([user("hello")], ["a", "b"], [(0, 1)], 1, "x")]
    with pytest.raises(UserError, match="all reward functions can judge"):
        WeightedReward.from_terms(fit, ranked)


def test_a_fitted_weight_ranks_what_the_other_term_gets_wrong():
    # Longer is better in this ranking, against the letters.
    ranked = [Preference([user("say a 2")], ["aa", "aaaaaa"], [(1, 0)], 1, "x")]
    reward = WeightedReward.from_terms(
        [term("mmgpt.data.letters.LetterReward"), term(f"{__name__}.length", weight="fit")], ranked
    )
    values = reward([[user("say a 2")]] * 2, ["aa", "aaaaaa"]).values
    assert float(values[1] - values[0]) == pytest.approx(1.0)  # just the margin that the hinge asks for


MARGINS = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=12)


@given(MARGINS)
@settings(max_examples=60, deadline=None)
def test_the_fitted_weight_has_the_least_hinge_loss(pairs: list[tuple[float, float]]):
    fixed, free = (np.array(side) for side in zip(*pairs))

    def loss(weight: float) -> float:
        return float(np.maximum(0, 1 - (fixed + weight * free)).mean())

    weight = fit_weight(fixed, free)
    assert weight >= 0
    assert loss(weight) <= min(loss(other) for other in np.linspace(0, 50, 2001)) + 1e-9


def test_a_reward_that_says_nothing_weighs_nothing():
    assert fit_weight(np.array([0.2, -1.0]), np.zeros(2)) == 0.0


def test_a_learned_reward_in_bf16_is_near_the_one_in_fp32(tmp_path):
    """With pictures; its rotary frequencies and its head stay in single precision."""
    RewardModel(tiny_model()).save_pretrained(tmp_path / "reward")
    prompts = [[user("what is it?", [noise(seed)])] for seed in range(4)]
    answers = ["a", "something longer than that", "b c d", "e"]
    exact = LearnedReward(tmp_path / "reward")
    rounded = LearnedReward(tmp_path / "reward").to(torch.device("cpu"), bf16=True)
    wanted, found = exact(prompts, answers), rounded(prompts, answers)
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert (found - wanted).abs().max() < 0.2 * wanted.std()
    assert rounded.model.head.weight.dtype == torch.float32
    assert {buffer.dtype for buffer in rounded.model.language.buffers() if buffer.is_floating_point()} == {torch.float32}
