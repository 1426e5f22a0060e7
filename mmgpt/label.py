"""`python -m mmgpt.label`: people say which answer is better, as InstructGPT's labellers did (Ouyang et al. 2022, section 3.4).

    python -m mmgpt.label --prompts prompts.jsonl --output labels.jsonl --labeller anna                answers stand in the file
    python -m mmgpt.label --prompts prompts.jsonl --output labels.jsonl --model runs/rlhf-text --samples 4   the model draws them
    python -m mmgpt.label --agreement anna.jsonl ben.jsonl

A prompt is shown, and where its pictures are, then its answers in random order. Typed are:

    2 > 1 = 3 > 4     a ranking, best first, `=` for a tie; every answer once
    d TEXT            an answer of one's own, written better (a demonstration)
    s                 skip        q   stop; what was judged is kept

The output is JSON lines: {"prompt", "answers", "ranks", "labeller", "order"} is what `data.train` of a reward model reads,
{"messages", "labeller"} what one of a supervised model reads. A prompt that this labeller judged in this file is not shown again.
`order` is the order of showing, so that a preference for what comes first can be looked for.

Exit codes: 0 done, 1 failure, 2 wrong usage, 130 Ctrl-C (what was judged is kept).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mmgpt.config import SourceConfig
from mmgpt.data.images import image_name
from mmgpt.data.messages import Message, MessageError, Rejected, images_of, text_of
from mmgpt.data.preferences import prompt_key
from mmgpt.data.prompts import Prompt, read_prompts
from mmgpt.data.readers import json_records
from mmgpt.errors import UsageError, UserError, run_cli, write_output


@dataclass(frozen=True)
class Task:
    """A prompt with the answers to rank."""

    prompt: Prompt
    answers: list[str]


# Rankings


def parse_ranking(text: str, count: int) -> list[int]:
    """`2 > 1 = 3` -> the rank of each answer in its place, 1 the best: [2, 1, 2].

    Args:
        text: What was typed.
        count: Answers there are.

    Raises:
        ValueError: says what is wrong with it.
    """
    places = [[part.strip() for part in group.split("=")] for group in text.split(">")]
    numbers = [part for group in places for part in group]
    if "" in numbers:
        raise ValueError(f"a number is missing; write for example {' > '.join(map(str, range(1, count + 1)))}")
    if wrong := next((part for part in numbers if not re.fullmatch(r"[0-9]+", part)), None):
        raise ValueError(f"{wrong!r} is no number of an answer")
    found = [int(part) for part in numbers]
    if outside := [number for number in found if not 1 <= number <= count]:
        raise ValueError(f"there is no answer {outside[0]}: they are 1 to {count}")
    if twice := [number for number in found if found.count(number) > 1]:
        raise ValueError(f"answer {twice[0]} stands there twice")
    if missing := [number for number in range(1, count + 1) if number not in found]:
        raise ValueError(f"answer {missing[0]} is missing; every answer needs its place")
    ranks = [0] * count
    for rank, group in enumerate(places, start=1):
        for part in group:
            ranks[int(part) - 1] = rank
    return ranks


def format_ranking(ranks: Sequence[int]) -> str:
    """The ranking that `parse_ranking` reads as these ranks."""
    groups: dict[int, list[str]] = {}
    for number, rank in enumerate(ranks, start=1):
        groups.setdefault(rank, []).append(str(number))
    return " > ".join(" = ".join(groups[rank]) for rank in sorted(groups))


# What there is to judge


def read_tasks(source: SourceConfig) -> tuple[list[Task], list[Rejected]]:
    """Prompts of a source; where its rows hold `answers` (or `completions`), with them."""
    answers: dict[str, list[str]] = {}
    if os.path.isfile(source.path):
        for where, record in json_records(Path(source.path)):
            listed = record.get("answers", record.get("completions")) if isinstance(record, dict) else None
            if isinstance(listed, list):
                answers[where] = list(dict.fromkeys(text.strip() for text in listed if isinstance(text, str) and text.strip()))
    tasks, rejected, seen = [], [], set()
    for found in read_prompts(source):
        if isinstance(found, Rejected):
            rejected.append(found)
        elif (key := prompt_key(found.messages)) not in seen:
            seen.add(key)
            tasks.append(Task(found, answers.get(found.where, [])))
    return tasks, rejected


def draw_answers(tasks: Sequence[Task], model_path: str, samples: int, *, seed: int, max_new_tokens: int) -> Iterator[Task]:
    """The tasks with answers that a model draws, a few prompts at a time so that nobody waits for all of them."""
    from mmgpt.model.multimodal import MultimodalGPT
    from mmgpt.rl.rollout import draw

    model = MultimodalGPT.from_pretrained(model_path)
    for start in range(0, len(tasks), 4):
        part = tasks[start : start + 4]
        prompts = [task.prompt.messages for task in part]
        drawn = draw(model, prompts, samples=samples, max_new_tokens=max_new_tokens, seed=f"{seed}/{start}")
        for number, task in enumerate(part):
            texts = (text.strip() for text in drawn.texts[number * samples : (number + 1) * samples])
            yield Task(task.prompt, [*task.answers, *dict.fromkeys(text for text in texts if text)])


# Labels


class Labels:
    """The labels of a file, to which judgements are added one whole line at a time.

    Args:
        path: The file; need not be there yet.
        labeller: Who judges.

    Raises:
        UserError: it holds something else.
    """

    def __init__(self, path: Path, labeller: str):
        self.path, self.labeller = path, labeller
        self.done = {key for key, row in read_labels(path) if row.get("labeller") == labeller} if path.exists() else set()

    def add(self, prompt: Prompt, row: dict[str, Any]) -> None:
        """Write a judgement down, to the disk and not just to its cache. Raises UserError where the disk refuses."""
        line = json.dumps({**row, "labeller": self.labeller, "key": prompt_key(prompt.messages)}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; make room, then start again") from error
        self.done.add(prompt_key(prompt.messages))


def read_labels(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key of the prompt, and row. Raises UserError for a file that holds something else, with the line."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    for where, row in json_records(path):
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise UserError(f"{where} is no label of this tool; name another file, or move this one away")
        yield row["key"], row


def portable(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A prompt as JSON: pictures by their paths."""
    rows = []
    for message in messages:
        parts = [
            {"type": "image", "image": image_name(part["image"])} if part["type"] == "image" else dict(part)
            for part in message["content"]
        ]
        rows.append({"role": message["role"], "content": parts})
    return rows


# The conversation with the labeller


def show(task: Task, shown: Sequence[str], number: int, total: int) -> None:
    """Print a prompt, where its pictures are, and its answers."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    console.rule(f"{number} of {total}")
    for message in task.prompt.messages:
        for image in images_of([message]):
            console.print(Text(f"picture: {image_name(image)}", style="cyan"), soft_wrap=True)
        console.print(Text(f"{message['role']}: {text_of(message)}", style="bold"))
    for place, answer in enumerate(shown, start=1):
        console.print(Panel(Text(answer), title=f"{place}", title_align="left"))


def ask(count: int) -> str | None:
    """A line of the labeller's; None where there is no more."""
    choices = "a ranking such as 2 > 1 = 3, " if count > 1 else ""
    if sys.stdin.isatty():
        print(f"{choices}d TEXT, s, q: ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def judge(task: Task, labels: Labels, number: int, total: int, seed: int) -> bool:
    """Show a task until it is judged or skipped. Returns whether to go on."""
    order = list(range(len(task.answers)))
    random.Random(f"{seed}/{labels.labeller}/{prompt_key(task.prompt.messages)}").shuffle(order)
    shown = [task.answers[place] for place in order]
    show(task, shown, number, total)
    while True:
        typed = ask(len(shown))
        if typed is None or typed == "q":
            return False
        if typed == "s":
            return True
        if typed.startswith("d ") and typed[2:].strip():
            answer = {"role": "assistant", "content": [{"type": "text", "text": typed[2:].strip()}]}
            labels.add(task.prompt, {"messages": [*portable(task.prompt.messages), answer]})
            return True
        try:
            if len(shown) < 2:
                raise ValueError("there are not two answers to rank: d TEXT writes one, s skips")
            ranks = parse_ranking(typed, len(shown))
        except ValueError as error:
            print(f"not understood: {error}", file=sys.stderr, flush=True)
            continue
        # Answers and ranks in the order of the source, so that two labellers' lines can be compared.
        own = [ranks[order.index(place)] for place in range(len(order))]
        row = {"prompt": portable(task.prompt.messages), "answers": task.answers, "ranks": own}
        labels.add(task.prompt, {**row, "order": [place + 1 for place in order]})
        return True


# Two people


@dataclass(frozen=True)
class Agreement:
    """How two labellers judged the pairs of answers that both saw.

    Args:
        prompts: Prompts that both ranked, with the same answers.
        table: table[a][b], pairs that the one called a and the other b: 0 the first is better, 1 a tie, 2 the second is.
    """

    prompts: int
    table: list[list[int]]

    @property
    def pairs(self) -> int:
        return sum(map(sum, self.table))

    @property
    def share(self) -> float:
        """Of the pairs that were judged alike; InstructGPT's labellers reached 73 % (section 3.4)."""
        return sum(self.table[i][i] for i in range(3)) / max(1, self.pairs)

    @property
    def kappa(self) -> float:
        """Agreement beyond chance, with 1 for all of it (Cohen 1960); 0 where chance explains everything."""
        n = max(1, self.pairs)
        rows = [sum(row) / n for row in self.table]
        columns = [sum(row[i] for row in self.table) / n for i in range(3)]
        chance = sum(a * b for a, b in zip(rows, columns))
        return (self.share - chance) / (1 - chance) if chance < 1 else 0.0

    def __str__(self) -> str:
        ties = sum(self.table[1]) + sum(row[1] for row in self.table)
        decided = [self.table[i][j] for i in (0, 2) for j in (0, 2)]
        alike = (self.table[0][0] + self.table[2][2]) / max(1, sum(decided))
        return (
            f"{self.prompts} prompts that both ranked, {self.pairs} pairs of answers: {self.share:.1%} judged alike, kappa "
            f"{self.kappa:.2f}; {ties} ties; of the {sum(decided)} pairs that neither called a tie, {alike:.1%} alike"
        )


def compare(one: Path, other: Path) -> Agreement:
    """The agreement of two files of labels."""
    rankings: list[dict[str, dict[str, int]]] = []
    for path in (one, other):
        rankings.append(
            {key: dict(zip(row["answers"], row["ranks"])) for key, row in read_labels(path) if isinstance(row.get("ranks"), list)}
        )
    table = [[0, 0, 0] for _ in range(3)]
    prompts = 0
    for key, first in rankings[0].items():
        second = rankings[1].get(key, {})
        common = [answer for answer in first if answer in second]
        prompts += len(common) > 1
        for a, b in combinations(common, 2):
            table[_verdict(first[a], first[b])][_verdict(second[a], second[b])] += 1
    return Agreement(prompts, table)


def _verdict(a: int, b: int) -> int:
    return 1 if a == b else 0 if a < b else 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmgpt.label",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--prompts", metavar="SOURCE", help="a file of prompts, or any source that training reads")
    parser.add_argument("--split", help="rows of the source with this split")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines, added to")
    parser.add_argument("--labeller", default=os.environ.get("USER") or "anonymous", help="who judges (default: the user's name)")
    parser.add_argument("--model", metavar="RUN", help="draws answers")
    parser.add_argument("--samples", type=int, default=4, help="answers that it draws to a prompt (default: 4)")
    parser.add_argument("--max_new_tokens", type=int, default=96, help="tokens of an answer (default: 96)")
    parser.add_argument("--limit", type=int, help="prompts at most")
    parser.add_argument("--seed", type=int, default=0, help="of answers and order")
    parser.add_argument("--agreement", nargs=2, type=Path, metavar="FILE", help="how far two files of labels agree")
    settings = parser.parse_args(arguments)
    if settings.agreement:
        write_output(f"{compare(*settings.agreement)}\n")
        return 0
    if not settings.prompts or not settings.output:
        raise UsageError("give --prompts SOURCE and --output FILE, or --agreement FILE FILE")
    labels = Labels(settings.output, settings.labeller)
    try:
        tasks, rejected = read_tasks(SourceConfig(path=settings.prompts, split=settings.split))
    except MessageError as error:
        raise UserError(f"{settings.prompts}: {error}") from error
    for sample in rejected[:3]:
        print(f"left out: {sample.where}: {sample.detail}", file=sys.stderr)
    if len(rejected) > 3:
        print(f"left out: {len(rejected) - 3} more", file=sys.stderr)
    left = [task for task in tasks if prompt_key(task.prompt.messages) not in labels.done][: settings.limit]
    if settings.model is None and not any(len(task.answers) > 1 for task in left) and left:
        print("no answers in the source, and no --model to draw them: d TEXT writes demonstrations", file=sys.stderr)
    begun = len(labels.done)
    stream: Iterator[Task] = iter(left)
    if settings.model is not None and left:
        drawing = {"seed": settings.seed, "max_new_tokens": settings.max_new_tokens}
        stream = draw_answers(left, settings.model, settings.samples, **drawing)
    for number, task in enumerate(stream, start=1):
        if not judge(task, labels, number, len(left), settings.seed):
            break
    judged = len(labels.done) - begun
    print(f"{judged} judged, {len(labels.done)} of {len(tasks)} in all, in {settings.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
