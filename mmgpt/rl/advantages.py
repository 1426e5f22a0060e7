"""Rewards of tokens, and how much better than expected each token was.

Letters in shapes: N answers, T tokens of the longest of them. `mask` [N, T] is True on the tokens that the policy chose, the end
token included; answers begin in column 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to a variance before its root is taken: with equal values, as with one token, nothing is known, and the result is 0."""


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Reward of every token: the penalty everywhere, and the score at the last token that the policy chose.

    InstructGPT (Ouyang et al. 2022), equation 2: the score of the whole answer is earned by the action that ended it (not by
    a position behind it, whose value nobody predicted), and a per-token KL penalty by every action.

    Args:
        scores: [N], one for each answer.
        penalties: [N, T], for example `-beta * kl.estimate(...)`; what stands outside of `mask` is ignored.
        mask: [N, T] bool.

    Returns:
        [N, T], 0 outside of `mask`.

    Raises:
        ValueError: an answer without a token, or a mask that does not begin in column 0.
    """
    last = _lengths(mask) - 1
    rewards = penalties.masked_fill(~mask, 0.0)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}. The episode ends with the last token of the mask: the
    value behind it is 0.

    Args:
        rewards: [N, T], reward of the token chosen at t.
        values: [N, T], predicted return before the token at t was chosen.
        mask: [N, T] bool.
        gamma: Discount; 1 in InstructGPT, appendix C.4.
        lam: Weighs long against short views; 0.95 there.

    Returns:
        Advantages [N, T] and returns [N, T] (advantage + value, what the value function is to predict), 0 outside of `mask`.

    Raises:
        ValueError: an answer without a token, or a mask that does not begin in column 0.
    """
    _lengths(mask)
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following = value_behind = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        # Behind the end rewards, values and so advantages are 0, which is just what the last real token has to see.
        delta = rewards[:, t] + gamma * value_behind - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        value_behind = values[:, t]
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, *, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Zero mean and unit variance over the real tokens of all processes.

    The variance divides by the number of tokens, as in the published code of Ziegler et al. 2019. The mean is not added back: an
    answer below the average has a negative advantage, however good all of them are.

    Args:
        values: [N, T].
        mask: [N, T] bool; the same number of rows on every process is not needed.
        total: Sums a tensor over all processes (`sum_over_ranks`); None where there is one.

    Returns:
        [N, T], 0 outside of `mask`; 0 everywhere where all values are equal.
    """
    total = total or (lambda part: part)
    # In single precision the mean of equal values is not quite their value, and the root of epsilon would blow the rest up.
    exact = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    count, summed = total(torch.stack((mask.sum().to(exact.dtype), exact.masked_fill(~mask, 0.0).sum())))
    centred = (exact - summed / count).masked_fill(~mask, 0.0)
    variance = total(centred.square().sum()) / count
    return (centred * torch.rsqrt(variance + EPSILON)).to(values.dtype)


def masked_mean(values: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean over the real tokens.

    Args:
        values: [N, T].
        mask: [N, T] bool.
        count: Divide by this instead, where several calls make one mean (accumulated minibatches, several processes).

    Returns:
        Scalar; 0 where there is no real token.
    """
    divisor = mask.sum().clamp(min=1) if count is None else count
    return values.masked_fill(~mask, 0.0).sum() / divisor


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the real tokens: 1 is a perfect value function, 0 knows only the mean.

    Args:
        values: [N, T].
        returns: [N, T].
        mask: [N, T] bool.

    Returns:
        Scalar; 0 where all returns are equal, and there is nothing to explain.
    """
    truth, error = returns[mask].var(unbiased=False), (returns - values)[mask].var(unbiased=False)
    return torch.where(truth > 0, 1 - error / truth, torch.zeros_like(truth))


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return part
    summed = part.clone()
    distributed.all_reduce(summed)
    return summed


def _lengths(mask: Tensor) -> Tensor:
    """Real tokens of every answer [N]. Raises ValueError for a mask that is not a run of True from column 0."""
    lengths = mask.sum(1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if bool((lengths == 0).any()) or not torch.equal(mask, columns < lengths[:, None]):
        raise ValueError("a mask is True on the tokens of an answer, which begin in column 0 and are at least one")
    return lengths
