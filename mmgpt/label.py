"""Rank answers, or write better ones, at the terminal: `python -m mmgpt.label --labeller ann --prompts FILE`.

    prompts with answers, or answers drawn from a model -> shown in random order -> ranking or demonstration -> one line of JSON

What is written is read by the stages as it is: rankings by `reward` and `preference`, demonstrations by `instruct`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from mmgpt.config import SourceConfig
from mmgpt.data.labels import Labels, RankingError, Task, different, format_ranking, parse_ranking, read_tasks
from mmgpt.data.messages import Rejected
from mmgpt.data.ranked import MOST_ANSWERS
from mmgpt.errors import UsageError, UserError, run_cli
from mmgpt.evaluate.agreement import compare, read_judgements

HELP = """\
2 > 1 = 3     answer 2 is the best, 1 and 3 are equally good; every answer once
d TEXT        write the answer yourself; d alone: several lines, the last of them a single dot
s             skip this prompt; it comes again next time
q             leave (so does Ctrl-D); what was judged is saved already"""

EPILOG = """\
FILE holds one JSON object a line: {"prompt": "..."} or {"messages": [...]}, with images where there are any, and with "answers"
to be ranked, or without (--model draws them then). Whatever the stages read will do, too (docs/data.md, docs/rlhf.md).

exit codes: 0 done or left, 1 failure, 2 wrong usage, 130 Ctrl-C. Judgements are on the disk as soon as they are made."""


def drawer(args: argparse.Namespace) -> Callable[[Task], list[str]]:
    """Draws the answers to a prompt; the same ones for the same prompt and seed, whatever was asked before."""
    import mmgpt
    from mmgpt.rl.rollout import draw

    model = mmgpt.load(args.model, device=args.device)

    def answers(task: Task) -> list[str]:
        drawn = draw(
            model, [task.messages], samples=args.samples, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            seed=f"{args.seed}/{task.id}",
        )  # fmt: skip
        return different(drawn.texts)

    return answers


# The conversation with the labeller


def visible(text: str) -> str:
    """A text whose control characters are seen instead of obeyed: an answer could clear the screen, or colour itself."""
    return "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text)


def show(console: Console, labels: Labels, task: Task, shown: Sequence[str], title: str) -> None:
    """Print a prompt, and the answers in the order that the labeller sees."""
    console.rule(visible(title), style="dim")
    for message in task.messages:
        console.print(Text(message["role"], style="bold"), soft_wrap=True)
        for part in message["content"]:
            if part["type"] == "image":
                console.print(Text(f"[picture: {visible(str(labels.picture(part['image'])))}]", style="cyan"), soft_wrap=True)
            else:
                console.print(Text(visible(part["text"])), soft_wrap=True)
    for number, answer in enumerate(shown, start=1):
        console.print(Text.assemble("\n", (f"{number}. ", "bold green"), visible(answer)), soft_wrap=True)
    console.print()


def read_line(prompt: str) -> str:
    """One line of the labeller's. Raises EOFError at the end."""
    while True:
        line = input(prompt)
        if not any("\ud800" <= char <= "\udfff" for char in line):
            return line
        print("this line is not UTF-8 text; please write it again")


def read_text() -> str:
    """Lines up to a single dot, or to the end of the input."""
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        while (line := read_line("... ")) != ".":
            lines.append(line)
    return "\n".join(lines).strip()


def judge(labels: Labels, task: Task, answers: Sequence[str], order: Sequence[int], drawn: dict[str, Any]) -> str:
    """Ask until there is a judgement, and save it.

    Returns:
        `ranked`, `demonstrated` or `skipped`.

    Raises:
        EOFError: the labeller leaves.
    """
    rankable = len(answers) > 1
    while True:
        line = read_line("ranking, d, s, q or h> " if rankable else "d, s, q or h> ").strip()
        command, _, rest = line.partition(" ")
        if line == "q":
            raise EOFError
        if line == "s":
            return "skipped"
        if line in ("h", "?"):
            print(HELP)
        elif command == "d":
            if text := rest.strip() or read_text():
                labels.demonstrate(task, text)
                return "demonstrated"
            print("nothing was written")
        elif not rankable:
            print("there are not two different answers to rank: d writes one, s skips the prompt")
        elif line:
            try:
                ranks = parse_ranking(line, len(answers))
            except RankingError as error:
                print(f"{visible(str(error))}; for example: {format_ranking(range(1, len(answers) + 1))} (h: help)")
                continue
            labels.rank(task, answers, order, ranks, drawn)
            print(f"saved: {format_ranking(ranks)}")
            return "ranked"


def label(args: argparse.Namespace) -> None:
    """Show what is not judged yet, one prompt after another."""
    out = Path(args.out or f"labels-{args.labeller}.jsonl").absolute()
    if not out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {out.parent}")
    tasks = _usable(args)
    labels = Labels(out, args.labeller)
    for where in labels.broken:
        print(f"{where}: a broken line is left as it is; the stages will count it as a bad sample", file=sys.stderr)
    left = [task for task in tasks if task not in labels]
    print(f"{len(tasks)} prompts, {len(tasks) - len(left)} of them judged by {args.labeller}; h shows the commands")
    draw_answers = drawer(args) if left and args.model else None
    console = Console(highlight=False, markup=False, emoji=False)
    counts = dict.fromkeys(("ranked", "demonstrated", "skipped"), 0)
    try:
        for number, task in enumerate(left, start=1):
            answers, drawn = task.answers, {}
            if draw_answers is not None and not answers:
                try:
                    answers = draw_answers(task)
                except UserError as error:
                    print(f"{task.where}: left out, the model cannot answer it: {error}", file=sys.stderr)
                    continue
                drawn = {"model": str(args.model), "seed": args.seed, "temperature": args.temperature}
            order = list(range(len(answers)))
            random.Random(f"{args.seed}/{args.labeller}/{task.id}").shuffle(order)
            show(console, labels, task, [answers[place] for place in order], f"{number} of {len(left)}: {task.where}")
            counts[judge(labels, task, answers, order, drawn)] += 1
    except EOFError:
        print()
    finally:
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        print(f"{told}; {out}", flush=True)


def _usable(args: argparse.Namespace) -> list[Task]:
    tasks = usable_tasks(SourceConfig(path=args.prompts, split=args.split, limit=args.limit))
    if not args.model and not any(len(task.answers) > 1 for task in tasks):
        raise UsageError(f"{args.prompts} has no answers to rank; --model RUN draws them")
    return tasks


def usable_tasks(source: SourceConfig) -> list[Task]:
    """The prompts of a source; what is left out is said on stderr. Raises UserError where none remains."""
    tasks = []
    for item in read_tasks(source):
        if isinstance(item, Rejected):
            print(f"{item.where}: left out: {item.detail}", file=sys.stderr)
        else:
            tasks.append(item)
    if not tasks:
        raise UserError(f"no usable prompt in {source.path}")
    return tasks


# Arguments


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaints are a `UsageError`."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message)


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """The type of an argument that is a number within bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
            )
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UsageError."""
    parser = CommandLine(
        prog="python -m mmgpt.label",
        description="Rank answers, or write better ones, at the terminal.",
        epilog=f"{HELP}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--labeller", metavar="NAME", help="who judges: letters, digits, . _ -")
    add("--prompts", metavar="FILE", help="a file or folder, or a named data source")
    add("--split", metavar="NAME", help="only this split of it")
    add("--limit", type=number(int, 1, 10**9), metavar="N", help="only its first N prompts")
    add("--out", metavar="FILE", help="rankings, in JSON lines (default: labels-NAME.jsonl)")
    add("--model", metavar="RUN", help="draws the answers to prompts that have none: a run, or an exported model")
    add("--samples", type=number(int, 2, MOST_ANSWERS), default=4, metavar="K", help="answers to draw (default: 4)")
    add("--temperature", type=number(float, 1e-3, 100), default=1.0, metavar="T", help="at which they are drawn (default: 1)")
    add("--max_new_tokens", type=number(int, 1, 10**6), default=128, metavar="N", help="their longest, in tokens (default: 128)")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="of what is drawn, and of the order it is shown in",
    )
    add("--agreement", nargs=2, metavar=("A", "B"), help="instead: how far the people of two files agree")
    args = parser.parse_args(argv)
    if args.agreement is None:
        if not args.prompts or not args.labeller:
            raise UsageError("--prompts and --labeller are needed (or --agreement A B)")
        if not re.fullmatch(r"[\w.-]+", args.labeller):
            raise UsageError(f"--labeller {args.labeller!r}: letters, digits, . _ - only, as it becomes part of a file name")
        if args.out and not args.out.endswith(".jsonl"):
            raise UsageError(f"--out {args.out}: the name must end in .jsonl, by which the stages know how to read it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.agreement is not None:
        counted = compare(*(read_judgements(Path(path)) for path in args.agreement))
        if not counted.pairs:
            raise UserError(f"{' and '.join(args.agreement)} share no pair of answers: agreement needs prompts that both judged")
        print(counted)
        return 0
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        # A text may hold characters that the terminal's encoding lacks.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    label(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
