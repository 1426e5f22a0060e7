"""A task that the project makes up itself, with a reward whose best value is known: say a letter so many times.

The user says `say c 3`, and `ccc` is worth 1. Good enough to see a reward model rank and a policy improve, with nothing to fetch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmgpt.data.messages import Message, Sample, assistant, text_of, user
from mmgpt.data.ranked import Preference, ranked_pairs

LETTERS = "abcdefghijkl"
SIGNS = "".join(sign for sign in map(chr, range(128)) if not sign.isspace()) + "\N{REPLACEMENT CHARACTER}" * 32
"""What a model that writes bytes may say beside letters: half of all bytes are no character, and are read as this one."""
MOST = 5
_ASKED = re.compile(r"say ([a-z]) (\d+)")


def letter_reward(prompt: Sequence[Message], answer: str) -> float:
    """What an answer is worth: the share of the places that hold the letter, less a share for each character too many.

    Args:
        prompt: Ends with `say LETTER COUNT`.
        answer: Any text.

    Returns:
        1 for the letter so many times and nothing else, at least -1.
    """
    found = _ASKED.search(text_of(prompt[-1]))
    if found is None:
        raise ValueError(f"not a prompt of this task: {text_of(prompt[-1])[:60]!r}")
    letter, count = found[1], int(found[2])
    right = sum(said == letter for said in answer[:count])
    return max(-1.0, (right - max(0, len(answer) - count)) / count)


class LetterReward:
    """`letter_reward` as a reward function of many answers."""

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], images: Any = None) -> Any:
        """[N] rewards in fp32."""
        import torch

        return torch.tensor([letter_reward(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])


def letter_prompts(split: str | None) -> list[tuple[str, int]]:
    """The letters and counts of a split: one count of each letter is `val` and in no other split, the counts evenly."""
    letters = random.Random("letters").sample(LETTERS, len(LETTERS))
    held = {(letter, place % MOST + 1) for place, letter in enumerate(letters)}
    every = [(letter, count) for letter in LETTERS for count in range(1, MOST + 1)]
    return [pair for pair in every if split is None or (pair in held) == (split == "val")]


def draw_letters(split: str | None, count: int = 512) -> Iterator[Sample]:
    """Samples whose answers are mostly the right letter, and of any length: what there is to improve on."""
    prompts = letter_prompts(split)
    for number in range(count):
        rng = random.Random(f"letters/{split}/{number}")
        letter, times = rng.choice(prompts)
        yield Sample([user(f"say {letter} {times}"), assistant(_draw_answer(letter, rng))], f"letters[{split} {number}]")


def rank_letters(split: str | None, count: int = 512, answers: int = 4) -> Iterator[Preference]:
    """Prompts with different answers, ranked by what they are worth."""
    prompts = letter_prompts(split)
    for number in range(count):
        rng = random.Random(f"letter ranks/{split}/{number}")
        letter, times = rng.choice(prompts)
        prompt = [user(f"say {letter} {times}")]
        drawn: list[str] = [letter * times] if rng.random() < 0.5 else []
        while len(drawn) < answers or len({letter_reward(prompt, answer) for answer in drawn}) < 2:
            if (answer := _draw_ranked(letter, times, rng)) not in drawn:
                drawn = [answer, *drawn][: max(answers, 2)]
        rng.shuffle(drawn)
        pairs = ranked_pairs([-letter_reward(prompt, answer) for answer in drawn])
        yield Preference(prompt, drawn, pairs, answers * (answers - 1) // 2, f"letters[{split} {number}]")


def _draw_ranked(letter: str, times: int, rng: random.Random) -> str:
    """An answer to rank: what a policy is likely to try, or the reward model knows nothing of it and the policy finds out."""
    kind = rng.random()
    if kind < 0.2:  # the letter alone, which teaches to count: drawn place by place, few answers are
        return letter * rng.randint(1, MOST + 2)
    if kind < 0.4:  # the right answer with one character exchanged, added or left out
        at, other = rng.randrange(times), rng.choice(LETTERS if rng.random() < 0.7 else SIGNS)
        return letter * at + rng.choice((other, other + letter, "")) + letter * (times - at - 1) or other
    return _draw_answer(letter, rng, LETTERS if kind < 0.9 else SIGNS)


def _draw_answer(letter: str, rng: random.Random, others: str = LETTERS) -> str:
    right = rng.random()
    return "".join(letter if rng.random() < right else rng.choice(others) for _ in range(rng.randint(1, MOST + 2)))
