"""`python -m safety [FILE ...]`: judge lines of text, from files or stdin.

Without options each line of input gives one line of JSON, in order: the verdict. As many lines as have arrived are judged
together, so that a pipe gets its answers at once and a file is read in batches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from safety import __version__
from safety.filter import Filter
from safety.verdict import MAX_BYTES, POINTS, Verdict

EPILOG = """\
verdict: {"line", "sensitive", "score", "reason", "categories", "span", "view", "operating_point", "model"}; "span" counts the
characters of the text that fired, "reason" is "clear" or a code that says why not. A line that cannot be judged is sensitive.

exit codes:
  0  every line was judged, whatever the verdicts
  1  failure: a file cannot be read, or the output not written
  2  wrong usage
  3  the filter cannot be used (weights missing, altered, ...): every line was blocked

examples:
  cat prompts.txt | python -m safety
  python -m safety --field prompt --pass --rejected blocked.jsonl requests.jsonl > allowed.jsonl
  python -m safety --field messages chat.jsonl
"""

READ = 1 << 16  # bytes of input that are judged together at most


class UsageError(Exception):
    """Wrong usage."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UsageError."""
    parser = _Parser(
        prog="python -m safety",
        description="Say of each line whether it is sensitive and should not be answered.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="files to read, - is stdin (default)")
    add("--field", metavar="NAME", help="lines are JSON objects; judge this field: a text, or a list of messages")
    add("--pass", dest="only_pass", action="store_true", help="write the lines that are allowed, unchanged, instead of verdicts")
    add("--rejected", metavar="FILE", help="write the other lines, unchanged, to this file")
    add("--operating_point", choices=POINTS, default="balanced", help="how much is blocked (default: balanced)")
    add("--weights", metavar="FOLDER", help="weights of your own training")
    add("--version", action="version", version=__version__)
    args = parser.parse_args(argv)
    args.files = args.files or ["-"]
    if args.files.count("-") > 1:
        raise UsageError("- is given twice, but stdin can be read only once")
    for name in args.files:
        if name != "-" and not Path(name).is_file() and not Path(name).is_fifo():
            raise UsageError(f"there is no file {name}")
        if name != "-" and args.rejected and Path(args.rejected).exists() and Path(args.rejected).samefile(name):
            raise UsageError(f"--rejected would overwrite {name}, which is read")
    return args


class Lines:
    """Lines of a binary stream as they come, in lists; of a line that is too long to be judged only the size is kept."""

    def __init__(self, read: Callable[[int], bytes], overflow: Callable[[bytes], None]) -> None:
        self.read, self.overflow = read, overflow

    def __iter__(self) -> Iterator[list[bytes | None]]:
        """Lists of lines with their line ends; None is a line of `MAX_BYTES` or more, which went to `overflow`."""
        parts: list[bytes] = []
        size = 0
        while True:
            data = self.read(READ)
            if not data:
                break
            batch: list[bytes | None] = []
            *whole, rest = data.split(b"\n")
            for line in whole:
                line += b"\n"
                if size + len(line) > MAX_BYTES:
                    self._spill(parts, line)
                    batch.append(None)
                else:
                    batch.append(b"".join(parts) + line if parts else line)
                parts, size = [], 0
            if rest:
                size += len(rest)
                parts.append(rest)
                if size > MAX_BYTES:
                    self._spill(parts, b"")
                    parts = []
            yield batch
        if size > MAX_BYTES:
            yield [None]
        elif parts:
            yield [b"".join(parts)]

    def _spill(self, parts: list[bytes], line: bytes) -> None:
        for part in (*parts, line):
            self.overflow(part)


def text_of(line: bytes, field: str | None) -> tuple[Any, str]:
    """The text of a line, and a reason code where there is none."""
    try:
        text = line.rstrip(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    if field is None:
        return text, ""
    try:
        return json.loads(text)[field], ""
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None, "bad_line"


def judge(found: Filter, lines: Sequence[bytes | None], field: str | None) -> list[Verdict]:
    """The verdicts on some lines, in order."""
    verdicts: list[Verdict | None] = []
    texts: list[Any] = []
    for line in lines:
        text, reason = (None, "too_long") if line is None else text_of(line, field)
        if reason:
            verdicts.append(found.blocked(found.problem or reason))
        elif isinstance(text, list):
            verdicts.append(found.check_conversation(text))
        else:
            verdicts.append(None)
            texts.append(text)
    judged = iter(found.check_batch(texts))
    return [next(judged) if verdict is None else verdict for verdict in verdicts]


def run(argv: Sequence[str] | None) -> int:
    """Judge all input; the exit code."""
    args = parse_arguments(argv)
    found = Filter(args.operating_point, weights=args.weights)
    if found.problem:
        print(f"error: {found.problem}: {found.detail}; every line is blocked", file=sys.stderr)
    out = sys.stdout.buffer
    with contextlib.ExitStack() as stack:
        rejected: IO[bytes] | None = stack.enter_context(open(args.rejected, "wb")) if args.rejected else None
        advance = stack.enter_context(_progress(args.files))

        def refuse(data: bytes) -> None:
            if rejected is not None:
                rejected.write(data)

        number = 0
        for name in args.files:
            source = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
            read: Callable[[int], bytes] = getattr(source, "read1", source.read)
            for lines in Lines(read, refuse):
                for line, verdict in zip(lines, judge(found, lines, args.field)):
                    number += 1
                    if not args.only_pass:
                        out.write(json.dumps({"line": number, **verdict.to_json()}).encode("ascii") + b"\n")
                    if line is not None and verdict.sensitive:
                        refuse(line)
                    elif line is not None and args.only_pass:
                        out.write(line)
                out.flush()
                if rejected is not None:
                    rejected.flush()
                advance(sum(MAX_BYTES if line is None else len(line) for line in lines))
    return 3 if found.problem else 0


@contextlib.contextmanager
def _progress(files: Sequence[str]) -> Iterator[Callable[[int], None]]:
    """A progress bar over files where a person watches, and rich is there to draw it."""
    try:
        if "-" in files or not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda size: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("judging", total=sum(os.path.getsize(name) for name in files))
        yield lambda size: progress.advance(task, size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what goes wrong becomes a message and an exit code."""
    try:
        return run(argv)
    except UsageError as error:
        print(f"error: {error} (--help shows how)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`); nothing more can be said, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
