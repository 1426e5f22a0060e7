"""What an iteration of PPO learns from: answers with their rewards and values, in minibatches, and what predicts the values.

Letters in shapes: N answers of an iteration on this process, T tokens of the longest, n answers of a minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from mmgpt.data.packing import Batch
from mmgpt.model.heads import RewardModel, ScalarHead
from mmgpt.rl.rollout import Replay, Rollout


@dataclass
class Experience:
    """The answers of an iteration with everything that is learnt from them.

    Args:
        rollout: N answers.
        scores: [N], their rewards, or the penalty for one without an end.
        old: [N, T], log-probabilities under the policy that drew them, from the training forward.
        reference: [N, T], under the reference.
        values: [N, T], predicted returns.
        advantages: [N, T], whitened.
        returns: [N, T], what the values should have been.
    """

    rollout: Rollout
    scores: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class Minibatch:
    """Some answers as the models read them.

    Args:
        batch, places: Of `Rollout.minibatch`; the pictures are the policy's features or pixels of them.
        tokens: [n, T] long.
        mask: [n, T] bool.
        reference_images, value_images: What the reference and the value network see of the pictures.
    """

    batch: Batch
    places: Tensor
    tokens: Tensor
    mask: Tensor
    reference_images: Tensor | None
    value_images: Tensor | None

    def of(self, images: Tensor | None) -> Minibatch:
        """The same with other images."""
        return replace(self, batch=replace(self.batch, images=images))


class Value(nn.Module):
    """Predicts the return of an answer at each of its tokens: a head on the policy's states, or a network of its own.

    Args:
        width: Of the policy's states.
        network: A reward model to begin as (Ouyang et al. 2022, appendix C.4); None puts a new head on the policy's states.
    """

    def __init__(self, width: int, network: RewardModel | None = None):
        super().__init__()
        self.network = None if network is None else network.model
        self.head = ScalarHead(width) if network is None else network.head
        if network is None:
            # It knows nothing yet: a value of 0, not a guess, is what the first advantages are measured against.
            nn.init.zeros_(self.head.weight)

    def forward(self, policy: Replay, part: Minibatch) -> Tensor:
        """[n, T] values, 0 outside of the mask; `policy` is what the policy said of the same answers."""
        states = policy.hidden
        if self.network is not None:
            hidden = self.network.hidden(part.of(part.value_images).batch)
            states = hidden.gather(1, part.places[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.head(states).masked_fill(~part.mask, 0.0)
