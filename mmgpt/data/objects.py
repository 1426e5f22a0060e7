"""Objects that a caption names and nobody saw: hallucination, counted against what people wrote about the same picture.

CHAIR (Rohrbach et al. 2018, section 2.1) with the kinds of objects of objects.yaml instead of COCO's eighty, and with what people
wrote as the only ground truth: what none of them mentions counts as not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Vocabulary:
    """What words mean.

    Args:
        kinds: The kind of object that a word, singular or plural, stands for.
        within: For each kind, those of which naming the one where people named the other is no mistake, itself among them.
        exchanged: For each word, what can stand in its place in a sentence that then says something else.
    """

    kinds: dict[str, str]
    within: dict[str, frozenset[str]]
    exchanged: dict[str, list[str]]


@cache
def vocabulary() -> Vocabulary:
    """The words of objects.yaml."""
    import yaml

    read = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    kinds: dict[str, str] = {}
    for kind, words in read["kinds"].items():
        for word in (kind, *words):
            for form in (word, *plurals(word)):
                kinds.setdefault(form, kind)
    near = {kind: {kind} for kind in read["kinds"]}
    for wide, narrow in read["within"].items():
        for name in narrow:
            near.setdefault(wide, {wide}).add(name)
            near.setdefault(name, {name}).add(wide)
    exchanged = {word: [other for other in row if other != word] for row in read["exchanged"] for word in row}
    return Vocabulary(kinds, {kind: frozenset(others) for kind, others in near.items()}, exchanged)


def plurals(word: str) -> list[str]:
    """Regular plurals that a noun may have."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return [f"{word[:-1]}ies"]
    return [f"{word}es"] if word.endswith(("s", "x", "z", "ch", "sh")) else [f"{word}s"]


def named(caption: str) -> set[str]:
    """The kinds of objects that a caption names."""
    kinds = vocabulary().kinds
    return {kinds[word] for word in _WORD.findall(caption.lower()) if word in kinds}


def made_up(caption: str, references: Iterable[str]) -> set[str]:
    """The kinds that a caption names, and that no reference names, nor anything they could stand for."""
    there = {near for reference in references for kind in named(reference) for near in vocabulary().within[kind]}
    return named(caption) - there


@dataclass(frozen=True)
class Hallucination:
    """How often captions name what is not there.

    Args:
        captions: Captions counted.
        wrong: Captions that name at least one object nobody mentioned.
        objects: Objects named, each once a caption.
        invented: Those that nobody mentioned.
    """

    captions: int
    wrong: int
    objects: int
    invented: int

    @property
    def sentences(self) -> float:
        """CHAIR_s: share of the captions with something made up."""
        return self.wrong / max(1, self.captions)

    @property
    def instances(self) -> float:
        """CHAIR_i: share of the named objects that are made up."""
        return self.invented / max(1, self.objects)


def count_made_up(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Hallucination:
    """Count over captions, each with what people wrote about its picture."""
    found = [made_up(caption, texts) for caption, texts in zip(captions, references, strict=True)]
    objects = sum(len(named(caption)) for caption in captions)
    return Hallucination(len(captions), sum(map(bool, found)), objects, sum(map(len, found)))
