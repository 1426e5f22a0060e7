"""Answers to many prompts: `python -m mmgpt.answer --model RUN --prompts FILE --out answers.jsonl`.

    a source of any kind -> its prompts -> answers in batches -> one line of JSON each, in the source's order

With one answer a line is a conversation, `{"messages": [...]}`, which `instruct` learns from as it is; with several
(`--samples`) it is `{"prompt": [...], "answers": [...]}`, for people to rank (`python -m mmgpt.label`). A stopped run goes
on behind the lines that are there, and ends with the file that it would have written in one go.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mmgpt.config import SourceConfig
from mmgpt.data.labels import Task, portable
from mmgpt.data.messages import assistant
from mmgpt.data.readers import json_records
from mmgpt.errors import UsageError, UserError, run_cli
from mmgpt.label import CommandLine, number, usable_tasks

EPILOG = """\
Prompts are whatever the stages read (docs/data.md, docs/rlhf.md): conversations and captions without their answers, preferences,
rows with a prompt. A picture inside a table is copied beside the output.

exit codes: 0 done, 1 failure, 2 wrong usage, 130 Ctrl-C (what was answered is on the disk; the same command goes on)."""


class Answerer:
    """Answers of a model to prompts, the same ones for the same settings, however the work is divided.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        import mmgpt

        self.arguments = arguments
        self.model = mmgpt.load(arguments.model, device=arguments.device, precision=arguments.precision)

    def __call__(self, tasks: Sequence[Task], number: int) -> list[list[str]]:
        """The answers to one batch, the `number`-th from 0."""
        arguments = self.arguments
        prompts = [task.messages for task in tasks]
        if arguments.temperature == 0:
            from mmgpt.generate import Sampling

            sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
            found = self.model.generate(prompts, sampling=sampling, batch_size=arguments.batch_size)
            return [[answer.text.strip()] for answer in found]
        from mmgpt.rl.rollout import draw

        drawn = draw(
            self.model, prompts, samples=arguments.samples, max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature, seed=f"{arguments.seed}/{number}", batch_size=arguments.batch_size,
        )  # fmt: skip
        texts = [text.strip() for text in drawn.texts]
        return [texts[start : start + arguments.samples] for start in range(0, len(texts), arguments.samples)]


def answer(arguments: argparse.Namespace) -> None:
    """Answer what is not answered yet."""
    out = Path(arguments.out).absolute()
    if not out.parent.is_dir():
        raise UsageError(f"--out {arguments.out}: there is no folder {out.parent}")
    source = SourceConfig(path=arguments.prompts, split=arguments.split, limit=arguments.limit, question=arguments.question)
    tasks = usable_tasks(source)
    done = _answered(out, tasks)
    if done == len(tasks):
        print(f"all {done} prompts are answered already: {out}", file=sys.stderr)
        return
    answers = Answerer(arguments)
    size = arguments.batch_size
    # What a kill left of a line goes; the batch that it fell into is drawn again, so that it is the same one.
    with open(out, "r+b" if out.exists() else "w+b") as file:
        file.truncate(_end_of(file, done))
        for start in range(done // size * size, len(tasks), size):
            batch = tasks[start : start + size]
            for place, (task, texts) in enumerate(zip(batch, _tried(answers, batch, start // size)), start=start):
                if place >= done:
                    file.write((json.dumps(_row(task, texts, arguments.samples, out), ensure_ascii=False) + "\n").encode())
            file.flush()
            print(f"{min(start + size, len(tasks))} of {len(tasks)} prompts answered", file=sys.stderr, flush=True)
    print(f"{len(tasks)} prompts: {out}", file=sys.stderr)


def _answered(out: Path, tasks: Sequence[Task]) -> int:
    """How many of the prompts, from the first on, the file holds."""
    if not out.exists():
        return 0
    done = 0
    for where, record in json_records(out):
        if not isinstance(record, dict):
            break  # cut off by a kill
        if done == len(tasks) or record.get("id") != tasks[done].id:
            raise UsageError(f"{where}: {out} holds answers to other prompts; --out NAME writes another file")
        done += 1
    return done


def _end_of(file: IO[bytes], lines: int) -> int:
    """Where the first lines of a file end."""
    file.seek(0)
    for _ in range(lines):
        file.readline()
    return file.tell()


def _tried(answers: Answerer, batch: Sequence[Task], number: int) -> list[list[str]]:
    try:
        return answers(batch, number)
    except UserError as error:
        raise type(error)(f"between {batch[0].where} and {batch[-1].where}: {error}") from error


def _row(task: Task, texts: list[str], samples: int, out: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"id": task.id, "where": task.where}
    if samples == 1:
        return {**row, "messages": portable([*task.messages, assistant(texts[0])], out)}
    return {**row, "prompt": portable(task.messages, out), "answers": texts}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UsageError."""
    parser = CommandLine(
        prog="python -m mmgpt.answer",
        description="Let a model answer many prompts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a run, or an exported model")
    add("--prompts", metavar="FILE", required=True, help="a file or folder, or a named data source")
    add("--out", metavar="FILE", required=True, help="answers, in JSON lines")
    add("--split", metavar="NAME", help="only this split of the prompts")
    add("--limit", type=number(int, 1, 10**9), metavar="N", help="only the first N")
    add("--question", default="Describe this image.", metavar="TEXT", help="what to ask of pictures with captions alone")
    add("--samples", type=number(int, 1, 10**4), default=1, metavar="K", help="answers to each (default: 1)")
    add("--temperature", type=number(float, 0, 100), default=0.0, metavar="T", help="0 (default) takes the likeliest tokens")
    add("--max_new_tokens", type=number(int, 1, 10**6), default=128, metavar="N", help="their longest, in tokens (default: 128)")
    add("--batch_size", type=number(int, 1, 10**6), default=32, metavar="N", help="prompts side by side (default: 32)")
    add("--precision", default="auto", help="auto (default), fp32, bf16, fp16, int8")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of what is drawn")
    arguments = parser.parse_args(argv)
    if arguments.samples > 1 and arguments.temperature == 0:
        raise UsageError("--samples needs a --temperature above 0: at 0 all answers are the same")
    if not arguments.out.endswith(".jsonl"):
        raise UsageError(f"--out {arguments.out}: the name must end in .jsonl, by which the stages know how to read it")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    answer(parse_arguments(argv))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
