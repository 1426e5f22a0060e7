"""Disguises for text by name, the forward direction of what `decode` and `characters` undo.

`apply(name, text, rng)` is deterministic given the state of `rng`. What is random is where a disguise is put on, never
whether it can be taken off: of those in `INVERTIBLE` some view of the result is the canonical form of the text, as long as
the text has no such marks of its own. Training augments with them, evaluation and red team measure with them.
"""

from __future__ import annotations

import base64 as _b64
import codecs
import random
from collections.abc import Callable

from safety.characters import exact_look_alikes
from safety.decode import MORSE

_LEET = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
_MARKS = "*~^|`"


def base64(text: str, rng: random.Random) -> str:
    """UTF-8 in base64."""
    return _b64.b64encode(text.encode("utf-8")).decode("ascii")


def hex(text: str, rng: random.Random) -> str:
    """UTF-8 in hexadecimal digits."""
    return text.encode("utf-8").hex()


def url(text: str, rng: random.Random) -> str:
    """UTF-8, every byte behind a percent sign."""
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8"))


def rot13(text: str, rng: random.Random) -> str:
    """The alphabet turned by half."""
    return codecs.encode(text, "rot13")


def morse(text: str, rng: random.Random) -> str:
    """Morse code, a slash between words; what it has no code for is dropped."""
    words = (" ".join(MORSE[char] for char in word.lower() if char in MORSE) for word in text.split())
    return " / ".join(filter(None, words))


def reverse(text: str, rng: random.Random) -> str:
    """Backwards."""
    return text[::-1]


def leet(text: str, rng: random.Random) -> str:
    """Digits for letters, nine times of ten."""
    return "".join(_LEET.get(char.lower(), char) if rng.random() < 0.9 else char for char in text)


def homoglyph(text: str, rng: random.Random) -> str:
    """Look-alikes of other scripts for half of the letters that have one."""
    table = exact_look_alikes()
    return "".join(rng.choice(table[char]) if char in table and rng.random() < 0.5 else char for char in text)


def zero_width(text: str, rng: random.Random) -> str:
    """Invisible characters behind a third of all."""
    return "".join(char + rng.choice(_INVISIBLE) if rng.random() < 1 / 3 else char for char in text)


def tags(text: str, rng: random.Random) -> str:
    """ASCII as tag characters, which no one sees."""
    return "".join(chr(0xE0000 + ord(char)) if " " <= char <= "~" else char for char in text)


def spaced(text: str, rng: random.Random) -> str:
    """A space between all characters."""
    return " ".join(text)


def fullwidth(text: str, rng: random.Random) -> str:
    """ASCII in the wide forms of East Asian typography."""
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def case(text: str, rng: random.Random) -> str:
    """Each letter in either case."""
    return "".join(char.upper() if rng.random() < 0.5 else char.lower() for char in text)


def punctuation(text: str, rng: random.Random) -> str:
    """Marks between a quarter of the letters that stand side by side."""
    out = []
    for char, following in zip(text, text[1:] + " "):
        inside = char.isascii() and char.isalpha() and following.isascii() and following.isalpha()
        out.append(char + rng.choice(_MARKS) if inside and rng.random() < 0.25 else char)
    return "".join(out)


OBFUSCATIONS: dict[str, Callable[[str, random.Random], str]] = {
    function.__name__: function
    for function in (
        base64,
        hex,
        url,
        rot13,
        morse,
        reverse,
        leet,
        homoglyph,
        zero_width,
        tags,
        spaced,
        fullwidth,
        case,
        punctuation,
    )
}
NAMES: tuple[str, ...] = tuple(OBFUSCATIONS)

INVERTIBLE: tuple[str, ...] = tuple(name for name in NAMES if name not in ("leet", "morse"))
"""Those that lose nothing but case: leet takes digits for letters, morse drops what it has no code for."""

_LOST = {
    "case": {"base64"},
    "leet": {"base64", "hex", "url"},
    "morse": {"base64", "homoglyph", "tags", "spaced", "fullwidth"},
}


def apply(name: str, text: str, rng: random.Random) -> str:
    """Put one disguise on a text, or several by turns: `base64+reverse` encodes first. Raises KeyError for an unknown name."""
    for part in name.split("+"):
        text = OBFUSCATIONS[part](text, rng)
    return text


def lossy(first: str, second: str) -> bool:
    """Whether `second` destroys what `first` made, for every reader: base64 in lower case has no meaning left."""
    return first in _LOST.get(second, ())
