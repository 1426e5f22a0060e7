"""The losses of InstructGPT's three steps, and of DPO.

Letters in shapes: N answers, T tokens of the longest of them, V vocabulary, P pairs. `mask` [N, T] is True on the tokens that the
policy chose.

PPO-ptx (Ouyang et al. 2022, equation 2) is `policy + value_coefficient * value + gamma_ptx * language model loss`, and its terms
must share ONE gradient buffer before ONE optimizer step. Adam divides by the size of the gradient it is given: in a step of its
own the language model loss would move the weights as far with gamma_ptx = 27.8 as with 0.01 (`tests/rl/test_losses.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgpt.rl.advantages import masked_mean


def log_probs_of(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of the tokens that were drawn, under the distribution that they were drawn from.

    Args:
        logits: [..., V].
        ids: [...] long.
        temperature: Divides the logits, as it did when the tokens were drawn.

    Returns:
        [...] in fp32.
    """
    logits = logits.float() / temperature
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of next-token distributions in nats: logits [..., V] -> [...], in fp32; a logit of -inf takes no part."""
    return torch.special.entr((logits.float() / temperature).softmax(-1)).sum(-1)


@dataclass
class Clipped:
    """A clipped loss.

    Args:
        loss: Scalar with gradient.
        share: Share of the tokens where the clip took the gradient away, scalar.
    """

    loss: Tensor
    share: Tensor


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2, count: float | None = None
) -> Clipped:
    """PPO's clipped surrogate, to be minimised (Schulman et al. 2017, equation 7).

    With ratio = exp(log_probs - old): - mean of min(ratio A, clip(ratio, 1 - clip, 1 + clip) A). The minimum is a pessimist: no
    gain for going further than the clip, full loss for having gone the wrong way.

    Args:
        log_probs: [N, T], of the policy that learns.
        old: [N, T], of the policy that drew the tokens; no gradient.
        advantages: [N, T].
        mask: [N, T] bool.
        clip: Half the width of the interval around 1.
        count: Real tokens that the mean is over; None: those of `mask`.
    """
    ratio = (log_probs - old).masked_fill(~mask, 0.0).exp()
    free, bound = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return Clipped(masked_mean(-torch.minimum(free, bound), mask, count), masked_mean((bound < free).float(), mask, count))


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2, count: float | None = None
) -> Clipped:
    """Half the squared error of the predicted returns, whose predictions may not move further than the clip at once.

    1/2 mean of max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), as in the code published with Ziegler et al. 2019,
    which InstructGPT's PPO goes back to (Ouyang et al. 2022, appendix C.4).

    Args:
        values: [N, T], with gradient.
        old: [N, T], predictions when the tokens were drawn.
        returns: [N, T], `advantages.gae`'s second result.
        mask: [N, T] bool.
        clip: How far a prediction may go from the old one.
        count: Real tokens that the mean is over; None: those of `mask`.
    """
    # Clamped between two numbers, an unclipped prediction stays just what it is; old + (values - old) would not.
    bounded = torch.minimum(torch.maximum(values, old - clip), old + clip)
    free, bound = (values - returns).square(), (bounded - returns).square()
    return Clipped(masked_mean(torch.maximum(free, bound), mask, count) / 2, masked_mean((bound > free).float(), mask, count))


def reward_loss(scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor, prompts: float) -> Tensor:
    """Loss of the reward model (Ouyang et al. 2022, equation 1).

    Mean over prompts of - 1 / C(K, 2) * sum over pairs of log sigmoid(r_better - r_worse). All pairs of a prompt are in one call,
    so that each answer is read once, not K - 1 times. A tie is no pair, but counts in C(K, 2).

    Args:
        scores: [N], of every answer of the batch, in any order.
        better: [P] long, rows of `scores`.
        worse: [P] long.
        weights: [P], 1 / C(K, 2) of the pair's prompt.
        prompts: Prompts that the mean is over (those of the whole optimizer step, where it is accumulated).

    Returns:
        Scalar with gradient.
    """
    margins = scores.float()[better] - scores.float()[worse]
    return -(weights * F.logsigmoid(margins)).sum() / prompts


def dpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, *, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    - log sigmoid(h), h = beta (log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)): a reward model's loss on the
    reward that the policy implies, beta log pi / ref.

    Args:
        chosen: [P], log-probability of the whole preferred answer, its end token included, under the policy.
        rejected: [P], of the other one.
        chosen_reference: [P], under the reference; no gradient.
        rejected_reference: [P].
        beta: Weight of staying near the reference.

    Returns:
        Losses [P] with gradient, and implied margins h [P] without.
    """
    margins = beta * ((chosen - chosen_reference) - (rejected - rejected_reference))
    return -F.logsigmoid(margins), margins.detach()
