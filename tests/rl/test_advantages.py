"""Rewards, advantages and whitening against loops in float64 and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.rl.advantages import explained_variance, gae, masked_mean, sum_over_ranks, token_rewards, whiten


def draw(seed: int, most: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, values, lengths and mask of up to five answers, rubbish behind their ends."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 6), rng.integers(1, most)
    lengths = rng.integers(1, columns + 1, rows)
    mask = np.arange(columns) < lengths[:, None]
    rewards, values = rng.normal(size=(2, rows, columns))
    rewards[~mask], values[~mask] = 1e6, -1e6
    return rewards, values, lengths, mask


def slow_gae(rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Equation 16 as it stands: a sum over all that follows, for every token of every answer."""
    advantages = np.zeros_like(rewards)
    for n, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                behind = values[n, later + 1] if later + 1 < length else 0.0
                delta = rewards[n, later] + gamma * behind - values[n, later]
                advantages[n, t] += (gamma * lam) ** (later - t) * delta
    return advantages


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).float() if array.dtype == float else torch.from_numpy(array) for array in arrays]


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_equation_16(seed, gamma, lam):
    rewards, values, lengths, mask = draw(seed)
    advantages, returns = gae(*tensors(rewards, values, mask), gamma=gamma, lam=lam)
    expected = slow_gae(rewards, values, lengths, gamma, lam)
    assert np.allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(returns, expected + np.where(mask, values, 0), rtol=1e-5, atol=1e-5)


def test_gae_at_its_ends():
    """lambda 1: the rewards that are left, minus the value; lambda 0: the error of one step."""
    rewards, values = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[0.5, 0.25, 3.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    long, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert long.tolist() == [[6.5, 5.75, 1.0, 0.0]]
    assert returns.tolist() == [[7.0, 6.0, 4.0, 0.0]]
    short, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    assert short.tolist() == [[1.0 + 0.25 - 0.5, 2.0 + 3.0 - 0.25, 4.0 - 3.0, 0.0]]


@given(st.integers(0, 10**6))
def test_padding_changes_nothing(seed):
    rewards, values, _, mask = draw(seed)
    filled = ((rewards, 7.0), (values, 5.0), (mask, False))
    wide = [np.pad(array, ((0, 0), (0, 3)), constant_values=fill) for array, fill in filled]
    for narrow, padded in zip(gae(*tensors(rewards, values, mask)), gae(*tensors(*wide))):
        assert torch.equal(padded, torch.nn.functional.pad(narrow, (0, 3)))


def test_the_score_is_earned_by_the_last_token_chosen():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([5.0, 7.0, -1.0]), torch.full((3, 3), -0.5), mask)
    assert rewards.tolist() == [[-0.5, 4.5, 0.0], [6.5, 0.0, 0.0], [-0.5, -0.5, -1.5]]


@pytest.mark.parametrize("mask", [[[True, False, True]], [[False, True, True]], [[False, False, False]]])
def test_a_mask_with_holes_is_refused(mask):
    numbers = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="column 0"):
        gae(numbers, numbers, torch.tensor(mask))
    with pytest.raises(ValueError, match="column 0"):
        token_rewards(torch.zeros(1), numbers, torch.tensor(mask))


@given(st.integers(0, 10**6))
def test_whitened_tokens_have_mean_0_and_variance_1(seed):
    rewards, _, _, mask = draw(seed)
    real = rewards[mask]
    whitened = whiten(*tensors(rewards, mask)).numpy()
    assert (whitened[~mask] == 0).all()
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    assert np.allclose(whitened[mask], expected, atol=1e-4)
    assert abs(whitened[mask].mean()) < 1e-5


def test_rewards_that_are_all_positive_are_not_all_good():
    """5, 6, 7, 8: the mean must not come back (-3, -1, 1, 3 over the root of 5)."""
    whitened = whiten(torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.ones(2, 2, dtype=torch.bool))
    assert torch.allclose(whitened, torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / 5**0.5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_equal_values_give_no_advantage(value):
    whitened = whiten(torch.full((3, 4), value), torch.ones(3, 4, dtype=torch.bool))
    assert whitened.abs().max() < 1e-6
    assert whiten(torch.tensor([[value]]), torch.tensor([[True]])).item() == 0


def whiten_on_rank(rank: int, folder: str) -> None:
    """One of two processes: takes its row, writes what it got."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    values, mask = torch.load(f"{folder}/whole.pt")
    own = whiten(values[rank : rank + 1], mask[rank : rank + 1], total=sum_over_ranks)
    torch.save(own, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_whiten_as_one(tmp_path: Path):
    values = torch.tensor([[1.0, 2.0, 5.0, 99.0], [10.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    torch.save((values, mask), tmp_path / "whole.pt")
    torch.multiprocessing.spawn(whiten_on_rank, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    parts = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    assert torch.allclose(parts, whiten(values, mask), atol=1e-6)
    assert parts[1, 0] > 0 > parts[0, 0]


def test_masked_mean_ignores_padding_and_takes_a_divisor():
    values, mask = torch.tensor([[1.0, 2.0, float("nan")], [6.0, float("inf"), 0.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_mean(values, mask) == 3
    assert masked_mean(values, mask, 18) == 0.5
    assert masked_mean(values, torch.zeros_like(mask)) == 0


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns + 5, returns, mask) == 1
    assert explained_variance(torch.zeros(1, 4), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0
