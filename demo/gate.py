"""A keyword gate: what stands between the question and the answer until a trained classifier does.

It knows a short list of obviously harmful requests and nothing else: it misses every paraphrase. The interface is the
one a better gate keeps:

    check_prompt(messages) -> Verdict
    stream(messages, pieces) -> Iterator[str]     only text that was cleared comes out
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mmgpt.data.messages import Message, text_of

REFUSAL = "I can't help with this request."

WINDOW = 128
"""Characters of normalised text that are held back: more than the longest match and what its look-ahead reads."""

LOOK_AHEAD = 24
"""Characters behind a match that decide whether it counts (`kill a child process`)."""


@dataclass(frozen=True)
class Verdict:
    """What a gate decided.

    Args:
        allowed: Whether the text may pass.
        reason: A short code for why not; empty where it may.
        score: How sensitive the text is, 0 to 1.
        refusal: What the user is told instead; empty where the text may pass.
    """

    allowed: bool
    reason: str
    score: float
    refusal: str


ALLOWED = Verdict(True, "", 0.0, "")

# The rules read normalised text: case folded, compatibility forms and accents resolved, one space between words.
_GAP = r"(?:(?!avoid|not |stop|prevent|survive|without|never|detect|report|bath |photo |glitter )[\w']{1,12} )"
_HOW = (
    r"(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone)|how to|help me(?: to)?|teach me(?: how)? to"
    r"|(?:show|tell) me how to|ways? to|steps to|instructions (?:to|for|on)|guide (?:to|on|for)"
    r"|i (?:want|need|plan|am going|m going) to|i'm going to|i wanna) "
)
_MAKE = r"(?:make|makes?|making|build|building|assemble|construct|create|creating|manufacture|produce|detonate) "
_PERSON = (
    r"(?:someone|somebody|people|persons?|humans?|m[ae]n|wom[ae]n|wife|husband|child|children|kids?|girlfriend|boyfriend"
    r"|neighbou?rs?|boss|colleagues?|parents?|mother|father|brother|sister|family|baby|babies|president)"
)
_WHOSE = (
    r"(?:(?:an?|the|my|your|his|her|their|our|this|that|some|all|every|another|other|own|ex|old|young"
    r"|[\w']{1,12}'s) )"
)
# Programs have children and manuals have pages: what they do to them is no crime.
_NO_PROGRAM = r"(?! (?:\w{1,12} )?(?:process|page|thread|task|node|object|class|job|window|tab\b|session))"

_PATTERNS = {
    "weapons": rf"\b{_MAKE}{_GAP}{{0,3}}"
    r"(?:bombs?|explosives?|ieds?|grenades?|landmines?|molotov cocktails?|nerve agents?|nerve gas|sarin|mustard gas"
    r"|(?:chemical|biological|nuclear) weapons?|ghost guns?)\b(?! (?:emoji|shelter|disposal|calorimeter|cyclone))",
    "drugs": rf"\b(?:{_MAKE}|cook |cooking |synthesi[sz]e |synthesi[sz]ing ){_GAP}{{0,3}}"
    r"(?:meth|methamphetamine|heroin|fentanyl|cocaine|lsd|mdma|ricin)\b",
    "malware": rf"\b(?:{_MAKE}|write |code |develop |generate |give me ){_GAP}{{0,3}}"
    r"(?:malware|ransomware|keyloggers?|computer (?:virus|viruses|worms?)|trojans?(?! horse)|botnets?|rootkits?"
    r"|phishing (?:e ?mails?|pages?|sites?|kits?))\b",
    "intrusion": rf"\b{_HOW}{_GAP}?hack (?:in ?to )?{_GAP}{{0,3}}"
    r"(?:accounts?|phones?|wi ?fi|e ?mails?|computers?|bank|instagram|facebook|gmail|network|passwords?)\b",
    "violence": rf"\b{_HOW}{_GAP}?(?:kill|murder|poison|strangle|assassinate|kidnap|stab|torture) "
    rf"{_WHOSE}{{0,2}}{_PERSON}\b{_NO_PROGRAM}",
    "attack": rf"\b{_HOW}{_GAP}?(?:plan|commit|carry out) {_GAP}{{0,2}}"
    r"(?:(?:mass|school) shootings?|massacres?|murders?|terror(?:ist)? attacks?|bombings?|genocide)\b",
    "self_harm": rf"\b{_HOW}{_GAP}?(?:(?:kill|hang|hurt|harm|cut) myself|commit suicide)\b",
    "child_abuse": r"\b(?:child|children|kiddie|kids?|minors?|underage|preteens?|toddlers?) "
    r"(?:porn|porno|pornography|nudes|erotica)\b",
    "fraud": rf"\b{_HOW}{_GAP}?"
    rf"(?:(?:print|make|produce) {_GAP}{{0,2}}(?:counterfeit (?:money|bills?|notes?)|fake ids?)"
    rf"|forge {_GAP}{{0,2}}(?:passports?|signatures?|checks?|cheques?)|launder {_GAP}{{0,2}}money"
    rf"|steal {_GAP}{{0,2}}(?:credit cards?|identity|identities|passwords?|cars?))\b",
}
RULES = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}


class KeywordGate:
    """Refuses what a short list of patterns finds. Says on stderr, when it is made, that it is no more than that."""

    def __init__(self) -> None:
        print(
            "gate: a short keyword list stands in for the safety classifier; it misses whatever it does not spell out",
            file=sys.stderr,
        )

    def check_prompt(self, messages: Sequence[Message]) -> Verdict:
        """Judge a conversation before it is answered: the text of every message, across messages too."""
        reason = find("\n".join(text_of(message) for message in messages))
        return ALLOWED if reason is None else _refused(reason)

    def stream(self, messages: Sequence[Message], pieces: Iterable[str]) -> Generator[str, None, Verdict]:
        """Let an answer through behind a window of `WINDOW` characters.

        What comes out, joined, is what went in as long as no rule fires, and wherever the pieces are cut a rule fires
        exactly when one fires on the whole. Then everything still held is dropped, the refusal comes out, and the
        stream ends.

        Returns:
            (As the generator's return value) the verdict on the answer.
        """
        held: deque[tuple[str, str]] = deque()
        before = last = ""
        length = 0
        released = False
        for piece in pieces:
            for char, folded in _folded(piece, last):
                held.append((char, folded))
                length += len(folded)
                last = folded[-1:] or last
            reason = _find(before + "".join(folded for _, folded in held), whole=False)
            if reason is not None:
                break
            cleared = []
            while held and length - len(held[0][1]) >= WINDOW:
                char, folded = held.popleft()
                length -= len(folded)
                # One character of context, for the boundary in front of a word.
                before = folded[-1:] or before
                cleared.append(char)
            if cleared:
                released = True
                yield "".join(cleared)
        else:
            reason = _find(before + "".join(folded for _, folded in held), whole=True)
        if reason is not None:
            yield ("\n\n" if released else "") + REFUSAL
            return _refused(reason)
        if held:
            yield "".join(char for char, _ in held)
        return ALLOWED


def find(text: str) -> str | None:
    """The name of a rule that fires on a text, or None. Time is linear in the length of the text."""
    return _find("".join(folded for _, folded in _folded(text, "")), whole=True)


def _refused(reason: str) -> Verdict:
    return Verdict(False, reason, 1.0, REFUSAL)


def _find(normalised: str, *, whole: bool) -> str | None:
    for name, rule in RULES.items():
        for match in rule.finditer(normalised):
            # While text is still coming, a match near the end may yet turn out to be the beginning of a harmless word.
            if whole or match.end() + LOOK_AHEAD <= len(normalised):
                return name
    return None


def _folded(text: str, last: str) -> list[tuple[str, str]]:
    """Each character with what it adds to normalised text that so far ends in `last`."""
    result = []
    for char in text:
        folded = _fold(char)
        if folded == " " and last == " ":
            folded = ""
        last = folded[-1:] or last
        result.append((char, folded))
    return result


@lru_cache(maxsize=4096)
def _fold(char: str) -> str:
    """One character in the alphabet of the rules.

    Normalisation form NFKD, with accents and invisible characters dropped: unlike NFKC's, a text's form is then that of
    its characters side by side, and can be made while the text is still coming.
    """
    if char.isspace() or char in "-_" or unicodedata.category(char) == "Pd":
        return " "
    if char in "\u2018\u2019\u02bc":
        return "'"
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    folded = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc"))
    return " " if folded.isspace() else folded
