"""Ranked answers: a prompt, several answers to it, and who won; alone, joined by prompt, and encoded for batches.

    Preference -> RankedItem -> PreferenceBatch (branching.py)
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmgpt.data.images import image_name
from mmgpt.data.messages import Message, MessageError, Rejected, assistant
from mmgpt.data.template import Encoded

MOST_ANSWERS = 9
"""Answers to a prompt that are learnt from at one time: as many as InstructGPT's labellers ranked (section 3.5)."""


@dataclass(frozen=True)
class Preference:
    """A prompt, some answers to it, and which of two was preferred.

    Args:
        prompt: A conversation whose next turn is the assistant's.
        answers: Different answers to it, K of them.
        pairs: (better, worse), places in `answers`; ties are left out.
        compared: Comparisons made, ties counted: C(K, 2) of a ranking, 1 of two sides. A pair weighs 1 / compared.
        where: The row that it came from.
    """

    prompt: list[Message]
    answers: list[str]
    pairs: list[tuple[int, int]]
    compared: int
    where: str

    @property
    def key(self) -> str:
        """The same for the same prompt, and for no other."""
        return prompt_key(self.prompt)

    def conversations(self) -> list[list[Message]]:
        """The prompt followed by each answer."""
        return [[*self.prompt, assistant(answer)] for answer in self.answers]


def prompt_key(messages: Sequence[Message]) -> str:
    """A digest of a prompt: its roles, its text, and the names of its images."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        parts = [part["text"] if part["type"] == "text" else ["image", image_name(part["image"])] for part in message["content"]]
        digest.update(json.dumps([message["role"], parts]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs (better, worse) among the answers to one prompt; equal ranks make none.

    Args:
        ranks: One an answer, the smallest is the best.
    """
    order = range(len(ranks))
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i in order for j in order[i + 1 :] if ranks[i] != ranks[j]]


def side_by_side(preferences: Sequence[Preference]) -> tuple[list[list[Message]], list[str], list[tuple[int, int]]]:
    """All answers of preferences in one list: the prompt of each, its text, and the pairs as places in that list."""
    prompts = [preference.prompt for preference in preferences for _ in preference.answers]
    answers = [answer for preference in preferences for answer in preference.answers]
    starts = itertools.accumulate((len(preference.answers) for preference in preferences), initial=0)
    pairs = [(start + better, start + worse) for start, item in zip(starts, preferences) for better, worse in item.pairs]
    return prompts, answers, pairs


def join_prompts(preferences: Sequence[Preference], most: int = MOST_ANSWERS) -> list[Preference]:
    """One preference a prompt, with all its answers and pairs, in the order in which the prompts are first met.

    InstructGPT (Ouyang et al. 2022, section 3.5) keeps all comparisons of a prompt in one batch element: shuffled into one data
    set, each answer is learnt from in K - 1 steps, and the model overfits within one epoch.

    Args:
        preferences: In any order.
        most: Answers that are joined at most; a prompt with more becomes several elements, none of them cut.
    """
    groups: dict[str, list[list[Preference]]] = {}
    for preference in preferences:
        of_prompt = groups.setdefault(preference.key, [[]])
        if of_prompt[-1] and len({answer for part in [*of_prompt[-1], preference] for answer in part.answers}) > most:
            of_prompt.append([])
        of_prompt[-1].append(preference)
    return [_join(group) if len(group) > 1 else group[0] for of_prompt in groups.values() for group in of_prompt]


def _join(group: Sequence[Preference]) -> Preference:
    answers: dict[str, int] = {}
    pairs = []
    for preference in group:
        places = [answers.setdefault(answer, len(answers)) for answer in preference.answers]
        pairs += [(places[better], places[worse]) for better, worse in preference.pairs]
    where = f"{group[0].where} and {len(group) - 1} more"
    return replace(
        group[0], answers=list(answers), pairs=pairs, compared=sum(part.compared for part in group), where=where
    )


# Encoded


@dataclass
class RankedItem:
    """A preference ready for batches.

    Args:
        preference: What it was made of.
        shared: The tokens that all answers begin with, the prompt among them.
        branches: What follows for each answer, up to the token that ends it; never empty.
        images: The images of the prompt, in the order of their placeholders, all of which are in `shared`.
        lengths: Tokens of each answer, its end token counted.
    """

    preference: Preference
    shared: list[int]
    branches: list[list[int]]
    images: list[Any]
    lengths: list[int]

    def __len__(self) -> int:
        """Tokens of the prompt and all answers, each once."""
        return len(self.shared) + sum(map(len, self.branches))


def rank_item(
    preference: Preference, encode: Callable[[Sequence[Message]], Encoded], max_length: int
) -> RankedItem | Rejected:
    """Encode a preference, or say why it cannot be learnt from."""
    try:
        encoded = [encode(messages) for messages in preference.conversations()]
    except MessageError as error:
        return Rejected(error.reason, preference.where, str(error))
    ids = [until_answer_ends(answer) for answer in encoded]
    longest = max(map(len, ids))
    if longest > max_length:
        return Rejected(
            "too_long", preference.where, f"an answer with its prompt has {longest} tokens, data.max_length is {max_length}"
        )
    # An answer that another begins with keeps its end token to itself: that is where its score is read.
    shared = min(common_prefix(ids), min(map(len, ids)) - 1)
    starts = [max(i for i in range(len(cut)) if not whole.supervised[i]) + 1 for cut, whole in zip(ids, encoded)]
    lengths = [len(cut) - start for cut, start in zip(ids, starts)]
    return RankedItem(preference, ids[0][:shared], [answer[shared:] for answer in ids], encoded[0].images, lengths)


def common_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all sequences begin with."""
    places = enumerate(zip(*sequences))
    return next((place for place, found in places if any(other != found[0] for other in found)), min(map(len, sequences)))


def until_answer_ends(encoded: Encoded) -> list[int]:
    """Ids up to the token that ends the last answer, where its score is read; what a template puts behind it is left out."""
    last = max(place for place, learnt in enumerate(encoded.supervised) if learnt)
    return encoded.ids[: last + 1]


@dataclass(frozen=True)
class PreferenceStatistics:
    """What to know of a set before a model learns from it.

    Args:
        prompts, answers, pairs: Counts; an answer that several items hold counts in each.
        ties: Comparisons that made no pair.
        repeated: Pairs that stood there before, in the same order.
        contradictions: Pairs of one prompt that stand in both orders.
        better, worse: Mean tokens of the preferred and of the other answer, over the pairs.
        longer: Share of pairs whose preferred answer is the longer one, a draw counted half: what a judge of length reaches.
        images: Prompts with a picture.
    """

    prompts: int
    answers: int
    pairs: int
    ties: int
    repeated: int
    contradictions: int
    better: float
    worse: float
    longer: float
    images: int

    def __str__(self) -> str:
        pictures = f", {self.images} with a picture" if self.images else ""
        counts = {"ties": self.ties, "repeated": self.repeated, "contradictions": self.contradictions}
        notes = "".join(f", {count} {name}" for name, count in counts.items() if count)
        return (
            f"{self.prompts} prompts{pictures} with {self.answers} answers and {self.pairs} pairs{notes}; preferred answers have "
            f"{self.better:.0f} tokens, the others {self.worse:.0f}: the longer one is preferred in {self.longer:.1%}"
        )


def statistics(items: Sequence[RankedItem]) -> PreferenceStatistics:
    """Length and duplicate statistics of a set."""
    pairs = [(item, better, worse) for item in items for better, worse in item.preference.pairs]
    count = max(1, len(pairs))
    wins = [item.lengths[b] - item.lengths[w] for item, b, w in pairs]
    orders = [set(item.preference.pairs) for item in items]
    return PreferenceStatistics(
        prompts=len({item.preference.key for item in items}),
        answers=sum(len(item.branches) for item in items),
        pairs=len(pairs),
        ties=sum(item.preference.compared - len(item.preference.pairs) for item in items),
        repeated=len(pairs) - sum(map(len, orders)),
        contradictions=sum(better < worse and (worse, better) in found for found in orders for better, worse in found),
        better=sum(item.lengths[b] for item, b, _ in pairs) / count,
        worse=sum(item.lengths[w] for item, _, w in pairs) / count,
        longer=sum(0.5 if gap == 0 else float(gap > 0) for gap in wins) / count,
        images=sum(bool(item.images) for item in items),
    )
