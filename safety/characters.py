"""One character at a time: compatibility forms, look-alikes, invisible characters.

`clean(text)` is plain text with its case and its layout kept, so that base64 in it can still be decoded. All but the last
step maps each character by itself, whatever stands around it (so a text may be cut anywhere):

- compatibility forms as in NFKC (Unicode Standard Annex 15), left decomposed, accents and other marks dropped: `bömb`,
  `ｂｏｍｂ`, `𝐛𝐨𝐦𝐛` are `bomb`;
- letters that Unicode names as a form of a Latin one (with a stroke, small capital, turned, squared) are that letter;
- format and control characters, tags, variation selectors and invisible letters are dropped; every kind of space is one.

Last, look-alikes of other scripts (after Unicode Technical Standard 39, "confusables"): in a word that also has Latin
letters each is replaced; in a word without any, only if all of its letters look exactly like Latin ones. Russian and Greek
therefore stay what they are, but for some of their shortest words.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

# Pairs "look-alike, Latin letter". Exact ones also count in a word that has no Latin letter at all.
_EXACT = (
    "аaсcԁdеeһhіiјjӏlоoрpԛqѕsуyѵvԝwхxАAВBСCЕEНHІIЈJКKМMОOРPЅSТTХXУYҮYԌGԚQԜWѴVҺHӀI"
    "οoνvρpΑAΒBΕEΖZΗHΙIΚKΜMΝNΟOΡPΤTΥYΧXϳj"
    "օoոnսuցgհhյjԛq"
    "ᎪAᏴBᏟCᎠDᎬEᏀGᎻHᎫJᏦKᏞLᎷMᏢPᏚSᎢTᏙVᎳWᏃZᎡRꓐBꓚCꓓDꓰEꓝFꓖGꓧHꓲIꓙJꓗKꓡLꓟMꓠNꓳOꓑPꓣRꓢSꓔTꓴUꓦVꓪWꓫXꓬYꓜZꓮA"
)
_LOOSE = (
    "вbгrкkмmнhпnтtьbъbиuзeэeяrшwщwцuчyѡwұyүyғfқkңhҳxҽeԍgћhђhєe"
    "αaβbγyεeηnθoικιiκkμuπnσoςcτtυuχxωwϝfϸpΔAΛAΣEΠN"
    "աwզqեtգqԵEդnսuքpՏSՕOԼLՍUאxסoח nוl"
)


def _pairs(text: str) -> dict[str, str]:
    return {a: b for a, b in zip(text[::2], text[1::2]) if b.isascii() and b.isalpha()}


def _with_capitals(table: dict[str, str]) -> dict[str, str]:
    """Where a small letter looks Latin, its capital counts as well: what is one word must not depend on case."""
    more = {a.upper(): b.upper() for a, b in table.items() if len(a.upper()) == 1 and a.upper() != a}
    # Small letters that fold to letters of the table: Cyrillic of old prints, Cherokee.
    for code in (*range(0x1C80, 0x1C89), *range(0x13F8, 0x13FE), *range(0xAB70, 0xABC0)):
        folded = chr(code).casefold()
        if folded in table or folded in more:
            more[chr(code)] = (table.get(folded) or more[folded]).lower()
    return {**more, **table}


_EXACT_LATIN = _with_capitals(_pairs(_EXACT))
_LOOKS_LATIN = {**_with_capitals(_pairs(_LOOSE)), **_EXACT_LATIN}
_LATIN_TABLE = str.maketrans(_LOOKS_LATIN)

_NAMED = re.compile(
    r"(?:MODIFIER LETTER )?LATIN (?:(SMALL|CAPITAL) LETTER|LETTER (?:SMALL CAPITAL)) "
    r"(?:(?:REVERSED|TURNED|INVERTED|OPEN|SCRIPT|DOTLESS|LONG|SIDEWAYS|INSULAR|BARRED|CLOSED) )*([A-Z])(?: WITH .*)?$"
    r"|(?:NEGATIVE (?:SQUARED|CIRCLED)|CROSSED NEGATIVE SQUARED) LATIN (CAPITAL) LETTER ([A-Z])$"
    r"|REGIONAL INDICATOR SYMBOL (LETTER) ([A-Z])$"
)
# Upside-down letters of which the name does not say what they are read as, invisible letters, and marks of quotation.
_SPECIAL = {
    **_pairs("ɐaɔcǝeɟfƃgɥhᴉiɾrʞkɯmɹrʇtʌvʍwʎyɡgɩiıiʟlꞁlŋnæaœo"),
    "\u115f": "", "\u1160": "", "\u3164": "", "\uffa0": "", "\u2800": " ", "\u180e": "",
    "‘": "'", "’": "'", "‚": "'", "‛": "'", "ʼ": "'", "′": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"',
    "ϲ": "c", "Ϲ": "C", "æ": "ae", "œ": "oe", "Æ": "AE", "Œ": "OE", "ß": "ss", "ẞ": "SS", "þ": "th", "Þ": "TH",
    "ð": "d", "Ð": "D", "−": "-",
    "\u2028": "\n", "\u2029": "\n", "\x85": "\n", "\x0b": "\n", "\x0c": "\n", "\r": "\n", "\n": "\n", "\t": " ",
}  # fmt: skip


def _plain(char: str) -> str:
    """One character as plain text."""
    if "\u3400" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0002f7ff":
        return char  # Chinese: the most of all characters, and none of them is another form of one
    found = _SPECIAL.get(char)
    if found is not None:
        return found
    kind = unicodedata.category(char)
    if kind in ("Mn", "Me", "Cf", "Cc") or "\U000e0000" <= char <= "\U000e0fff":
        return ""
    if kind == "Cn":
        return char
    if kind == "Zs":
        return " "
    if kind == "Pd":
        return "-"
    named = _NAMED.match(unicodedata.name(char, "")) if kind[0] in "LS" and not char.isascii() else None
    if named:
        letter = named[2] or named[4] or named[6]
        return letter.lower() if char.islower() or named[1] == "SMALL" or named[5] else letter
    form = unicodedata.normalize("NFKD", char)
    return char if form == char else "".join(map(_plain, form))


class _Table(dict[int, str]):
    """A table for `str.translate` that is worked out as characters occur, and stays small."""

    ROOM = 1 << 16  # 10 MB at most; no everyday text comes near to it

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def __missing__(self, code: int) -> str:
        value: str = self.function(chr(code))  # type: ignore[operator]
        if len(self) < self.ROOM:
            self[code] = value
        return value


def _small(char: str) -> str:
    """One clean character in lower case, and clean again: folding may bring marks or look-alikes of its own."""
    folded = char.casefold()
    return folded if folded == char else "".join(map(_plain, folded))


_PLAIN = _Table(_plain)
_SMALL = _Table(_small)
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
# Letters in a row of which one is not ASCII; looked at only from the first one on, or time would grow with the square.
_FOREIGN = re.compile(r"(?<![^\W\d_])[A-Za-z]*+[^\W\d_A-Za-z][^\W\d_]*+")


def clean(text: str) -> str:
    """A text in plain characters; its case, lines and runs of spaces stay. Linear, and the same if done twice."""
    if text.isascii():
        return text.translate(_PLAIN) if _CONTROL.search(text) else text
    text = text.translate(_PLAIN)
    return text if text.isascii() else _FOREIGN.sub(_latin, text)


def small(text: str) -> str:
    """A clean text in lower case, character by character."""
    return text.lower() if text.isascii() else text.translate(_SMALL)


def exact_look_alikes() -> dict[str, str]:
    """Latin letters, each with the characters of other scripts that look exactly like it."""
    found: dict[str, str] = {}
    for char, letter in _EXACT_LATIN.items():
        # Of those that change their looks with their case none: they may be put into the other.
        other = char.swapcase()
        if char < "\uab70" and _plain(char) == char and (other == char or _EXACT_LATIN.get(other) == letter.swapcase()):
            found[letter] = found.get(letter, "") + char
    return found


def lengths(text: str) -> list[int]:
    """How many characters of `clean(text)` each character of `text` became."""
    return [len(_PLAIN[ord(char)]) for char in text]


def small_lengths(text: str) -> list[int]:
    """How many characters of `small(text)` each character of `text` became."""
    return [len(_SMALL[ord(char)]) for char in text]


CHUNK = 4096
"""Characters that are mapped at once to find where one came from, instead of a list of all lengths."""


def before_clean(text: str, start: int, end: int) -> tuple[int, int]:
    """From a span of `clean(text)` to the span of the characters of `text` that became it."""
    return _before(_PLAIN, lengths, text, start, end)


def before_small(text: str, start: int, end: int) -> tuple[int, int]:
    """From a span of `small(text)` to the span of the characters of the clean `text` that became it."""
    return _before(_SMALL, small_lengths, text, start, end)


_Lengths = Callable[[str], list[int]]


def _before(table: _Table, count: _Lengths, text: str, start: int, end: int) -> tuple[int, int]:
    first = _source(table, count, text, start)
    last = first if end <= start + 1 else _source(table, count, text, end - 1)
    return min(first, len(text)), min(last + 1, len(text))


def _source(table: _Table, count: _Lengths, text: str, place: int) -> int:
    """The character of `text` that became the one at `place`; len(text) where there is none."""
    for chunk in range(0, len(text), CHUNK):
        part = text[chunk : chunk + CHUNK]
        size = len(part.translate(table))
        if place < size:
            # What became nothing is passed over: the first whose end lies behind the place.
            return chunk + bisect_right(list(accumulate(count(part))), place)
        place -= size
    return len(text)


def _latin(match: re.Match[str]) -> str:
    word = match[0]
    if any(char.isascii() for char in word):
        return word.translate(_LATIN_TABLE)
    return word.translate(_LATIN_TABLE) if all(char in _EXACT_LATIN for char in word) else word
