"""What answers are worth: reward functions named in a configuration, their weighted sum, and what cannot be judged.

A reward function is any callable `reward(prompts, answers, images) -> numbers [N]`: prompts are conversations whose next turn is
the assistant's, answers their texts, and images the pictures of each prompt.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmgpt import machine
from mmgpt.data.messages import Message, images_of
from mmgpt.errors import UsageError, UserError

if TYPE_CHECKING:
    from mmgpt.data.ranked import Preference

@dataclass
class RewardTerm:
    """One reward function of a weighted sum, as a configuration names it; `ppo.rewards` says what its keys mean."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    weight: float | Literal["fit"] = 1.0

    @classmethod
    def parse(cls, settings: Any) -> RewardTerm:
        """Read an element of `ppo.rewards`. Raises UsageError for one that breaks the form."""
        known = [entry.name for entry in fields(cls)]
        if not isinstance(settings, Mapping) or not isinstance(settings.get("class_path"), str):
            raise UsageError(f"ppo.rewards: {str(settings)[:80]} needs a class_path, as package.module.Name")
        if unknown := [key for key in settings if key not in known]:
            raise UsageError(f"ppo.rewards: unknown key {unknown[0]}; there are {', '.join(known)}")
        term = cls(settings["class_path"], settings.get("init_args") or {}, settings.get("weight", 1.0))
        if not isinstance(term.init_args, Mapping):
            raise UsageError(f"ppo.rewards: init_args of {term.class_path} must be a mapping, not {str(term.init_args)[:60]}")
        if term.weight != "fit" and (isinstance(term.weight, bool | str) or not math.isfinite(term.weight)):
            raise UsageError(f"ppo.rewards: weight of {term.class_path} is {term.weight}, but must be a number or fit")
        return term


Reward = Callable[[Sequence[list[Message]], Sequence[str], Sequence[list[Any]]], Any]


def load_reward(term: RewardTerm) -> Reward:
    """The reward function that a term names.

    Raises:
        UsageError: there is no such module or name, or it does not take these arguments.
        UserError: what it loads is broken.
    """
    module_name, _, name = term.class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"ppo.rewards: cannot import {term.class_path}: {error}") from error
    if not callable(found):
        raise UsageError(f"ppo.rewards: {term.class_path} is no function or class; write package.module.Name")
    try:
        inspect.signature(found).bind_partial(**term.init_args)
        reward: Any = found(**term.init_args) if inspect.isclass(found) else partial(found, **term.init_args)
    except TypeError as error:
        raise UsageError(f"ppo.rewards: {term.class_path} does not take init_args {term.init_args}: {error}") from error
    if not callable(reward):
        raise UsageError(f"ppo.rewards: objects of {term.class_path} cannot be called with (prompts, answers, images)")
    return reward


class LearnedReward:
    """A trained reward model (`stage: reward`) as a reward function.

    Args:
        path: Its run folder, or the exported model in it.
        batch_size: Answers scored side by side.
    """

    def __init__(self, path: str | Path, batch_size: int = 16):
        from mmgpt.model.heads import RewardModel

        self.model = RewardModel.from_pretrained(path)
        self.batch_size = batch_size
        self.bf16 = False

    def to(self, device: torch.device, *, bf16: bool = False) -> LearnedReward:
        """Move to a device; with `bf16`, encoder and language model are kept and multiplied in it, the head stays in fp32."""
        self.bf16 = bf16
        self.model.to(device)
        if bf16:
            for part in (self.model.vision, self.model.language):
                machine.keep_in_bf16(() if part is None else part.parameters())
        return self

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], images: Any = None) -> Tensor:
        """[N] scores in fp32."""
        with torch.autocast(self.model.model.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.score(prompts, answers, batch_size=self.batch_size)


@dataclass
class Scores:
    """What a batch of answers is worth.

    Args:
        values: [N] in fp32, NaN where an answer could not be judged.
        terms: By the name of each reward function, [N] of its own values, unweighted.
        problem: What the first failure said; empty where there was none.
    """

    values: Tensor
    terms: dict[str, Tensor]
    problem: str = ""

    @property
    def judged(self) -> Tensor:
        """[N] bool."""
        return self.values.isfinite()


@dataclass
class WeightedReward:
    """The weighted sum of reward functions. A sample that one of them fails on, or calls NaN, is not judged.

    Args:
        terms: (name, weight, function).
    """

    terms: list[tuple[str, float, Reward]] = field(default_factory=list)

    @classmethod
    def from_terms(cls, terms: Sequence[RewardTerm], ranked: Sequence[Preference] = ()) -> WeightedReward:
        """Load the functions; the weight `fit` is fitted on ranked answers.

        Raises:
            UsageError: no function is named, one cannot be loaded, or there is nothing to fit a weight on.
        """
        if not terms:
            raise UsageError(
                "ppo.rewards names no reward: give at least one, for example --ppo.rewards "
                "'[{class_path: mmgpt.rl.rewards.LearnedReward, init_args: {path: runs/reward}}]'"
            )
        fitted = [term for term in terms if term.weight == "fit"]
        if len(fitted) > 1 or (fitted and len(terms) == 1):
            raise UsageError("ppo.rewards: one weight of several can be `fit`; the others need numbers")
        if fitted and not ranked:
            raise UsageError("ppo.rewards: a weight `fit` needs ranked answers: name them under ppo.ranked")
        names = _names([term.class_path for term in terms])
        loaded = [
            (name, 1.0 if term.weight == "fit" else float(term.weight), load_reward(term)) for name, term in zip(names, terms)
        ]
        if not fitted:
            return cls(loaded)
        place = next(number for number, term in enumerate(terms) if term.weight == "fit")
        rest = cls([term for number, term in enumerate(loaded) if number != place])
        name, _, own = loaded[place]
        weight = fit_weight(*margins(rest, cls([(name, 1.0, own)]), ranked))
        loaded[place] = (name, weight, own)
        return cls(loaded)

    def __call__(self, prompts: Sequence[list[Message]], answers: Sequence[str]) -> Scores:
        values = torch.zeros(len(answers))
        own: dict[str, Tensor] = {}
        problem = ""
        for name, weight, reward in self.terms:
            own[name], said = judge(reward, prompts, answers)
            problem = problem or (f"{name}: {said}" if said else "")
            values = values + weight * own[name]
        return Scores(values, own, problem)

    def to(self, device: torch.device, *, bf16: bool = False) -> WeightedReward:
        """Move what can be moved to the device that answers are drawn on, learned rewards to the precision that the run has."""
        for _, _, reward in self.terms:
            if isinstance(reward, LearnedReward):
                reward.to(device, bf16=bf16)
        return self


def judge(reward: Reward, prompts: Sequence[list[Message]], answers: Sequence[str]) -> tuple[Tensor, str]:
    """Call a reward function; where it fails on a batch, on each answer by itself, so that the others are not lost.

    Returns:
        [N] in fp32, NaN for an answer that it fails on or has no finite number for, and what the first failure said.
    """
    images = [images_of(prompt) for prompt in prompts]
    try:
        return _numbers(reward(list(prompts), list(answers), images), len(answers)), ""
    except Exception as error:
        if len(answers) == 1:
            return torch.full((1,), math.nan), f"{type(error).__name__}: {error}"
        parts = [judge(reward, [prompt], [answer]) for prompt, answer in zip(prompts, answers)]
        return torch.cat([values for values, _ in parts]), next((said for _, said in parts if said), str(error))


def _numbers(values: Any, count: int) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float32).detach().cpu().flatten()
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers for {count} answers")
    return torch.where(numbers.isfinite(), numbers, math.nan)


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of reward functions; the same one twice gets a number."""
    short = [path.rpartition(".")[2] for path in paths]
    return [name if short.count(name) == 1 else f"{name} {short[: place + 1].count(name)}" for place, name in enumerate(short)]


def margins(learned: WeightedReward, rule: WeightedReward, ranked: Sequence[Preference]) -> tuple[np.ndarray, np.ndarray]:
    """How much more the better answer of each pair is worth to two rewards, [P] each.

    Raises:
        UserError: one of them cannot judge any pair.
    """
    from mmgpt.data.ranked import side_by_side

    prompts, answers, pairs = side_by_side(ranked)
    values = [reward(prompts, answers).values.double().numpy() for reward in (learned, rule)]
    better, worse = (np.array(side, dtype=int) for side in zip(*pairs)) if pairs else (np.zeros(0, int), np.zeros(0, int))
    found = [value[better] - value[worse] for value in values]
    known = np.isfinite(found[0]) & np.isfinite(found[1])
    if not known.any():
        raise UserError("ppo.ranked: no pair of answers that all reward functions can judge; a weight cannot be fitted")
    return found[0][known], found[1][known]


def fit_weight(fixed: np.ndarray, free: np.ndarray) -> float:
    """The weight w >= 0 with the least mean hinge max(0, 1 - (fixed + w free)) over pairs: exactly, for the loss is convex.

    The weight of rule-based rewards beside a learned one is fitted like this on ranked answers (Mu et al. 2024, section 4.2).

    Args:
        fixed: [P], margin (better - worse) of the rewards whose weights stand.
        free: [P], margin of the reward whose weight is looked for.
    """
    # Between two corners the loss is a straight line: its least value is at one of them. A weight of 0 comes last among equals.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        corners = (1 - fixed) / free
        candidates = np.unique(np.concatenate(([0.0], corners[np.isfinite(corners) & (corners > 0)])))
        losses = [float(np.maximum(0.0, 1 - (fixed + weight * free)).mean()) for weight in candidates]
    return float(candidates[int(np.argmin(losses))])
