"""Losses against loops in float64, closed forms and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.data.ranked import ranked_pairs
from mmgpt.rl.losses import (
    dpo_loss,
    entropy_of,
    log_probs_of,
    policy_loss,
    reward_loss,
    value_loss,
)


def answers(seed: int) -> tuple[np.ndarray, ...]:
    """Four arrays [N, T] and a mask; what stands behind an answer is rubbish."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 5), rng.integers(1, 7)
    mask = np.arange(columns) < rng.integers(1, columns + 1, rows)[:, None]
    arrays = rng.normal(size=(4, rows, columns)) * np.array([0.4, 0.4, 1.0, 1.0])[:, None, None]
    arrays[:, ~mask] = np.array([80.0, -80.0, 1e9, -1e9])[:, None]
    return (*arrays, mask)


def single(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).float() if array.dtype == float else torch.from_numpy(array) for array in arrays]


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.2, 0.5]))
def test_policy_loss_is_equation_7(seed, clip):
    new, old, advantages, _, mask = answers(seed)
    total, clipped = 0.0, 0
    for n, t in zip(*np.nonzero(mask)):
        ratio, advantage = math.exp(new[n, t] - old[n, t]), advantages[n, t]
        free, bound = ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage
        total -= min(free, bound)
        clipped += bound < free
    result = policy_loss(*single(new, old, advantages, mask), clip=clip)
    assert float(result.loss) == pytest.approx(total / mask.sum(), rel=1e-5, abs=1e-6)
    assert float(result.share) == pytest.approx(clipped / mask.sum(), abs=1e-6)
    double = policy_loss(*single(new, old, advantages, mask), clip=clip, count=2 * float(mask.sum()))
    assert float(double.loss) == pytest.approx(total / mask.sum() / 2, rel=1e-5, abs=1e-6)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.2, 0.5]))
def test_value_loss_is_the_larger_of_two_errors(seed, clip):
    new, old, returns, _, mask = answers(seed)
    total, clipped = 0.0, 0
    for n, t in zip(*np.nonzero(mask)):
        bounded = min(max(new[n, t], old[n, t] - clip), old[n, t] + clip)
        free, bound = (new[n, t] - returns[n, t]) ** 2, (bounded - returns[n, t]) ** 2
        total += max(free, bound) / 2
        clipped += bound > free
    result = value_loss(*single(new, old, returns, mask), clip=clip)
    assert float(result.loss) == pytest.approx(total / mask.sum(), rel=1e-4, abs=1e-6)
    assert float(result.share) == pytest.approx(clipped / mask.sum(), abs=1e-6)


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    """- A / n at every real token, and nothing behind the answers, whatever stands there."""
    advantages = torch.tensor([[1.0, -2.0, 1e30], [3.0, float("nan"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_probs = torch.tensor([[-1.0, -2.0, -torch.inf], [-3.0, 0.0, 0.0]], requires_grad=True)
    result = policy_loss(log_probs, log_probs.detach(), advantages, mask)
    result.loss.backward()
    assert torch.allclose(log_probs.grad, torch.tensor([[-1.0, 2.0, 0.0], [-3.0, 0.0, 0.0]]) / 3)
    assert result.share == 0 and result.loss.item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize(("ratio", "advantage", "slope"), [
    (1.3, 1.0, 0.0), (0.7, -1.0, 0.0),  # far enough the right way
    (1.3, -1.0, 1.3), (0.7, 1.0, -0.7),  # too far the wrong way: the whole gradient
    (1.1, 1.0, -1.1),
])  # fmt: skip
def test_the_clip_stops_only_what_gains_from_it(ratio, advantage, slope):
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip=0.2).loss.backward()
    assert float(log_prob.grad) == pytest.approx(slope, abs=1e-6)


def test_log_probs_and_entropy_at_a_temperature():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    expected = (logits / 0.5).log_softmax(-1)
    assert torch.allclose(log_probs_of(logits, torch.tensor([2, 0]), 0.5), expected[[0, 1], [2, 0]])
    assert torch.allclose(entropy_of(logits)[1], torch.tensor(math.log(3)))
    assert torch.allclose(entropy_of(logits, 0.5), -(expected.exp() * expected).sum(-1))
    # A token that cannot be drawn has no part in the entropy.
    assert float(entropy_of(torch.tensor([0.0, 0.0, -torch.inf]))) == pytest.approx(math.log(2))


@given(st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=6), min_size=1, max_size=4), st.integers(0, 10**6))
def test_reward_loss_is_equation_1(rankings, seed):
    scores = [np.random.default_rng((seed, i)).normal(size=len(ranks)) for i, ranks in enumerate(rankings)]
    expected = 0.0
    for ranks, given_scores in zip(rankings, scores):
        answers_ = len(ranks)
        part = sum(
            math.log(1 / (1 + math.exp(-(given_scores[i] - given_scores[j]))))
            for i in range(answers_) for j in range(answers_) if ranks[i] < ranks[j]
        )  # fmt: skip
        expected -= part / math.comb(answers_, 2)
    better, worse, weights, at = [], [], [], 0
    for ranks in rankings:
        pairs = ranked_pairs(ranks)
        better += [at + i for i, _ in pairs]
        worse += [at + j for _, j in pairs]
        weights += [1 / math.comb(len(ranks), 2)] * len(pairs)
        at += len(ranks)
    loss = reward_loss(
        torch.tensor(np.concatenate(scores)).float(),
        torch.tensor(better, dtype=torch.long),
        torch.tensor(worse, dtype=torch.long),
        torch.tensor(weights),
        len(rankings),
    )
    assert float(loss) == pytest.approx(expected / len(rankings), rel=1e-5, abs=1e-6)


def test_a_constant_more_on_every_score_changes_no_reward_loss():
    scores, better, worse = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0, 2]), torch.tensor([1, 1])
    a, b = (reward_loss(scores + shift, better, worse, torch.ones(2), 1) for shift in (0.0, 10.0))
    assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_dpo_begins_at_log_2_and_has_the_paper_gradient():
    """Section 4: d loss / d log pi(chosen) = - beta sigmoid(- h)."""
    chosen = torch.tensor([-5.0, -7.0], requires_grad=True)
    losses, margins = dpo_loss(chosen, torch.tensor([-6.0, -4.0]), chosen.detach(), torch.tensor([-6.0, -4.0]))
    assert torch.allclose(losses, torch.tensor(math.log(2))) and margins.tolist() == [0.0, 0.0]
    losses, margins = dpo_loss(
        chosen, torch.tensor([-6.0, -4.0]), torch.tensor([-6.0, -6.0]), torch.tensor([-5.0, -5.0]), beta=0.5
    )
    assert margins.tolist() == [0.5 * (1 + 1), 0.5 * (-1 - 1)]
    losses.sum().backward()
    assert torch.allclose(chosen.grad, -0.5 * torch.sigmoid(-margins))
    assert torch.allclose(losses, torch.log1p(torch.exp(-margins)))


def test_dpo_survives_answers_of_thousands_of_tokens():
    losses, _ = dpo_loss(torch.tensor([-9e4]), torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([-1.0]))
    assert torch.isfinite(losses).all() and float(losses) == pytest.approx(9e3, rel=1e-3)


def adam_step(parts: list[tuple[float, torch.Tensor]], *, one_buffer: bool) -> torch.Tensor:
    """Where weights of 0 are after Adam's first step(s) on sum c (g . w), all in one step or each in its own."""
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for coefficient, gradient in parts:
        (coefficient * (gradient * weights).sum()).backward()
        if not one_buffer:
            optimizer.step()
            optimizer.zero_grad()
    if one_buffer:
        optimizer.step()
    return weights.detach()


def test_the_ptx_coefficient_counts_in_one_gradient_buffer_only():
    """PPO pulls the first weight up and pretraining pulls it down: the coefficient has to decide who wins."""
    ppo, text = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 0.0])
    small, large = (adam_step([(1.0, ppo), (gamma, text)], one_buffer=True) for gamma in (0.1, 27.8))
    assert small[0] > 0 > large[0]
    # In steps of their own both coefficients end up in the same place.
    small, large = (adam_step([(gamma, text)], one_buffer=False) for gamma in (0.1, 27.8))
    assert torch.allclose(small, large, atol=1e-6)
