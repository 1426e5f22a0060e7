"""What a person is asked to judge, and what became of it: rankings, ties and demonstrations in files that the stages read.

SourceConfig -> Row (sources.py) -> Task -> a labeller (label.py) -> Labels -> preferences.py, sources.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgpt.config import SourceConfig
from mmgpt.data.images import image_bytes, image_key
from mmgpt.data.messages import Message, MessageError, Rejected, assistant
from mmgpt.data.preferences import answers_in
from mmgpt.data.prompts import Prompt, prompts_of, read_prompts
from mmgpt.data.readers import json_records
from mmgpt.data.sources import MADE_UP, read_rows
from mmgpt.errors import UserError

TIES = ".ties.jsonl"
"""Ending of the file, beside that of the rankings, with the judgements in which nothing is preferred."""
DEMONSTRATIONS = ".demonstrations.jsonl"
"""Ending of the file, beside that of the rankings, with the answers that the labeller wrote."""


# Rankings


class RankingError(ValueError):
    """Not a ranking: says which part is wrong."""


def parse_ranking(text: str, count: int) -> list[int]:
    """`2 > 1 = 3` -> [2, 1, 2].

    Args:
        text: Numbers of answers from 1, the best first, with `>` (better than) or `=` (as good as) between them.
        count: Answers; each must stand there once.

    Returns:
        The rank of each answer: 1 is the best, equal ranks are a tie, no rank is left out.

    Raises:
        RankingError: names what is wrong.
    """
    tokens = re.findall(r"\d+|\S", text)
    ranks: dict[int, int] = {}
    rank = 1
    for place, token in enumerate(tokens):
        if place % 2:
            if token not in (">", "="):
                raise RankingError(f"after {tokens[place - 1]} comes > or =, not {token}")
            rank += token == ">"
            continue
        if not (token.isascii() and token.isdigit()):
            raise RankingError(f"{token} stands where the number of an answer should be")
        number = int(token) if len(token) < 10 else 0
        if not 1 <= number <= count:
            raise RankingError(f"there is no answer {token[:10]}; they are 1 to {count}")
        if number in ranks:
            raise RankingError(f"answer {number} stands there twice")
        ranks[number] = rank
    if not tokens:
        raise RankingError("nothing was ranked")
    if len(tokens) % 2 == 0:
        raise RankingError(f"after the last {tokens[-1]} the number of an answer is missing")
    if missing := [str(number) for number in range(1, count + 1) if number not in ranks]:
        raise RankingError(f"answer {', '.join(missing)} is missing")
    return [ranks[number] for number in range(1, count + 1)]


def format_ranking(ranks: Sequence[int]) -> str:
    """[2, 1, 2] -> `2 > 1 = 3`."""
    levels = [[str(number) for number, rank in enumerate(ranks, 1) if rank == level] for level in sorted(set(ranks))]
    return " > ".join(" = ".join(level) for level in levels)


# Tasks


@dataclass(frozen=True)
class Task:
    """A prompt to be judged.

    Args:
        messages: A conversation whose next turn is the assistant's.
        answers: Different answers to it, stripped; none where they are still to be drawn.
        where: The row that it came from.
        id: The same for the same text and pictures, wherever these lie.
    """

    messages: list[Message]
    answers: list[str]
    where: str
    id: str

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """Tells what was judged from what was not: of one prompt there may be several sets of answers."""
        return self.id, frozenset(self.answers)


def read_tasks(source: SourceConfig) -> Iterator[Task | Rejected]:
    """The prompts of a source with the answers that stand beside them, in its order; each set of answers once.

    Raises:
        UsageError: where the path, a column, the split is not there.
    """
    seen: set[tuple[str, frozenset[str]]] = set()
    for found, answers in _prompts(source):
        if isinstance(found, Rejected):
            yield found
            continue
        try:
            task = Task(found.messages, different(answers), found.where, prompt_id(found.messages))
        except UserError as error:
            yield Rejected(getattr(error, "reason", "broken_image"), found.where, str(error))
            continue
        if task.key not in seen:
            seen.add(task.key)
            yield task


def _prompts(source: SourceConfig) -> Iterator[tuple[Prompt | Rejected, list[str]]]:
    if source.path in MADE_UP and not os.path.exists(source.path):
        for found in read_prompts(source):
            yield found, []
        return
    count = 0
    for row in read_rows(source):
        if isinstance(row, Rejected):
            yield row, []
            continue
        try:
            answers = answers_in(row)
        except MessageError as error:
            yield Rejected(error.reason, row.where, str(error)), []
            continue
        for found in prompts_of(row, source, 0):
            if count == source.limit:
                return
            count += isinstance(found, Prompt)
            yield found, answers


def prompt_id(messages: Sequence[Message]) -> str:
    """A digest of roles, text and the content of pictures."""
    parts = [
        [
            message["role"],
            *(["image", image_key(p["image"])] if p["type"] == "image" else ["text", p["text"]] for p in message["content"]),
        ]
        for message in messages
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def different(answers: Sequence[str]) -> list[str]:
    """Without those that say nothing, or what another said: nothing can be preferred there."""
    return list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))


# Judgements


class Labels:
    """What one person judged, in three files that only grow: rankings, all ties, demonstrations.

    A ranking without a preference teaches a stage nothing, and would count as a bad sample there; agreement needs it.

    Args:
        path: Of the rankings; the others lie beside it.
        labeller: Who judges.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, path: Path, labeller: str):
        self.path = path
        self.labeller = labeller
        self.broken: list[str] = []
        self._judged: set[tuple[str, frozenset[str]]] = set()
        for ending in (".jsonl", TIES, DEMONSTRATIONS):
            if (file := self._file(ending)).is_file():
                for where, record in json_records(file):
                    self._note(where, record)

    def _file(self, ending: str) -> Path:
        return self.path if ending == ".jsonl" else self.path.with_name(self.path.stem + ending)

    def _note(self, where: str, record: Any) -> None:
        if not isinstance(record, dict):
            self.broken.append(where)
        elif record.get("labeller") == self.labeller:
            self._judged.add((str(record.get("id")), frozenset(record.get("given") or ())))

    def __contains__(self, task: Task) -> bool:
        return task.key in self._judged

    def rank(self, task: Task, answers: Sequence[str], order: Sequence[int], ranks: Sequence[int], drawn: dict[str, Any]) -> None:
        """Save a ranking.

        Args:
            task: What was asked.
            answers: In the order of their source.
            order: Which of them stood in the first place, the second, ...: shows whether a place is preferred.
            ranks: Of the answers as they were shown.
            drawn: How the answers came about, where a model gave them.
        """
        by_answer = [ranks[order.index(number)] for number in range(len(answers))]
        record = {"answers": list(answers), "ranks": by_answer, "order": list(order), **drawn}
        ending = ".jsonl" if len(set(ranks)) > 1 else TIES
        self._append(ending, task, {"prompt": self._portable(task.messages), **record})

    def demonstrate(self, task: Task, text: str) -> None:
        """Save an answer that the labeller wrote."""
        self._append(DEMONSTRATIONS, task, {"messages": self._portable([*task.messages, assistant(text)])})

    def _append(self, ending: str, task: Task, judgement: dict[str, Any]) -> None:
        record = {"id": task.id, "labeller": self.labeller, "where": task.where, **judgement, "given": task.answers}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        file = self._file(ending)
        try:
            with open(file, "a+b", buffering=0) as stream:
                # Behind a line that a crash cut off, a new one begins.
                if stream.seek(0, os.SEEK_END):
                    stream.seek(-1, os.SEEK_END)
                    line = line if stream.read(1) == b"\n" else b"\n" + line
                if stream.write(line) != len(line):
                    raise OSError("no space left")
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror or error}; this judgement is not saved") from error
        self._judged.add(task.key)

    def _portable(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return portable(messages, self.path)

    def picture(self, image: Any) -> Path:
        """Where a picture lies (`picture_beside`)."""
        return picture_beside(image, self.path)


# Pictures


def portable(messages: Sequence[Message], file: Path) -> list[dict[str, Any]]:
    """Messages as JSON has them: pictures as paths that start from the folder of the file they are written to."""
    result = []
    for message in messages:
        parts = [
            {"type": "image", "image": os.path.relpath(picture_beside(part["image"], file), file.parent)}
            if part["type"] == "image"
            else dict(part)
            for part in message["content"]
        ]
        result.append({"role": message["role"], "content": parts})
    return result


def picture_beside(image: Any, file: Path) -> Path:
    """Where a picture lies; one inside a table or an archive, or made up, is copied to a folder beside a file first."""
    if isinstance(image, str | Path):
        return Path(image)
    content = image_bytes(image)
    path = file.with_name(f"{file.stem}.images") / f"{image_key(image)[:32]}{'.png' if content is None else ''}"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                image.save(path)
            else:
                path.write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
