"""Where the classifier's prompts come from: this project's own files, and what is made of them; others wrote `collection`'s.

A row is a prompt with its label. Rows of the test sets' prompts, word for word or nearly, are taken out of everything that
is trained on, and counted; see `overlaps`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmgpt.errors import UserError
from safety import obfuscate
from safety.taxonomy import KEYS

HERE = Path(__file__).parent
DISGUISES = ("spaced", "punctuation", "reverse", "rot13", "url", "hex", "base64")
"""What leaves a text unlike language until it is taken off; the other disguises vanish in the canonical form."""
LOOKALIKES = ("pairs", "requests", "hh-rlhf")
"""Sources whose harmless rows were written to look like sensitive ones, or by people who tried for harm."""
DOCUMENTS = (
    "documents",
    "django-docs",
    "django-code",
    "django-licence",
    "django-translation",
    "reviews-imdb",
    "reviews-rotten_tomatoes",
)
"""Sources of harmless texts that are no prompts."""
TESTS = ("harmbench", "strongreject", "safety-refusal", "alpaca-eval-prompts", "hh-prompts:test")


@dataclass(frozen=True)
class Row:
    """One prompt.

    Args:
        text: As written.
        label: 1 sensitive, 0 not.
        categories: Keys of the taxonomy; None where the label is 1 and nobody said which.
        source: Name of the collection.
        group: Rows of one group stay on one side of the split; empty for a row of its own.
        weight: In the loss.
    """

    text: str
    label: int
    categories: tuple[str, ...] | None = ()
    source: str = ""
    group: str = ""
    weight: float = 1.0


# Reading


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSONL file with `text`, `label` (0 or 1) and, optionally, `categories`.

    Raises:
        UserError: names the file, the line and what is wrong there.
    """
    rows = []
    for number, value in read_lines(path):
        where = f"{path}:{number}"
        if not isinstance(value.get("text"), str) or not value["text"].strip():
            raise UserError(f"{where}: `text` must be a text that is not empty")
        if value.get("label") not in (0, 1):
            raise UserError(f"{where}: `label` must be 1 (sensitive) or 0, not {value.get('label')!r}")
        categories = value.get("categories")
        if categories is None:
            categories = None if value["label"] else []
        elif not isinstance(categories, list) or (unknown := [key for key in categories if key not in KEYS]):
            wrong = f"unknown category {unknown[0]!r}" if isinstance(categories, list) else "`categories` must be a list"
            raise UserError(f"{where}: {wrong}; the categories are {', '.join(KEYS)}")
        elif categories and not value["label"]:
            raise UserError(f"{where}: a prompt with label 0 has no categories")
        rows.append(Row(value["text"], int(value["label"]), None if categories is None else tuple(categories), path.stem))
    return rows


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise UserError(f"{path}:{number}: a line must be a JSON object")
                yield number, value
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def pairs(folder: Path | None = None) -> list[Row]:
    """The contrast pairs: two rows each, in one group.

    Raises:
        UserError: there is no such folder, or a line is no pair.
    """
    rows = []
    for path in _files(folder or HERE / "data" / "pairs", "pairs"):
        for number, value in read_lines(path):
            if value.get("category") not in KEYS or not all(isinstance(value.get(k), str) for k in ("sensitive", "harmless")):
                raise UserError(f"{path}:{number}: a pair has `category` (of the taxonomy), `sensitive` and `harmless`")
            group = f"{path.stem}:{number}"
            rows.append(Row(value["sensitive"], 1, (value["category"],), "pairs", group))
            rows.append(Row(value["harmless"], 0, (), "pairs", group))
    return rows


def documents(folder: Path | None = None) -> list[Row]:
    """The documents of this project: harmless texts of many trades, most of which speak of dangerous things.

    Raises:
        UserError: there is no such folder, or a line has no text.
    """
    rows = []
    for path in _files(folder or HERE / "data" / "documents", "documents"):
        for number, value in read_lines(path):
            if not isinstance(value.get("text"), str) or not value["text"].strip():
                raise UserError(f"{path}:{number}: a document has a `text` that is not empty")
            rows.append(Row(value["text"], 0, (), "documents", f"{path.stem}:{number}"))
    return rows


def _files(folder: Path, what: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of {what}")
    return sorted(folder.glob("*.jsonl"))


def requests(path: Path | None = None, *, per_act: int = 3, seed: int = 0) -> list[Row]:
    """Requests composed of acts and framings of this project: `data/requests/general.yaml` says how.

    Sensitive and harmless acts go through the same framings, so that a framing says nothing about the label. All requests
    for one act are one group. Whole prompts have the source `everyday`; harmless acts share words with sensitive ones and
    are look-alikes rather than everyday.
    """
    table = _tables(path or HERE / "data" / "requests")
    rng = random.Random(seed)
    rows = []

    def compose(acts: Iterable[str], framings: list[str], label: int, categories: tuple[str, ...]) -> None:
        bare = [framing for framing in framings if framing == "{act}"]
        others = [framing for framing in framings if framing != "{act}"]
        for act in acts:
            # An act with gaps is many acts. What is a request by itself is always among its own framings, as it stands.
            count = per_act * (4 if "{" in act else 1) - len(bare)
            for framing in bare + rng.sample(others, max(0, min(count, len(others)))):
                text = fill(framing.replace("{act}", act), table["words"], rng)
                rows.append(Row(text[:1].upper() + text[1:] if rng.random() < 0.7 else text, label, categories, "requests", act))

    for form, framings in table["framings"].items():
        for category, acts in table["sensitive"].get(form, {}).items():
            compose(acts, framings, 1, (category,))
        compose(table["harmless"].get(form, []), framings, 0, ())
    for category, prompts in table["attacks"].items():
        for prompt in prompts:
            for _ in range(per_act if "{" in prompt else 1):
                rows.append(Row(fill(prompt, table["words"], rng), 1, (category,), "requests", prompt))
    for prompt in table["everyday"]:
        for _ in range(per_act if "{" in prompt else 1):
            rows.append(Row(fill(prompt, table["words"], rng), 0, (), "everyday", prompt))
    return rows


def read_table(path: Path, holding: str) -> dict[str, Any]:
    """Read a YAML file that holds a table of something. Raises UserError."""
    import yaml

    try:
        # libyaml's loader where there is one: ten times as fast, and the requests are a megabyte.
        table = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as {holding}: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is no table of {holding}")
    return table


def _tables(path: Path) -> dict[str, Any]:
    """A YAML file of requests, or all of a folder as one: what stands under the same keys is put together.

    Raises:
        UserError: a file cannot be read, or something in it is not where the form has a place for it.
    """
    table: dict[str, Any] = {key: {} for key in ("framings", "sensitive", "harmless", "attacks", "words")} | {"everyday": []}
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .yaml file of requests")
    for file in files:
        for key, value in read_table(file, "requests").items():
            if key not in table:
                raise UserError(f"{file}: there is no {key!r} among requests; there are {', '.join(table)}")
            # sensitive: form -> category -> acts; everyday: prompts; the others: name -> what it stands for.
            _put(table, key, value, depth={"sensitive": 2, "everyday": 0}.get(key, 1), where=f"{file}: {key}")
    forms = table["framings"]
    for place, known, what in (
        *((name, forms, "form") for name in (*table["sensitive"], *table["harmless"])),
        *((name, KEYS, "category") for name in (*table["attacks"], *(key for by in table["sensitive"].values() for key in by))),
    ):
        if place not in known:
            raise UserError(f"{path}: {place!r} is no {what} of requests; there are {', '.join(known)}")
    return table


def _put(into: dict[str, Any], key: str, value: Any, *, depth: int, where: str) -> None:
    """Put a list, or tables of lists `depth` levels deep, to what is there under a key."""
    if depth:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a table, not {value!r:.60}")
        for name, inner in value.items():
            _put(into.setdefault(key, {}), name, inner, depth=depth - 1, where=f"{where}.{name}")
    elif not isinstance(value, list) or not all(isinstance(item, str | int) for item in value):
        raise UserError(f"{where} must be a list of texts, not {value!r:.60}")
    else:
        into.setdefault(key, []).extend(value)


def fill(template: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """Put a random word of its list into every `{name}` of a template."""

    def word(gap: re.Match[str]) -> str:
        if gap[1] not in words:
            raise UserError(f"no words for the gap {gap[0]} of {template!r:.80}; there are {', '.join(words)}")
        return str(rng.choice(words[gap[1]]))

    return re.sub(r"\{(\w+)\}", word, template)


# Duplicates and overlaps


def key(text: str) -> str:
    """What two texts share that differ only in case, punctuation and blanks."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """Each text once, the first of its rows; texts that were given both labels are dropped whole."""
    labels: dict[str, set[int]] = defaultdict(set)
    first: dict[str, Row] = {}
    for row in rows:
        name = key(row.text)
        labels[name].add(row.label)
        first.setdefault(name, row)
    return [row for name, row in first.items() if name and len(labels[name]) == 1]


def overlaps(rows: Sequence[Row], tests: Sequence[Row], *, words: int = 8, jaccard: float = 0.6) -> list[bool]:
    """Which rows are in the tests, word for word or nearly.

    A row overlaps where it shares a run of `words` words with a test prompt (the rule that GPT-3 used with 13; Brown et al.
    2020, appendix C), or where both sets of words have at least this Jaccard index (which finds short prompts with a word
    changed), or where the two are equal by `key`.
    """
    exact: set[str] = set()
    runs: set[tuple[str, ...]] = set()
    sets: list[frozenset[str]] = []
    holders: dict[str, list[int]] = defaultdict(list)
    for test in tests:
        tokens = key(test.text).split()
        exact.add(" ".join(tokens))
        runs.update(_runs(tokens, words))
        for word in set(tokens):
            holders[word].append(len(sets))
        sets.append(frozenset(tokens))
    out = []
    for row in rows:
        tokens = key(row.text).split()
        found = " ".join(tokens) in exact or any(run in runs for run in _runs(tokens, words))
        if not found:
            own = set(tokens)
            common: Counter[int] = Counter(itertools.chain.from_iterable(holders.get(word, ()) for word in own))
            found = any(n >= jaccard * len(own | sets[i]) for i, n in common.items() if n >= jaccard * len(own))
        out.append(found)
    return out


def _runs(tokens: list[str], words: int) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[start : start + words]) for start in range(len(tokens) - words + 1))


# Splits and augmentation


def held_out(row: Row, part: float, seed: int) -> bool:
    """Whether a row's group falls into the development split; it depends on nothing but the group and the seed."""
    digest = hashlib.sha256(f"{seed}:{row.source}:{row.group or key(row.text)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < part * 2**64


def augment(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` new rows made of old ones by what normalisation cannot undo; labels stay true.

    noise      a few typing errors; letters in spaced or hyphenated words
    padding    a harmless text before or after a prompt: a sensitive part makes the whole sensitive
    inside     some words of a harmless text before a prompt and some of another behind it: what is hidden within a sentence.
               Not of a look-alike, where there is anything else: half of one may be harmful by itself
    suffix     tokens without meaning after a prompt, as gradient-based attacks add (Zou et al. 2023), to both labels
    disguise   a harmless prompt in one of `DISGUISES`. The filter reads a disguised text as it stands and as what it hides; a
               sensitive one is found in what it hides, and what stands there must not be held against everybody who writes so
    """
    rng = random.Random(seed)
    harmless = [row.text for row in rows if row.label == 0 and 20 < len(row.text) < 400]
    around = [row.text for row in rows if row.label == 0 and len(row.text) > 20 and row.source not in LOOKALIKES] or harmless
    short = [row for row in rows if len(row.text) < 300]
    tame = [row for row in short if row.label == 0]
    if not tame or not harmless:
        return []
    words = sorted({word for text in harmless for word in re.findall(r"[A-Za-z]{3,9}", text)})
    out = []
    for _ in range(count):
        row = rng.choice(short)
        kind = rng.choice(("noise", "padding", "padding", "inside", "suffix", "disguise"))
        if kind == "noise":
            text = noise(row.text, rng)
        elif kind == "disguise":
            row = rng.choice(tame)
            text = obfuscate.apply(rng.choice(DISGUISES), row.text, rng)
        elif kind == "padding":
            other, joint = rng.choice(harmless), rng.choice(("\n\n", "\n", " ", " Also: ", "\n---\n", ". By the way, "))
            text = row.text + joint + other if rng.random() < 0.5 else other + joint + row.text
        elif kind == "inside":
            before, behind = (_stretch(rng.choice(around), rng) for _ in range(2))
            text = f"{before} {row.text} {behind}"
        else:
            text = row.text + " " + _gibberish(words, rng)
        out.append(replace(row, text=text, source=f"{row.source}+{kind}"))
    return out


def _stretch(text: str, rng: random.Random) -> str:
    """2 to 12 words that follow each other in a text."""
    words = text.split()
    count = rng.randint(2, 12)
    start = rng.randrange(max(len(words) - count, 0) + 1)
    return " ".join(words[start : start + count])


def noise(text: str, rng: random.Random) -> str:
    """Swap, drop or double about one letter in twenty."""
    letters = list(text)
    for _ in range(max(1, len(letters) // 20)):
        at = rng.randrange(len(letters))
        if not letters[at].isalpha():
            continue
        action = rng.randrange(3)
        if action == 0:
            letters[at] = ""
        elif action == 1:
            letters[at] *= 2
        elif at + 1 < len(letters):
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
        letters = [letter for letter in letters if letter]
        if not letters:
            return text
    return "".join(letters)


def _gibberish(words: Sequence[str], rng: random.Random) -> str:
    marks = ("", "", "", "](", "!--", "\\", "**", "==", "?", ";)", "{", "}", "//", "#", "<", '"', "!!", "...")
    cut = [word[rng.randrange(len(word)) :] if rng.random() < 0.5 else word for word in rng.choices(words, k=rng.randint(5, 18))]
    return " ".join(rng.choice(marks) + word + rng.choice(marks) for word in cut)
