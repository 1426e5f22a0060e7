"""What people prefer: prompts with several answers and who won, from any source, ready for batches.

    SourceConfig -> Row (readers.py, tables.py) -> Preference | Rejected -> RankedItem -> PreferenceBatch

A row is one of these:

    {"chosen": ..., "rejected": ..., "prompt": ...}     texts, messages, or dialogues of hh-rlhf ("\\n\\nHuman: ...");
                                                        without a prompt, it is what both sides begin with
    {"prompt": ..., "answers": [...], "ranks": [...]}   1 is the best, equal ranks are a tie; `completions` for `answers`,
                                                        `scores` or `votes` (more is better) for `ranks`
    {"prompt": ..., "output_1": ..., "output_2": ..., "preference": 1}
                                                        one judge's vote: 1 or 2; the votes on a pair are counted (AlpacaEval)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mmgpt.config import SourceConfig
from mmgpt.data.images import image_name
from mmgpt.data.messages import Message, MessageError, Rejected, assistant, images_of, normalize, text_of
from mmgpt.data.readers import Row
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import check_counts, conversation, image_reference, read_rows
from mmgpt.data.split import hold_out
from mmgpt.data.template import Encoded

T = TypeVar("T")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
MOST_ANSWERS = 9
"""Answers to a prompt that are learnt from at one time: as many as InstructGPT's labellers ranked (section 3.5)."""
_PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")


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


def read_preferences(source: SourceConfig) -> Iterator[Preference | Rejected]:
    """The preferences of a source, in its order; pairs that several judges voted on come last.

    `limit` counts what can be used. `repeat` is for supervised sources: people do not mean a preference more by its being copied.

    Raises:
        UsageError: where the path, a column, the split is not there.
        UserError: for a file that is broken as a whole.
    """
    check_counts(source)
    if source.path == "letters" and not os.path.exists(source.path):
        from mmgpt.data.letters import rank_letters

        yield from rank_letters(source.split, source.limit or 512)
        return
    if source.candidates:
        from mmgpt.data.candidates import rank_captions

        yield from rank_captions(source)
        return
    votes = _Votes()
    count = 0
    for row in read_rows(source):
        if isinstance(row, Rejected):
            yield row
            continue
        if count == source.limit:
            break
        try:
            found = _preference(row, votes)
        except MessageError as error:
            yield Rejected(error.reason, row.where, str(error))
            continue
        if found is not None:
            count += 1
            yield found
    for judged in votes.counted():
        if isinstance(judged, Preference):
            if count == source.limit:
                break
            count += 1
        yield judged


def _preference(row: Row, votes: _Votes) -> Preference | None:
    """A row's preference; None for a vote, which waits for the others on its pair."""
    fields = row.fields
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        prompt, answers = _two_sides(row)
        return _checked(prompt, answers, [1, 2], row.where)
    if fields.get("output_1") is not None and fields.get("output_2") is not None:
        prompt = _prompt(row, _asked(fields))
        answers = [_text(fields[name]) for name in ("output_1", "output_2")]
        vote = fields.get("preference")
        if vote is not None and not (_is_number(vote) and 0 <= vote <= 2):
            raise MessageError("bad_ranks", f"preference is {str(vote)[:40]!r}, but must be 1 or 2 (1.5 or null for a tie)")
        _checked(prompt, answers, [1, 2], row.where)
        # Numbers between 1 and 2 are how sure a judge was.
        votes.add(prompt, answers, 0.0 if not vote else 1.5 - float(vote), row.where)
        return None
    if (listed := _listed(fields)) is not None:
        return _checked(_prompt(row, _asked(fields)), [_text(answer) for answer in listed], _ranks(fields), row.where)
    wanted = "chosen and rejected, answers and ranks, or output_1, output_2 and preference"
    raise MessageError("no_preference", f"looked for {wanted}; there is {', '.join(map(str, fields)) or 'nothing'}")


def _checked(prompt: list[Message], answers: list[str], ranks: Sequence[float], where: str) -> Preference:
    if len(answers) < 2:
        raise MessageError("one_answer", f"a ranking needs at least two answers, this one has {len(answers)}")
    if len(ranks) != len(answers):
        raise MessageError("bad_ranks", f"{len(answers)} answers, but {len(ranks)} ranks")
    stripped = [answer.strip() for answer in answers]
    if not all(stripped):
        raise MessageError("empty_answer", f"answer {stripped.index('') + 1} of {len(answers)} is empty")
    if len(set(stripped)) < len(stripped):
        raise MessageError("equal_answers", "two answers are the same text: nothing can be preferred")
    pairs = ranked_pairs(ranks)
    if not pairs:
        raise MessageError("only_ties", "every answer has the same rank: nothing is preferred")
    return Preference(prompt, stripped, pairs, math.comb(len(answers), 2), where)


def _ranks(fields: Mapping[str, Any]) -> list[float]:
    for name, sign in (("ranks", 1), ("ranking", 1), ("scores", -1), ("votes", -1)):
        values = fields.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not all(_is_number(value) for value in values):
            raise MessageError("bad_ranks", f"{name} must be a list of numbers, not {str(values)[:60]!r}")
        return [sign * value for value in values]
    raise MessageError("bad_ranks", f"answers without ranks, scores or votes; there is {', '.join(map(str, fields))}")


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs (better, worse) among the answers to one prompt; equal ranks make none.

    Args:
        ranks: One an answer, the smallest is the best.
    """
    order = range(len(ranks))
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i in order for j in order[i + 1 :] if ranks[i] != ranks[j]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Prompts and sides


def asked_in(row: Row) -> list[Message] | None:
    """The prompt of a row that has one: of preferences of any form, or of a `prompt` or `instruction` alone; else None.

    Raises:
        MessageError: it has one that breaks the form.
    """
    fields = row.fields
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        return _two_sides(row)[0]
    if any(fields.get(name) is not None for name in ("prompt", "instruction")):
        return _prompt(row, _asked(fields))
    if any(fields.get(name) is not None for name in ("answers", "completions")) and fields.get("question") is None:
        return _prompt(row, _asked(fields))
    turns = fields.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "user":
        return _prompt(row, turns)
    return None


def answers_in(row: Row) -> list[str]:
    """The answers that a row brings along, in its order, whoever was preferred; none where it has only a prompt.

    Raises:
        MessageError: one of them is neither a text nor one message.
    """
    fields = row.fields
    if fields.get("chosen") is not None and fields.get("rejected") is not None:
        return _two_sides(row)[1]
    if fields.get("output_1") is not None and fields.get("output_2") is not None:
        return [_text(fields[name]) for name in ("output_1", "output_2")]
    return [_text(answer) for answer in _listed(fields) or ()]


def _listed(fields: Mapping[str, Any]) -> list[Any] | None:
    return next((fields[name] for name in ("answers", "completions") if isinstance(fields.get(name), list)), None)


def _asked(fields: Mapping[str, Any]) -> Any:
    for name in _PROMPTS:
        if fields.get(name) is not None:
            return fields[name]
    raise MessageError("empty_prompt", f"no prompt: looked for {', '.join(_PROMPTS)}; there is {', '.join(map(str, fields))}")


def _prompt(row: Row, asked: Any) -> list[Message]:
    """A prompt in canonical form, with the row's images in their places."""
    turns = asked
    if isinstance(asked, str) and _TURN.match(asked):
        turns = _dialogue(asked)
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()  # "\n\nAssistant:" at the end only says whose turn it is
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns.strip()}] if turns.strip() or row.images else []
    if not isinstance(turns, list) or not turns:
        raise MessageError("empty_prompt", "the prompt is empty")
    images = [image_reference(image, row.root) for image in row.images]
    # An answer to stand behind it: a conversation to learn from has one.
    prompt = conversation([*turns, {"role": "assistant", "content": "."}], images, row).messages[:-1]
    if prompt[-1]["role"] != "user":
        raise MessageError("bad_role", f"the prompt ends with {prompt[-1]['role']}; the last to speak must be the user")
    if not any(text_of(message).strip() or images_of([message]) for message in prompt if message["role"] == "user"):
        raise MessageError("empty_prompt", "the user says nothing")
    return prompt


def _two_sides(row: Row) -> tuple[list[Message], list[str]]:
    """Prompt and answers of chosen and rejected, each a text, a dialogue, a message or messages."""
    sides = [row.fields[name] for name in ("chosen", "rejected")]
    sides = [_dialogue(side) if isinstance(side, str) and _TURN.match(side) else side for side in sides]
    sides = [[side] if isinstance(side, Mapping) else side for side in sides]
    has_prompt = any(row.fields.get(name) is not None for name in _PROMPTS)
    if all(isinstance(side, str) for side in sides):
        if has_prompt:
            return _prompt(row, _asked(row.fields)), list(sides)
        start = _common(sides)
        # Whole words only: "re" is no prompt of "red" and "real".
        start = max(sides[0].rfind(space, 0, start) + 1 for space in " \n\t")
        return _prompt(row, sides[0][:start]), [side[start:] for side in sides]
    if not all(isinstance(side, list) and side for side in sides):
        raise MessageError("not_messages", "chosen and rejected must both be texts, or both be non-empty lists of messages")
    starts, ends = [side[:-1] for side in sides], [side[-1] for side in sides]
    for end in ends:
        if not isinstance(end, Mapping) or end.get("role", end.get("from")) not in ("assistant", "gpt"):
            raise MessageError("bad_role", "chosen and rejected must both end with a message of the assistant")
    if starts[0] != starts[1]:
        raise MessageError("prompts_differ", "chosen and rejected differ before their last message")
    asked = _asked(row.fields) if has_prompt else []
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    return _prompt(row, asked + starts[0]), [_text(end) for end in ends]


def _dialogue(text: str) -> list[dict[str, Any]]:
    """hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages; two turns of one speaker in a row are one."""
    pieces = _TURN.split(text)[1:]
    messages: list[dict[str, Any]] = []
    for speaker, said in zip(pieces[::2], pieces[1::2]):
        role, said = _SPEAKERS[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{said}".strip()
        else:
            messages.append({"role": role, "content": said})
    return messages


def _text(answer: Any) -> str:
    """An answer as a text, from a text, a message, or messages of which there is one."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        if "from" in answer:
            answer = answer.get("value")
        else:
            parts = normalize([{"role": "assistant", "content": answer.get("content")}])
            if images_of(parts):
                raise MessageError("bad_part", "an answer holds an image")
            answer = text_of(parts[0])
    if not isinstance(answer, str):
        raise MessageError("bad_part", f"an answer is neither a text nor one message: {str(answer)[:60]!r}")
    return answer


class _Votes:
    """Judges' votes, counted by pair of answers."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, frozenset[str]], tuple[list[Message], list[str], str]] = {}
        self.balance: dict[tuple[str, frozenset[str]], float] = {}

    def add(self, prompt: list[Message], answers: list[str], vote: float, where: str) -> None:
        """One vote: above 0 for the first answer, below for the second, 0 for neither."""
        answers = [answer.strip() for answer in answers]
        key = prompt_key(prompt), frozenset(answers)
        _, first, _ = self.pairs.setdefault(key, (prompt, answers, where))
        self.balance[key] = self.balance.get(key, 0.0) + (vote if first == answers else -vote)

    def counted(self) -> Iterator[Preference | Rejected]:
        for key, (prompt, answers, where) in self.pairs.items():
            if self.balance[key] == 0:
                yield Rejected("only_ties", where, "as many votes for the one answer as for the other")
            else:
                yield Preference(prompt, answers, [(0, 1) if self.balance[key] > 0 else (1, 0)], 1, where)


def side_by_side(preferences: Sequence[Preference]) -> tuple[list[list[Message]], list[str], list[tuple[int, int]]]:
    """All answers of preferences in one list: the prompt of each, its text, and the pairs as places in that list."""
    prompts = [preference.prompt for preference in preferences for _ in preference.answers]
    answers = [answer for preference in preferences for answer in preference.answers]
    starts = itertools.accumulate((len(preference.answers) for preference in preferences), initial=0)
    pairs = [(start + better, start + worse) for start, item in zip(starts, preferences) for better, worse in item.pairs]
    return prompts, answers, pairs


# Prompts as a whole


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


def split_by_prompt(
    items: Sequence[T], share: float, seed: int, key: Callable[[T], str], fold: int = 0
) -> tuple[list[T], list[T]]:
    """Set a share of the prompts aside: no prompt, and no answer to it, is on both sides.

    Args:
        items: What is split.
        share: Of the prompts; at least one, where there are two.
        seed: Draws them.
        key: The prompt of an item (`prompt_key`).
        fold: Which part (`hold_out`).
    """
    held = set(hold_out(map(key, items), share, seed, fold)[1])
    sides: tuple[list[T], list[T]] = ([], [])
    for item in items:
        sides[key(item) in held].append(item)
    return sides


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
    shared = min(_common(ids), min(map(len, ids)) - 1)
    starts = [max(i for i in range(len(cut)) if not whole.supervised[i]) + 1 for cut, whole in zip(ids, encoded)]
    lengths = [len(cut) - start for cut, start in zip(ids, starts)]
    return RankedItem(preference, ids[0][:shared], [answer[shared:] for answer in ids], encoded[0].images, lengths)


def _common(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all sequences begin with."""
    places = enumerate(zip(*sequences))
    return next((place for place, found in places if any(other != found[0] for other in found)), min(map(len, sequences)))


def until_answer_ends(encoded: Encoded) -> list[int]:
    """Ids up to the token that ends the last answer, where its score is read; what a template puts behind it is left out."""
    last = max(place for place, learnt in enumerate(encoded.supervised) if learnt)
    return encoded.ids[: last + 1]


def load_preferences(
    sources: Sequence[SourceConfig],
    encode: Callable[[Sequence[Message]], Encoded],
    *,
    max_length: int,
    report: RejectionReport,
) -> tuple[list[RankedItem], int]:
    """Read sources whole, the comparisons of a prompt in one item (`join_prompts`).

    Returns:
        The usable items, and how many rows there were in all; the others are in `report`.
    """
    found: list[Preference] = []
    total = 0
    for source in sources:
        for preference in read_preferences(source):
            total += 1
            if isinstance(preference, Rejected):
                report.add(preference)
                continue
            # Checked before prompts are joined: one long answer costs its row, not the prompt.
            item = rank_item(preference, encode, max_length)
            if isinstance(item, Rejected):
                report.add(item)
            else:
                found.append(preference)
    joined = [rank_item(preference, encode, max_length) for preference in join_prompts(found)]
    return [item for item in joined if isinstance(item, RankedItem)], total


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
