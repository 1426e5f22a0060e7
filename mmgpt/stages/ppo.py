"""PPO: the policy draws answers, learns which were better than expected, and stays near the model that it began as.

InstructGPT's objective (Ouyang et al. 2022, equation 2), to be maximised:

    E[r(x, y) - beta log(pi(y | x) / ref(y | x))] + gamma E over pretraining text of log pi(text)

One training step is one iteration: draw (`rl.rollout.draw`), judge (`rl.rewards`), then several optimizer steps on the answers.
The losses of a minibatch, pretraining mix included, share one gradient and one optimizer step (PPO-ptx).

Letters in shapes: N answers of an iteration on this process, T tokens of the longest, n answers of a minibatch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mmgpt.config import RunConfig
from mmgpt.data.features import ImageSource
from mmgpt.data.loader import BatchLoader
from mmgpt.data.messages import Message
from mmgpt.data.prompts import Prompt
from mmgpt.errors import UserError
from mmgpt.model.adapters import adapters_off
from mmgpt.model.heads import RewardModel
from mmgpt.model.language import width_of
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl import kl as kl_penalty
from mmgpt.rl.advantages import explained_variance, gae, masked_mean, sum_over_ranks, token_rewards, whiten
from mmgpt.rl.engine import VllmEngine
from mmgpt.rl.experience import Experience, Minibatch, Value
from mmgpt.rl.losses import policy_loss, value_loss
from mmgpt.rl.rewards import Scores, WeightedReward
from mmgpt.rl.rollout import Replay, Rollout, draw, replay, seeded
from mmgpt.stages.instruct import stage_rates
from mmgpt.stages.optimizer import (
    beside_language,
    freeze,
    freeze_unembedding,
    learnt_state,
    no_gradient,
    parameter_groups,
)

RATIO_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far from 1 a probability ratio may be before anything was learnt: old and new probabilities come from the same forward."""
RISE_FROM = 0.1
"""Where the learning rate's warm-up begins, as a share of its peak (Ouyang et al. 2022, appendix C.4)."""


class Ppo(L.LightningModule):
    """Policy, reference, value and the loop between them.

    Args:
        model: The policy.
        config: The run.
        reward: Judges answers.
        reference: What the policy stays near to; None: the policy without its adapters.
        value: A reward model that the value network begins as; None: a head on the policy's states.
        held_out: Prompts that are evaluated on.
        ptx: Texts of the pretraining mix; None: none.
    """

    def __init__(
        self,
        model: MultimodalGPT,
        config: RunConfig,
        reward: WeightedReward,
        *,
        reference: MultimodalGPT | None,
        value: RewardModel | None,
        held_out: Sequence[Prompt] = (),
        ptx: BatchLoader | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.value = Value(width_of(model.language), value)
        # Not a part of this module: neither learnt, nor saved, nor moved by Lightning.
        self.__dict__["reference"] = reference
        self.config = config
        self.settings = config.ppo
        self.reward = reward
        self.held_out = list(held_out)
        self.ptx = ptx
        self.images: ImageSource | None = None
        self.total_steps = 1
        self.rates = stage_rates(config)
        self._freeze()
        adaptive = self.settings.kl == "adaptive"
        self.penalty: kl_penalty.FixedKL | kl_penalty.AdaptiveKL = (
            kl_penalty.AdaptiveKL(self.settings.beta, self.settings.kl_target)
            if adaptive
            else kl_penalty.FixedKL(self.settings.beta)
        )
        self.average: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.best_score = float("-inf")
        self.best_iteration = -1
        self.iteration = 0
        self.optimizer_steps = 0
        self.first_length = 0.0
        self.unjudged = 0
        self.stopped = ""
        self._seconds: dict[str, float] = {}

    def _freeze(self) -> None:
        """What learns; and no dropout anywhere, so that a ratio of probabilities is the policy's doing alone."""
        freeze(self.model, self.rates)
        rate = self.rates["head"]
        self.value.head.requires_grad_(rate > 0)
        if self.value.network is not None:
            freeze(self.value.network, {"vision": 0.0, "projector": 0.0, "language": rate})
            freeze_unembedding(self.value.network.language)
        self.eval()

    def train(self, mode: bool = True) -> Ppo:
        """Never with dropout."""
        return super().train(False)

    def configure_optimizers(self) -> Any:
        config, rate = self.config.optimizer, self.rates["head"]
        groups = parameter_groups(self.model, self.rates, config.weight_decay)
        if self.value.network is not None:
            groups += parameter_groups(self.value.network, {"language": rate}, config.weight_decay)
        groups += parameter_groups(self.value, {"head": rate}, config.weight_decay)
        for number, group in enumerate(groups):
            group["name"] = f"{number}: {group['name']}"
        optimizer = torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
        rise = self.settings.warmup
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if step >= rise else RISE_FROM + (1 - RISE_FROM) * step / rise
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # One iteration

    def training_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self._seconds = {}
        if self.iteration == 0:
            self._evaluate()
        experience = self._gather([prompt.messages for prompt in batch])
        measured = self._learn(experience)
        measured |= self._describe(experience)
        # The controller sees what this iteration was drawn with, and rules the next.
        self.penalty.update(measured["kl"])
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.iteration += 1
        self._watch(measured)
        if self.stopped or self.iteration % self.settings.evaluate_every == 0 or self.iteration == self.settings.iterations:
            self._evaluate()
        self.log_dict({f"train/{name}": value for name, value in measured.items()}, batch_size=1)

    def _gather(self, prompts: list[list[Message]]) -> Experience:
        """Draw answers, judge them, and work out how much better than expected each token was."""
        settings = self.settings
        seed = f"{self.config.trainer.seed}/{self.iteration}/{self.trainer.global_rank}"
        with self._timed("draw"):
            rollout = self._draw(prompts, samples=settings.samples, seed=seed)
        with self._timed("judge"):
            found = self._judge(rollout)
        judged = found.judged.nonzero().flatten().tolist()
        self.unjudged += len(rollout) - len(judged)
        if not judged:
            raise UserError(f"the reward could judge none of the {len(rollout)} answers of an iteration: {found.problem}")
        rollout, scores = rollout.select(judged), found.values[judged]
        self._terms = self._by_term(found, found.judged)
        self._score = float(scores.mean())
        if settings.no_eos_score is not None:
            scores = torch.where(rollout.ended, scores, settings.no_eos_score)
        if settings.empty_score is not None:
            said = torch.tensor([bool(text.strip()) for text in rollout.texts])
            scores = torch.where(said, scores, settings.empty_score)
        shape = rollout.mask.shape
        old, reference, values = (torch.zeros(shape) for _ in range(3))
        with self._timed("reread"), torch.no_grad():
            for rows in self._first_forwards(len(rollout)):
                if not rows:
                    continue
                part = self._minibatch(rollout, rows)
                policy = self._replay(self.model, part)
                old[rows] = policy.log_probs.cpu()
                values[rows] = self.value(policy, part).float().cpu()
                reference[rows] = self._reference(part).log_probs.cpu()
        mask = rollout.mask
        rewards = token_rewards(scores, -self.penalty.beta * kl_penalty.estimate(old, reference), mask)
        advantages, returns = gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam)
        total = sum_over_ranks if self.trainer.world_size > 1 else None
        advantages = whiten(advantages.to(self.device), mask.to(self.device), total=total).cpu()
        return Experience(rollout, scores, old, reference, values, advantages, returns)

    def _learn(self, experience: Experience) -> dict[str, float]:
        """The optimizer steps of an iteration. Returns what to log of them."""
        settings, rollout = self.settings, experience.rollout
        optimizer: Any = self.optimizers()
        sums: dict[str, float] = {}
        deviation = 0.0
        steps = 0
        for epoch in range(settings.epochs):
            for rows in self._minibatches(len(rollout), epoch):
                own = rollout.mask[rows].sum().float() if rows else torch.zeros(())
                count = float(sum_over_ranks(own.to(self.device))) / self.trainer.world_size
                optimizer.zero_grad()
                with self._timed("learn"):
                    for part in self._chunks(rows):
                        found, ratio = self._backward(experience, part, max(count, 1.0))
                        if steps == 0:
                            deviation = max(deviation, ratio)
                        for name, value in found.items():
                            sums[name] = sums.get(name, 0.0) + value
                if steps == 0:
                    self._check_ratio(deviation)
                if self.ptx is not None:
                    with self._timed("ptx"):
                        sums["ptx_loss"] = sums.get("ptx_loss", 0.0) + self._backward_ptx()
                with self._timed("learn"):
                    sums["gradient_norm"] = sums.get("gradient_norm", 0.0) + self._clip()
                    optimizer.step()
                    self._update_average()
                self.optimizer_steps += 1
                steps += 1
        return {**{name: value / steps for name, value in sums.items()}, "ratio_deviation": deviation}

    def _backward(self, experience: Experience, rows: list[int], count: float) -> tuple[dict[str, float], float]:
        """Add the gradient of some answers. Returns parts of the minibatch's means, and the largest |ratio - 1|."""
        settings, rollout = self.settings, experience.rollout
        if not rows:
            self.manual_backward(no_gradient(self, lambda name: True))
            return {}, 0.0
        part = self._minibatch(rollout, rows)
        mask = part.mask
        old, advantages, before, returns = (
            each[rows].to(self.device) for each in (experience.old, experience.advantages, experience.values, experience.returns)
        )
        policy = self._replay(self.model, part)
        values = self.value(policy, part).float()
        surrogate = policy_loss(policy.log_probs, old, advantages, mask, clip=settings.clip, count=count)
        error = value_loss(values, before, returns, mask, clip=settings.value_clip, count=count)
        unreached = no_gradient(self, beside_language)
        self.manual_backward(surrogate.loss + settings.value_coefficient * error.loss + unreached)
        with torch.no_grad():
            ratio = (policy.log_probs - old).masked_fill(~mask, 0.0).exp()
            found = {
                "policy_loss": surrogate.loss,
                "value_loss": error.loss,
                "clip_fraction": surrogate.share,
                "value_clip_fraction": error.share,
                "entropy": masked_mean(policy.entropy, mask, count),
                "old_kl": masked_mean(kl_penalty.estimate(old, policy.log_probs, "k3"), mask, count),
            }
        return {name: float(value.detach()) for name, value in found.items()}, float((ratio - 1).abs().max())

    def _backward_ptx(self) -> float:
        """Add gamma times the gradient of the language model's loss on pretraining text. Returns that loss, per token."""
        assert self.ptx is not None
        per_turn = len(self.ptx)
        turn, place = divmod(self.optimizer_steps, per_turn)
        batch, _ = self.ptx.build(turn, self.trainer.global_rank + self.trainer.world_size * place)
        batch.images = None
        result = self.model.loss(batch.to(self.device))
        mean = result.loss * self.trainer.world_size / max(1, batch.target_count)
        unreached = no_gradient(self, lambda name: not name.startswith("model.language."))
        self.manual_backward(self.settings.ptx.coefficient * mean + unreached)
        return float(result.loss.detach()) / max(1, result.count)

    def _check_ratio(self, deviation: float) -> None:
        """Nothing was learnt yet, so the policy is the one that drew: the best single test of the whole machinery."""
        half = "bf16" in str(self.trainer.precision)
        most = RATIO_TOLERANCE[torch.bfloat16 if half else torch.float32]
        if not deviation <= most:
            raise UserError(
                f"iteration {self.iteration + 1}: before its first step the policy gives its own answers a probability that is "
                f"off by a factor of {1 + deviation:.6f} (at most {1 + most:g}): something changed between drawing and learning, "
                "such as dropout, or a weight that is not a number"
            )

    def _clip(self) -> float:
        """Clip policy and value network each by its own norm; returns the policy's."""
        most = self.config.optimizer.clip or float("inf")
        policy = [p for p in self.model.parameters() if p.grad is not None]
        value = [p for p in self.value.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(policy, most)
        torch.nn.utils.clip_grad_norm_(value, most)
        if not bool(norm.isfinite()):
            raise UserError(f"iteration {self.iteration + 1}: the gradient is not finite; lower optimizer.lr")
        return float(norm)

    # What the parts are asked

    def _draw(self, prompts: list[list[Message]], *, samples: int, seed: str) -> Rollout:
        settings = self.settings
        with torch.autocast(self.device.type, enabled=False):
            return draw(
                self.model,
                prompts,
                samples=samples,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=seed,
                batch_size=self.config.evaluate.batch_size,
                engine=self._engine(),
            )

    def _engine(self) -> VllmEngine | None:
        """What draws in the decoder's place; it is started when it is first needed."""
        if self.settings.engine == "vllm" and "engine" not in self.__dict__:
            self.__dict__["engine"] = VllmEngine(self.model, self.settings.engine_memory)
        return self.__dict__.get("engine")

    def _judge(self, rollout: Rollout) -> Scores:
        with torch.autocast(self.device.type, enabled=False):
            return self.reward(rollout.prompts, rollout.texts)

    def _minibatch(self, rollout: Rollout, rows: list[int]) -> Minibatch:
        """Some answers, ready for the forwards of policy, value and reference."""
        batch, places = rollout.minibatch(rows, self.model.tokenizer.pad_id)
        pictures = batch.images
        batch.images = own = self._features(self.model, pictures)
        with self._as_reference() as reference:
            # An encoder that learns shows the reference what it saw at first.
            seen = self._features(reference, pictures) if self.rates["vision"] > 0 else own
        value = None if self.value.network is None else self._features(self.value.network, pictures)
        places, tokens, mask = (part.to(self.device) for part in (places, rollout.tokens[rows], rollout.mask[rows]))
        return Minibatch(batch.to(self.device), places, tokens, mask, seen, value)

    def _features(self, model: MultimodalGPT, pictures: Sequence[Any]) -> Tensor | None:
        if not pictures or model.vision is None:
            return None
        return model.image_features(pictures).to(self.device)

    def _replay(self, model: MultimodalGPT, part: Minibatch) -> Replay:
        return replay(model, part.batch, part.places, part.tokens, part.mask, temperature=self.settings.temperature)

    @torch.no_grad()
    def _reference(self, part: Minibatch) -> Replay:
        """What the reference says of the same tokens."""
        with self._as_reference() as reference:
            return self._replay(reference, part.of(part.reference_images))

    @contextmanager
    def _as_reference(self) -> Iterator[MultimodalGPT]:
        """The model that the policy was at first."""
        reference: MultimodalGPT | None = self.__dict__["reference"]
        if reference is not None:
            yield reference
            return
        with adapters_off(self.model):
            yield self.model

    # Which answers meet in a step

    def _minibatches(self, count: int, epoch: int) -> list[list[int]]:
        """The answers in random order, in as many parts on every process, whatever was dropped."""
        planned = self.settings.batch_size * self.settings.samples
        parts = -(-planned // self.settings.minibatch_size)
        order = torch.randperm(count, generator=seeded(f"{self.config.trainer.seed}/{self.iteration}/{epoch}"))
        return [part.tolist() for part in order.tensor_split(parts)]

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        """The forwards that a minibatch takes."""
        size = self.settings.microbatch_size or self.settings.minibatch_size
        parts = -(-self.settings.minibatch_size // size)
        return [part.tolist() for part in torch.tensor(rows, dtype=torch.long).tensor_split(parts)]

    def _first_forwards(self, count: int) -> Iterator[list[int]]:
        """The forwards of the first epoch: old probabilities are taken in the same ones, so that they are its own bit for bit."""
        for rows in self._minibatches(count, epoch=0):
            yield from self._chunks(rows)

    # Averages and evaluation

    def _learnt(self) -> dict[str, nn.Parameter]:
        """What learns of the policy."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _update_average(self) -> None:
        """Exponential moving average over optimizer steps; it begins as the weights that the policy began with."""
        decay = self.settings.ema
        for name, parameter in self._learnt().items():
            if decay:
                self.average[name].lerp_(parameter.detach(), 1 - decay)

    def on_train_start(self) -> None:
        self._freeze()
        if self.settings.ema and not self.average:
            self.average = {name: p.detach().clone() for name, p in self._learnt().items()}
        for model in (self.model, self.value.network, self.__dict__["reference"]):
            if model is not None and self.images is not None and self.images.frozen:
                model.image_source = self.images

    @contextmanager
    def averaged(self, weights: dict[str, Tensor] | None = None) -> Iterator[None]:
        """The policy with other weights (the moving average's), for a while."""
        weights = self.average if weights is None else weights
        own = {name: p.detach().clone() for name, p in self._learnt().items() if name in weights}
        self.set_weights(weights)
        try:
            yield
        finally:
            self.set_weights(own)

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the policy."""
        for name, parameter in self._learnt().items():
            if name in weights:
                parameter.copy_(weights[name])

    def _evaluate(self) -> None:
        """Score answers to held-out prompts, and keep the weights if there were none better."""
        if not self.held_out:
            return
        with self._timed("evaluate"), self.averaged():
            rollout = self.answer_held_out()
            scores = self._judge(rollout)
            kl = self.divergence(rollout)
            judged = scores.judged
            score = float(scores.values[judged].mean()) if bool(judged.any()) else float("nan")
            if score > self.best_score:
                self.best_score, self.best_iteration = score, self.iteration
                self.best = {name: p.detach().clone().cpu() for name, p in self._learnt().items()}
        measured = {
            "score": score,
            "kl": kl,
            "length": float(rollout.lengths.float().mean()),
            "ended": float(rollout.ended.float().mean()),
            **self._by_term(scores, judged),
        }
        # Not by `log`: the row has to be whole when the checkpoint after this step is written.
        kind = "val" if self.iteration else "start"
        for logger in self.loggers:
            logger.log_metrics({f"{kind}/{name}": value for name, value in measured.items()}, max(0, self.iteration - 1))

    @staticmethod
    def _by_term(scores: Scores, judged: Tensor) -> dict[str, float]:
        """What each reward function says by itself, where there are several; one of weight 0 only watches."""
        terms = scores.terms if len(scores.terms) > 1 else {}
        return {f"score/{name}": float(values[judged].mean()) for name, values in terms.items()}

    def answer_held_out(self) -> Rollout:
        """One answer to each held-out prompt, always with the same random numbers."""
        return self._draw([prompt.messages for prompt in self.held_out], samples=1, seed=f"held out/{self.config.trainer.seed}")

    def answer_as_reference(self) -> Rollout:
        """The same, by the model that the policy was at first."""
        policy, reference = self.model, self.__dict__["reference"]
        if reference is None:
            # An adapter adds B A to its weight: without B it is not there, for the decoder either.
            with self.averaged({name: torch.zeros_like(p) for name, p in self._learnt().items() if "lora_B" in name}):
                return self.answer_held_out()
        try:
            self.model = reference
            return self.answer_held_out()
        finally:
            self.model = policy

    @torch.no_grad()
    def divergence(self, rollout: Rollout) -> float:
        """Mean KL of answers to the reference, in nats an answer."""
        total, size = 0.0, self.settings.minibatch_size
        for start in range(0, len(rollout), size):
            rows = list(range(start, min(start + size, len(rollout))))
            part = self._minibatch(rollout, rows)
            total += float(kl_penalty.estimate(self._replay(self.model, part).log_probs, self._reference(part).log_probs).sum())
        return total / max(1, len(rollout))

    # What is told

    def _describe(self, experience: Experience) -> dict[str, float]:
        """The health of an iteration: what to look at when a policy goes astray."""
        rollout, mask = experience.rollout, experience.rollout.mask
        lengths = rollout.lengths.float()
        tokens = int(mask.sum())
        kl = kl_penalty.estimate(experience.old, experience.reference).masked_fill(~mask, 0.0).sum(1)
        measured = {
            "score": self._score,
            "reward": float(experience.scores.mean()),
            "score_deviation": float(experience.scores.std(unbiased=False)),
            "kl": float(kl.mean()),
            "beta": self.penalty.beta,
            "value_explained": float(explained_variance(experience.values, experience.returns, mask)),
            "ended": float(rollout.ended.float().mean()),
            "length": float(lengths.mean()),
            "distinct": len(set(rollout.texts)) / len(rollout),
            "decoder_gap": float((rollout.log_probs - experience.old).masked_fill(~mask, 0.0).abs().max()),
            "unjudged": float(self.unjudged),
            "lr": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        measured |= self._terms
        spent = sum(seconds for phase, seconds in self._seconds.items() if phase != "evaluate")
        measured |= {f"{phase}_tokens_per_s": tokens / max(1e-9, seconds) for phase, seconds in self._seconds.items()}
        measured |= {"samples_per_s": len(rollout) / max(1e-9, spent), "tokens_per_s": tokens / max(1e-9, spent)}
        return measured

    def _watch(self, measured: dict[str, float]) -> None:
        """Stop when the policy has run away from the reference, or answers grow without end."""
        settings = self.settings
        self.first_length = self.first_length or measured["length"]
        growth = measured["length"] / self.first_length
        if settings.max_kl is not None and measured["kl"] > settings.max_kl:
            self.stopped = f"the KL to the reference is {measured['kl']:.1f} nats an answer, ppo.max_kl is {settings.max_kl:g}"
        elif settings.max_growth is not None and growth > settings.max_growth:
            self.stopped = f"answers are {growth:.1f} times as long as at first, ppo.max_growth is {settings.max_growth:g}"
        if self.stopped:
            self.trainer.should_stop = True

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    # State

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # prompts: what is made of them is moved where it is made

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return learnt_state(self, super().state_dict(*args, **kwargs), kwargs.get("prefix", ""))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ppo"] = {
            "penalty": self.penalty.state_dict(),
            "average": self.average,
            "best": self.best,
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ppo"]
        self.penalty.load_state_dict(state["penalty"])
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.best = state["best"]
        for name in _NUMBERS:
            setattr(self, name, state["numbers"][name])


_NUMBERS = ("best_score", "best_iteration", "iteration", "optimizer_steps", "first_length", "unjudged")
