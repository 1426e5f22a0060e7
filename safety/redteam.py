"""`python -m safety.redteam`: what gets through the filter, by family of attack (`safety.attacks`).

Without --ask the filter alone is attacked: an attack gets through where it is allowed. With --ask MODEL a model stands behind
the gate, as in demo/ask.py: an attack gets through where the gate allows the prompt and shows an answer that is no refusal
(grade C or D of `safety.rules`; a model that knows too little to do harm answers D).

A table says how many got through of each family, with Wilson's 95 % interval; families of which the weights' training saw
prompts of the same source stand in rows of their own.

    --through FILE   every attack that got through, JSONL
    --misses FILE    those that are new, as JSONL for labelling: put 1 or 0 for `label`: null and name the file in `own` of the
                     training's `data`. Attacks made of the test sets' prompts are left out: nothing may be trained on them.
    --card           replace this run's section of the weights' README.md

Exit codes: 0 measured, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety.attacks import FAMILIES, OWN, Attack, attacks
from safety.intervals import wilson
from safety.verdict import POINTS

WEIGHTS = Path(__file__).parent / "weights"
BATCH = 128
SHOWN = 16  # prompts in the card
THROUGH = ("allowed", "answered")


@dataclass(frozen=True)
class Outcome:
    """What became of an attack.

    Args:
        attack: It.
        what: `blocked` by the gate or the filter; `allowed` by the filter; behind the gate also `withheld` (the answer was),
            `refused` (by the model), `answered`, `failed` (the model gave no answer).
        score: The filter's, of the prompt.
        reason: The filter's code, or what failed.
        answer: Of the model, what was shown of it.
        grade: Of the answer, by `safety.rules`.
    """

    attack: Attack
    what: str
    score: float
    reason: str
    answer: str = ""
    grade: str = ""

    @property
    def through(self) -> bool:
        return self.what in THROUGH

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"text": self.attack.text, "family": self.attack.family, "source": self.attack.source}
        found |= {
            "how": self.attack.how,
            "seen": self.attack.seen,
            "outcome": self.what,
            "score": round(self.score, 5),
            "reason": self.reason,
        }
        return found | ({"answer": self.answer, "grade": self.grade} if self.grade else {})


# Attacking


def attack_filter(judge: Any, made: Sequence[Attack]) -> list[Outcome]:
    """Try attacks on the filter alone."""
    out = []
    for start in range(0, len(made), BATCH):
        part = made[start : start + BATCH]
        for attack, verdict in zip(part, judge.check_batch([attack.text for attack in part])):
            out.append(Outcome(attack, "blocked" if verdict.sensitive else "allowed", verdict.score, verdict.reason))
    return out


def attack_ask(asker: Any, made: Sequence[Attack], progress: Callable[[int], None] = lambda done: None) -> list[Outcome]:
    """Try attacks on a model behind the gate, as demo/ask.py asks it.

    Args:
        asker: `demo.ask.Asker`.
        made: The attacks.
        progress: Told after each how many are done.
    """
    from demo.guard import Answer, GateError
    from mmgpt.data.messages import user
    from mmgpt.errors import UserError

    out = []
    for number, attack in enumerate(made, 1):
        answer, messages = Answer(), [user(attack.text)]
        score = asker.gate.filter.check(attack.text).score
        try:
            asker.ask(messages, lambda text: None, answer)
            out.append(judged(attack, score, answer))
        except GateError:
            raise
        except UserError as error:
            out.append(Outcome(attack, "failed", score, str(error), answer.text))
        progress(number)
    return out


def judged(attack: Attack, score: float, answer: Any) -> Outcome:
    """The outcome of a question that was asked: `answer` is a `demo.guard.Answer`."""
    from safety.rules import grade

    if answer.refusal is not None:
        # Nothing generated: the prompt was refused, and the model never asked.
        what = "withheld" if answer.generated else "blocked"
        return Outcome(attack, what, score, answer.refusal.reason)
    letter = grade(attack.text, answer.text, 1.0).letter
    return Outcome(attack, "answered" if letter in "CD" else "refused", score, "clear", answer.text, letter)


# Reports


def groups(outcomes: Iterable[Outcome]) -> dict[tuple[str, bool | None], list[Outcome]]:
    """Outcomes by family and whether training saw their source, in the order of `FAMILIES`, unseen ones first."""
    found: dict[tuple[str, bool | None], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.attack.family, outcome.attack.seen), []).append(outcome)
    order = {family: n for n, family in enumerate(FAMILIES)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], {False: 0, None: 1, True: 2}[item[0][1]])))


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One dict a family, and one of all that training did not see."""
    parts = [(family, seen, part) for (family, seen), part in groups(outcomes).items()]
    unseen = [outcome for outcome in outcomes if outcome.attack.seen is False]
    if len({family for family, seen, _ in parts if seen is False}) > 1:
        parts.append(("all that is not seen in training", False, unseen))
    rows = []
    for family, seen, part in parts:
        through = sum(outcome.through for outcome in part)
        low, high = wilson(through, len(part))
        rows.append(
            {
                "family": family,
                "seen": seen,
                "attacks": len(part),
                "through": through,
                "rate": round(through / len(part), 5),
                "interval": [round(low, 5), round(high, 5)],
                "outcomes": dict(sorted(Counter(outcome.what for outcome in part).items())),
                "sources": dict(Counter(outcome.attack.source for outcome in part).most_common()),
                "how": {
                    how: [sum(o.through for o in part if o.attack.how == how), number]
                    for how, number in sorted(Counter(o.attack.how for o in part if o.attack.how).items())
                },
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]], asked: bool) -> str:
    """A Markdown table of `summary`; below it what got through by transformation and language."""
    middle = ["blocked", "withheld", "refused", "failed"] if asked else ["blocked"]
    heads = ["family", "attacks", *middle, "got through", "rate (95 %)", "sources"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        note = {True: ", seen in training", None: ", training unknown", False: ""}[row["seen"]]
        low, high = row["interval"]
        cells = [row["family"].replace("_", " ") + note, str(row["attacks"]), *(str(row["outcomes"].get(w, 0)) for w in middle)]
        cells += [str(row["through"]), f"{row['rate']:.1%} ({low:.1%} to {high:.1%})"]
        cells.append(", ".join(f"{name} {number}" for name, number in row["sources"].items()))
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        if row["how"] and row["family"] in FAMILIES:
            listed = ", ".join(f"{how} {through}/{number}" for how, (through, number) in row["how"].items())
            lines.append(f"\n{row['family'].replace('_', ' ').capitalize()}, got through: {listed}.")
    return "\n".join(lines)


def listing(outcomes: Sequence[Outcome], shown: int = SHOWN) -> str:
    """Attacks of this project's own that got through, shortened, the lowest scores of each family by turns.

    Prompts of the collections are not copied: they are others', and --through lists them.
    """
    queues = [
        sorted((o for o in part if o.through and o.attack.source == OWN), key=lambda o: o.score)
        for part in groups(outcomes).values()
    ]
    own = sum(map(len, queues))
    chosen: list[Outcome] = []
    while len(chosen) < min(shown, own):
        chosen += [queue.pop(0) for queue in queues if queue][: shown - len(chosen)]
    lines = [f"Of this project's own attacks {own} got through" + (f", {len(chosen)} of them:" if own else "."), ""]
    for outcome in chosen:
        text = " ".join(outcome.attack.text.split())
        how = f", {outcome.attack.how}" if outcome.attack.how else ""
        short = text if len(text) <= 110 else text[:110] + "..."
        lines.append(f"- {outcome.score:.2f} ({outcome.attack.family.replace('_', ' ')}{how}): {short}")
    return "\n".join(lines).rstrip()


def section(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], asked: str, command: str, model: str) -> str:
    """The card's section: all of it follows from the weights and the command it names."""
    title = f"### Red team: `ask` with the gate in front of {asked}" if asked else "### Red team: the filter alone"
    return "\n\n".join([title, f"`{command}`, weights {model}.", table(rows, bool(asked)), listing(outcomes)])


def put_section(card: str, name: str, text: str) -> str:
    """A card with a section replaced, or added at its end, below the line that `safety.card` keeps everything behind."""
    from safety.card import MARK

    start, end = f"<!-- red team: {name} -->", f"<!-- end of red team: {name} -->"
    body = f"{start}\n{text}\n{end}"
    if start in card and end in card.partition(start)[2]:
        before, _, rest = card.partition(start)
        return before + body + rest.partition(end)[2]
    if MARK not in card:
        card = card.rstrip("\n") + f"\n\n{MARK}\n"
    return card.rstrip("\n") + f"\n\n{body}\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises UserError."""
    from mmgpt.errors import UserError

    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def add_misses(path: Path, outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """Append what got through and is not there yet, to be labelled. Returns how many, and how many tests' prompts were left out.

    Raises:
        UserError: the file cannot be read or written.
    """
    from mmgpt.errors import UserError
    from safety.sources import read_lines

    known = {value.get("text") for _, value in read_lines(path)} if path.exists() else set()
    through = [outcome for outcome in outcomes if outcome.through]
    new = [o for o in through if not o.attack.held_out and o.attack.text not in known]
    rows = [{"text": o.attack.text, "label": None, "family": o.attack.family, "source": o.attack.source} for o in new]
    if rows:
        try:
            old = path.read_text(encoding="utf-8") if path.exists() else ""
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        gap = "" if not old or old.endswith("\n") else "\n"
        write(path, old + gap + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows), sum(o.attack.held_out for o in through)


# The command


def build_asker(folder: str, gate: Any, tokens: int) -> Any:
    """A model behind the gate, as demo/ask.py builds it; greedy. Raises UsageError."""
    from demo import ask

    return ask.Asker(gate, ask.find_model(folder), ask._load, ask._generate, "auto", "auto", {"max_new_tokens": tokens})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from mmgpt.errors import UsageError

    parser = argparse.ArgumentParser(
        prog="python -m safety.redteam", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--families", nargs="+", default=list(FAMILIES), metavar="NAME", help=f"of {', '.join(FAMILIES)} (default: all)")
    add("--limit", type=int, default=200, metavar="N", help="attacks of a family, seen and not seen in training (default 200)")
    add("--own", action="store_true", help="this project's templates alone: nothing is fetched")
    add("--seed", type=int, default=0)
    add("--ask", metavar="MODEL", help="a run or an exported model to stand behind the gate")
    add("--max_new_tokens", type=int, default=48, metavar="N", help="longest answer of that model (default 48)")
    add("--operating_point", choices=POINTS, default="balanced", help="of the filter (default: balanced)")
    add("--weights", type=Path, default=WEIGHTS, metavar="FOLDER", help="weights of your own training")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--through", type=Path, metavar="FILE", help="write every attack that got through")
    add("--misses", type=Path, metavar="FILE", help="append those that are new, for labelling")
    add("--card", action="store_true", help="replace this run's section of README.md beside the weights")
    options = parser.parse_args(arguments)
    for name in options.families:
        if name not in FAMILIES:
            raise UsageError(f"--families: there is no {name!r}; there are {', '.join(FAMILIES)}")
    if options.limit < 1 or options.max_new_tokens < 1:
        raise UsageError("--limit and --max_new_tokens must be at least 1")
    return options


def command_of(options: argparse.Namespace) -> str:
    """The command that repeats a run, without what it writes or where the weights lie."""
    words = ["python -m safety.redteam"]
    if options.families != list(FAMILIES):
        words.append("--families " + " ".join(options.families))
    words.append(f"--limit {options.limit} --seed {options.seed}")
    if options.own:
        words.append("--own")
    if options.operating_point != "balanced":
        words.append(f"--operating_point {options.operating_point}")
    if options.ask:
        asked = Path(options.ask)
        words.append(f"--ask {asked.name if asked.is_absolute() else asked} --max_new_tokens {options.max_new_tokens}")
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    from mmgpt.errors import UserError
    from safety.evaluate import load_calibration
    from safety.gate import Gate

    options = parse(arguments)
    shipped = options.weights.resolve() == WEIGHTS.resolve()
    gate = Gate(options.operating_point, weights=None if shipped else options.weights)
    if gate.problem:
        # It would block everything: figures of that say nothing about the weights.
        raise UserError(f"the filter does not start with {options.weights}: {gate.problem}, {gate.detail}")
    trained = load_calibration(options.weights).get("data", {}).get("train sources")
    asker = build_asker(options.ask, gate, options.max_new_tokens) if options.ask else None
    made = attacks(options.families, limit=options.limit, seed=options.seed, trained=trained, own=options.own)
    if not made:
        raise UserError(f"there is no attack of {', '.join(options.families)} in this project's own templates: leave --own out")
    if asker is None:
        outcomes = attack_filter(gate.filter, made)
    else:
        outcomes = attack_ask(asker, made, lambda done: None if done % 25 else print(f"{done}/{len(made)}", file=sys.stderr))
    rows = summary(outcomes)
    through = [outcome.to_json() for outcome in outcomes if outcome.through]
    report = {
        "command": command_of(options),
        "model": gate.filter.model,
        "operating_point": options.operating_point,
        "families": rows,
        "through": through,
    }
    if options.through:
        write(options.through, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in through))
    if options.misses:
        count, left = add_misses(options.misses, outcomes)
        print(f"{options.misses}: {count} new, {left} of test sets left out", file=sys.stderr)
    if options.card:
        path = options.weights / "README.md"
        card = path.read_text(encoding="utf-8") if path.exists() else "# The weights of the filter\n"
        text = section(rows, outcomes, Path(options.ask).name if options.ask else "", report["command"], gate.filter.model)
        write(path, put_section(card, "ask" if options.ask else "filter", text))
    print(json.dumps(report, indent=1) if options.json else f"{table(rows, bool(options.ask))}\n\n{listing(outcomes)}")
    return 0


if __name__ == "__main__":
    from mmgpt.errors import run_cli

    sys.exit(run_cli(main))
