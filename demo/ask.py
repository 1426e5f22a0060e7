"""Ask a trained model about pictures: `python demo/ask.py --image photo.jpg "What fruit is this?"`.

    arguments -> pictures -> gate -> is the question allowed? -> model -> gate -> what is allowed of the answer

Each step starts when the one before has succeeded, so that a typing error is answered at once and a refusal costs no
model; torch is imported with the model. The gate is no option: without one that works, nothing is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
_found = importlib.util.find_spec("demo")
if importlib.util.find_spec("mmgpt") is None or _found is None or Path(_found.origin or "").parent != REPOSITORY / "demo":
    # Started from a checkout that is not installed, or with another package called demo in sight.
    sys.path.insert(0, str(REPOSITORY))

from demo.guard import Answer, GateError, build_gate, check_prompt, described, gated_answer  # noqa: E402
from mmgpt.errors import OutputError, UsageError, UserError, run_cli, write_output  # noqa: E402

if TYPE_CHECKING:
    from mmgpt.data.messages import Message

DESCRIBE = "Describe this image."
MAX_STDIN_BYTES = 256 * 2**20

NO_MODEL = """no trained model that accepts images in {folders}
train one with
    python -m mmgpt.train
(the quickstart: some minutes on two CPU cores), or name one with --model"""

EPILOG = """\
without a question: on a terminal a chat (/help lists its commands), otherwise "Describe this image."
the answer goes to stdout, everything else to stderr.

exit codes:
  0  answered, or refused by the gate
  1  failure: a broken picture, a question longer than the model's window, ...
  2  wrong usage: unknown argument, a picture or model that is not there, nothing to ask
  3  the gate is broken: nothing that it had not cleared was shown

examples:
  python demo/ask.py --image photo.jpg "What fruit is this?"
  python demo/ask.py --image a.png --image b.png "What differs?"
  curl -s https://example.org/photo.jpg | python demo/ask.py --image - --json
"""

CHAT_HELP = """\
/image PATH   show a picture with the next question
/reset        forget the conversation
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


# Arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message)


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Raises UsageError."""
    parser = _Parser(
        prog="ask.py",
        description="Ask a trained model about pictures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    at_least_one = _number(int, 1, 10**6, "a whole number from 1 to 1000000")
    top_p = _number(float, 1e-6, 1, "a number above 0, up to 1")
    temperature = _number(float, 0, 100, "a number from 0 to 100")
    seed = _number(int, 0, 2**63 - 1, "a whole number from 0")
    add = parser.add_argument
    add("question", nargs="?", help="what to ask")
    add("--image", action="append", default=[], metavar="PATH", help="a picture, repeatable; - is stdin")
    add("--model", metavar="FOLDER", help="a run or an exported model (default: the newest that accepts images)")
    add("--json", action="store_true", help="one line of JSON instead of streamed text")
    add("--max_new_tokens", type=at_least_one, metavar="N", help="longest answer in tokens")
    add("--temperature", type=temperature, metavar="T", help="0 (default) is greedy")
    add("--top_p", type=top_p, metavar="P", help="sample from the most likely tokens that make up P")
    add("--seed", type=seed, metavar="N", help="repeats a sampled answer")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    formats = ("auto", "fp32", "bf16", "fp16", "int8")
    add("--precision", default="auto", choices=formats, help="default: auto, bf16 where the machine has it, else fp32")
    args = parser.parse_args(argv)
    if args.image.count("-") > 1:
        raise UsageError("--image - is given twice, but stdin can be read only once")
    return args


def open_picture(name: str) -> Any:
    """Decode a picture named on the command line; `-` reads stdin.

    Raises:
        UsageError: nothing that can be read has this name.
        ImageError: it is no picture, or a broken one.
    """
    from mmgpt.data.images import ImageError, open_image

    if name != "-":
        try:
            return open_image(name)
        except ImageError as error:
            if error.reason in ("missing_file", "directory", "unreadable_file"):
                raise UsageError(str(error)) from error
            raise
    if sys.stdin is None or sys.stdin.isatty():
        what = "closed" if sys.stdin is None else "a terminal"
        raise UsageError(f"--image - reads a picture from stdin, which is {what}: pipe or redirect one into it")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if not data:
        raise UserError("--image - reads a picture from stdin, which is empty: did the command in front of the pipe fail?")
    if len(data) > MAX_STDIN_BYTES:
        raise UserError(f"stdin holds more than {MAX_STDIN_BYTES >> 20} MiB, which is no picture")
    try:
        return open_image(data)
    except ImageError as error:
        raise ImageError(error.reason, f"stdin: {error}") from error


def find_model(name: str | None) -> Path:
    """The model to ask: the one named, or the newest below `runs`. Raises UsageError where there is none."""
    from demo.runs import holds_model, newest_run
    from mmgpt.data.images import shortened

    if name is not None:
        if not name or not Path(name).is_dir():
            raise UsageError(f"--model: there is no folder {shortened(name)!r}")
        if not holds_model(Path(name)):
            raise UsageError(f"--model: {name} holds no model: expected config.json and model.safetensors there or in its model/")
        return Path(name)
    model = newest_run([Path("runs")]) or newest_run([REPOSITORY / "runs"])
    if model is None:
        folders = dict.fromkeys([str(Path("runs").resolve()), str(REPOSITORY / "runs")])
        raise UsageError(NO_MODEL.format(folders=" or ".join(folders)))
    return model


# Asking


@dataclass
class Asker:
    """A gate, and a model that is loaded when the first question has passed it."""

    gate: Any
    model_path: Path
    load: Callable[..., Any]
    generate: Callable[..., Iterator[str]]
    device: str
    precision: str
    sampling: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    def load_model(self, images: Sequence[Any] = ()) -> None:
        """Load the model if it is not there yet. Raises UserError."""
        if self.model is None:
            self.model = self.load(self.model_path, device=self.device, precision=self.precision)
        if images and not self.model.accepts_images:
            raise UsageError(f"{self.model_path} reads text only: name a model that accepts images with --model")

    def ask(self, messages: Sequence[Message], show: Callable[[str], None], answer: Answer) -> None:
        """Answer or refuse a conversation that ends with the user's question. Raises UserError, GateError."""
        from mmgpt.data.messages import images_of

        verdict = check_prompt(self.gate, messages)
        if not verdict.allowed:
            answer.refusal = verdict
            answer.add(verdict.refusal)
            show(verdict.refusal)
            return
        self.load_model(images_of(messages))
        gated_answer(self.gate, messages, self.generate(self.model, messages, self.sampling), show, answer)


def _make_gate() -> Any:
    from safety.gate import Gate

    gate = Gate()
    if gate.problem:
        # It would refuse everything; whoever asks is to know that nothing was judged.
        raise UserError(f"{gate.problem}: {gate.detail}")
    return gate


def _load(path: Path, *, device: str, precision: str) -> Any:
    import mmgpt
    from mmgpt import machine

    if precision == "auto" and machine.has_bf16(machine.pick_device(device)):
        precision = "bf16"  # half the memory of single precision, and faster
    return mmgpt.load(path, device=device, precision=precision)


def _generate(model: Any, messages: Sequence[Message], sampling: dict[str, Any]) -> Iterator[str]:
    from mmgpt.generate import Sampling

    # Not `mmgpt.generate.stream`: the model knows in which precision it is to answer.
    return model.stream(messages, sampling=Sampling(**sampling))


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _show(text: str) -> None:
    # On a terminal an answer must not be able to move the cursor, retitle the window or the like.
    write_output(_CONTROL.sub("", text) if sys.stdout is not None and sys.stdout.isatty() else text)


def ask_once(asker: Asker, question: str, images: Sequence[Any], *, as_json: bool, started: float) -> None:
    """Answer one question on stdout, streamed or as one line of JSON."""
    from mmgpt.data.messages import user

    messages = [user(question, images)]
    answer = Answer()
    if not as_json:
        try:
            asker.ask(messages, _show, answer)
        finally:
            if answer.text:
                _show("\n")
        if not answer.text:
            print("the model's answer is empty", file=sys.stderr)
        return
    asker.ask(messages, lambda text: None, answer)
    seconds = time.perf_counter() - started
    refusal = answer.refusal
    asked = asker.model is not None
    result = {
        "answer": refusal.refusal if refusal else answer.text,
        "refused": refusal is not None,
        "reason": refusal.reason if refusal else None,
        "prompt_tokens": len(asker.model.encode(messages, prompt=True)) if asked else 0,
        "answer_tokens": len(asker.model.tokenizer.encode(answer.generated)) if asked else 0,
        "seconds": round(seconds, 3),
        "seconds_to_first_token": None if answer.first_token is None else round(answer.first_token - started, 3),
        "model": str(asker.model_path),
    }
    write_output(json.dumps(result) + "\n")


def chat(asker: Asker, images: list[Any]) -> None:
    """Talk on the terminal until /quit or Ctrl-D, keeping the conversation."""
    from mmgpt.data.messages import assistant, user

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)
    asker.load_model(images)
    print(f"{asker.model_path}; /help lists the commands", file=sys.stderr)
    messages: list[Message] = []
    while True:
        # Ctrl-C may come anywhere between two questions, not only while one is typed.
        try:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            if command == "/help":
                print(CHAT_HELP, file=sys.stderr)
            elif command == "/reset":
                messages, images = [], []
                print("the conversation is forgotten", file=sys.stderr)
            elif command == "/image":
                _attach(asker, argument, images)
            elif line.startswith("/") and " " not in line and "/" not in line[1:]:
                print(f"there is no command {line}; /help lists them", file=sys.stderr)
            elif line or images:
                turn = [*messages, user(line or DESCRIBE, images)]
                answer = Answer()
                try:
                    asker.ask(turn, _show, answer)
                except KeyboardInterrupt:
                    print(" (stopped)", end="", file=sys.stderr)
                except GateError:
                    raise
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    continue
                finally:
                    if answer.text:
                        _show("\n")
                # A refused question leaves the conversation, or the gate would refuse all that follow it.
                if answer.text and answer.refusal is None:
                    messages, images = [*turn, assistant(answer.text)], []
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves", file=sys.stderr)


def _attach(asker: Asker, argument: str, images: list[Any]) -> None:
    # Terminals put quotes around the name of a file that is dropped on them.
    name = argument.strip().strip("'\"")
    try:
        if not name or name == "-":
            raise UsageError("/image needs the path of a picture")
        if not asker.model.accepts_images:
            raise UsageError(f"{asker.model_path} reads text only")
        images.append(open_picture(str(Path(name).expanduser())))
        print(f"{name} goes with your next question", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)


# The command


def main(
    argv: Sequence[str] | None = None,
    *,
    load: Callable[..., Any] = _load,
    generate: Callable[..., Iterator[str]] = _generate,
    make_gate: Callable[[], Any] = _make_gate,
) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments; those of the process where None.
        load: `load(path, device=, precision=)` gives the model.
        generate: `generate(model, messages, sampling)` gives the pieces of its answer.
        make_gate: Builds the gate.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def report(error: str, exit_code: int) -> None:
        # Whoever reads the JSON gets a line of it in every case; run_cli says the same on stderr.
        if "--json" in arguments:
            write_output(json.dumps({"error": error, "exit_code": exit_code}) + "\n")

    def command() -> None:
        try:
            _run(arguments, load, generate, make_gate)
        except OutputError:
            raise
        except UserError as error:
            report(str(error), error.exit_code)
            raise
        except KeyboardInterrupt:
            report("interrupted", 130)
            raise
        except BrokenPipeError:
            raise
        except Exception as error:
            # A bug of ours: the traceback is what a report of it needs.
            traceback.print_exc()
            report(described(error), 1)
            raise UserError(f"unexpected {described(error)}; the traceback stands above") from error

    return run_cli(command)


def _run(
    arguments: Sequence[str],
    load: Callable[..., Any],
    generate: Callable[..., Iterator[str]],
    make_gate: Callable[[], Any],
) -> None:
    started = time.perf_counter()
    args = parse_arguments(arguments)
    for stream in (sys.stdout, sys.stderr):
        # An answer may hold characters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    question = (args.question or "").strip()
    terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    # An empty question about a picture is one to describe it; only no question at all opens a conversation.
    to_chat = terminal and not args.json and not question and (args.question is None or not args.image)
    if not question and not to_chat and not args.image:
        raise UsageError("nothing to ask: name a picture with --image, or ask a question (--help shows examples)")
    images = [open_picture(name) for name in args.image]
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    sampling = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model_path = find_model(args.model)
    gate = build_gate(make_gate)
    asker = Asker(gate, model_path, load, generate, args.device, args.precision, sampling)
    if to_chat:
        chat(asker, images)
    else:
        ask_once(asker, question or DESCRIBE, images, as_json=args.json, started=started)


if __name__ == "__main__":
    sys.exit(main())
