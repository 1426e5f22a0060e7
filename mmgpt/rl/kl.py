"""How far the policy has gone from the reference, and what that costs.

Letters in shapes: N answers, T tokens of the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def estimate(log_probs: Tensor, reference: Tensor, kind: Estimator = "k1") -> Tensor:
    """KL(policy || reference) at each token, estimated from the one token that the policy drew.

    With x = log reference - log policy (Schulman 2020, "Approximating KL Divergence"): k1 = -x, unbiased, and of either sign;
    k2 = x^2 / 2, biased, of little variance; k3 = e^x - 1 - x, unbiased and never negative. The penalty of InstructGPT
    (Ouyang et al. 2022, equation 2) is k1.

    Args:
        log_probs: [N, T], log pi(token), at the temperature that it was drawn at.
        reference: [N, T], of the same tokens at the same temperature.
        kind: The estimator.

    Returns:
        [N, T], in nats.
    """
    x = reference - log_probs
    if kind == "k1":
        return -x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        # e^x - 1 loses its digits near x = 0, which is where a policy begins.
        return torch.expm1(x) - x
    raise ValueError(f"estimator {kind!r} is not one of k1, k2, k3")


@dataclass
class FixedKL:
    """A penalty whose weight `beta` stays as it is (InstructGPT: 0.02)."""

    beta: float = 0.02

    def update(self, kl: float) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


@dataclass
class AdaptiveKL:
    """A penalty whose weight follows the divergence towards a target (Ziegler et al. 2019, section 2.2).

    e = clip((KL - target) / target, -0.2, 0.2);  beta <- beta (1 + gain e).

    Args:
        beta: The weight to begin with.
        target: KL of a whole answer to hold, in nats.
        gain: K_beta of the paper.
    """

    beta: float = 0.02
    target: float = 6.0
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError(f"the target is {self.target} nats, but must be above 0")

    def update(self, kl: float) -> None:
        """Take the mean KL of the answers of one iteration into account. Raises ValueError for one that is not finite."""
        error = min(max((kl - self.target) / self.target, -0.2), 0.2)
        if error != error:
            raise ValueError(f"the KL of this iteration is {kl}")
        self.beta *= 1 + self.gain * error

    def state_dict(self) -> dict[str, float]:
        """What changes while it runs; target and gain are the configuration's."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]
