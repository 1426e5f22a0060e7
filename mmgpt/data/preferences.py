"""What people prefer: prompts with several answers and who won, read from any source.

    SourceConfig -> Row (readers.py, tables.py) -> Preference | Rejected -> RankedItem (ranked.py)

A row is one of these:

    {"chosen": ..., "rejected": ..., "prompt": ...}     texts, messages, or dialogues of hh-rlhf ("\\n\\nHuman: ...");
                                                        without a prompt, it is what both sides begin with
    {"prompt": ..., "answers": [...], "ranks": [...]}   1 is the best, equal ranks are a tie; `completions` for `answers`,
                                                        `scores` or `votes` (more is better) for `ranks`
    {"prompt": ..., "output_1": ..., "output_2": ..., "preference": 1}
                                                        one judge's vote: 1 or 2; the votes on a pair are counted (AlpacaEval)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmgpt.config import SourceConfig
from mmgpt.data.messages import Message, MessageError, Rejected, images_of, normalize, text_of
from mmgpt.data.ranked import Preference, RankedItem, common_prefix, join_prompts, prompt_key, rank_item, ranked_pairs
from mmgpt.data.readers import Row
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import check_counts, conversation, image_reference, read_rows
from mmgpt.data.template import Encoded

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PROMPTS = ("prompt", "instruction", "question", "messages", "conversations")


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
        start = common_prefix(sides)
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
