"""Decoders: each finds the stretches of a text that one disguise covers, and says what they hold.

`DECODERS[name](clean, raw)` gives replacements (start, end, text) in order, without overlap; positions are those of the
clean text, for `tags` those of the raw one. All take time linear in the text: the patterns have no two ways to match the
same characters, and each is tried behind a test that an everyday prompt fails: what every match must hold, found in a
fraction of the time.

What was decoded must be text: a hash is not, nor is a long word that happens to be valid base64.
"""

from __future__ import annotations

import binascii
import codecs
import html
import re
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from safety.characters import clean
from safety.english import disguised, likelihood
from safety.order import direction

Replacement = tuple[int, int, str]
Decoder = Callable[[str, str], list[Replacement]]

# base64

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{8,}(?:\n[A-Za-z0-9+/_-]{32,})*={0,2}|={1,2}[A-Za-z0-9+/]{8,}")
_URLSAFE = str.maketrans("-_", "+/")


def _base64(text: str, raw: str) -> list[Replacement]:
    found = []
    for match in _BASE64.finditer(text):
        run = match[0]
        # Short runs are words, unless they say with "=" that they are not.
        if len(run) < 12 and "=" not in run:
            continue
        # base64 turned or reversed looks like any other: it has no letters of English to tell it by.
        decoded = (
            _from_base64(run)
            or _from_base64(run[::-1])
            or _from_base64(codecs.encode(run, "rot13"))
            or _from_base64(codecs.encode(run[::-1], "rot13"))
        )
        if decoded is not None:
            found.append((*match.span(), decoded))
    return found


def _from_base64(run: str) -> str | None:
    run = run.replace("\n", "").strip("=").translate(_URLSAFE)
    # Something may be glued to the front, and one letter that is too many to the end.
    for start in range(4):
        body = run[start:]
        body = body[: len(body) - (len(body) % 4 == 1)]
        try:
            text = _as_text(binascii.a2b_base64(body + "=" * (-len(body) % 4)))
        except ValueError:
            continue
        if text is not None:
            return run[:start] + text
    return None


# hex, binary, decimal codes

_HEX = re.compile(r"(?<![0-9A-Za-z])(?:0x|\\x)?[0-9a-fA-F]{2}(?:[ :,-]?(?:0x|\\x)?[0-9a-fA-F]{2}){5,}(?![0-9A-Za-z])")
_BINARY = re.compile(r"(?<![0-9])[01]{8}(?:[ ,]?[01]{8}){2,}(?![0-9])")
_CODES = re.compile(r"(?<![0-9])[0-9]{2,3}(?:[ ,]{1,2}[0-9]{2,3}){5,}(?![0-9])")
_DIGIT = re.compile("[0-9]")
_NO_HEX = re.compile(r"0x|\\x|[ :,-]")


def _hex(text: str, raw: str) -> list[Replacement]:
    found = []
    for match in _HEX.finditer(text):
        digits = _NO_HEX.sub("", match[0])
        decoded = _as_text(bytes.fromhex(digits)) or _as_text(bytes.fromhex(digits[::-1]))
        if decoded is not None:
            found.append((*match.span(), decoded))
    if not _DIGIT.search(text):
        return found
    for match in _BINARY.finditer(text):
        digits = re.sub("[ ,]", "", match[0])
        decoded = _as_text(int(digits, 2).to_bytes(len(digits) // 8, "big") if len(digits) < 4096 else _bits(digits))
        if decoded is not None:
            found.append((*match.span(), decoded))
    for match in _CODES.finditer(text):
        codes = [int(code) for code in re.findall("[0-9]+", match[0])]
        decoded = _as_text(bytes(codes)) if max(codes) < 256 else None
        # Numbers of two or three digits are common; a text has words, and so blanks or letters only.
        if decoded is not None and sum(map(str.isalpha, decoded)) > 0.7 * len(decoded):
            found.append((*match.span(), decoded))
    return _in_order(found)


def _bits(digits: str) -> bytes:
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


# Percent signs, entities, escapes

_PERCENT = re.compile(r"%[0-9a-fA-F]{2}")
_TOKEN = re.compile(r"\S+")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,8});")
_ESCAPE = re.compile(r"\\u\{?([0-9a-fA-F]{4,6})\}?|\\x([0-9a-fA-F]{2})")


def _url(text: str, raw: str) -> list[Replacement]:
    found: list[Replacement] = []
    if "%" in text and _PERCENT.search(text):
        for match in _TOKEN.finditer(text):
            if _PERCENT.search(match[0]):
                decoded = unquote_to_bytes(match[0].replace("+", " ").encode()).decode("utf-8", "replace")
                found.append((*match.span(), decoded))
    elif "&" in text and _ENTITY.search(text):
        found = [(*match.span(), html.unescape(match[0])) for match in _ENTITY.finditer(text)]
    elif "\\" in text and _ESCAPE.search(text):
        found = [(*match.span(), _character(int(match[1] or match[2], 16))) for match in _ESCAPE.finditer(text)]
    return found


def _character(code: int) -> str:
    return "\ufffd" if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF else chr(code)


# Morse

_MORSE_LETTERS = {
    ".-": "a", "-...": "b", "-.-.": "c", "-..": "d", ".": "e", "..-.": "f", "--.": "g", "....": "h", "..": "i", ".---": "j",
    "-.-": "k", ".-..": "l", "--": "m", "-.": "n", "---": "o", ".--.": "p", "--.-": "q", ".-.": "r", "...": "s", "-": "t",
    "..-": "u", "...-": "v", ".--": "w", "-..-": "x", "-.--": "y", "--..": "z", "-----": "0", ".----": "1", "..---": "2",
    "...--": "3", "....-": "4", ".....": "5", "-....": "6", "--...": "7", "---..": "8", "----.": "9", ".-.-.-": ".",
    "--..--": ",", "..--..": "?", "-.-.--": "!", ".----.": "'", "-..-.": "/", "-.--.": "(", "-.--.-": ")", ".-...": "&",
    "---...": ":", "-.-.-.": ";", "-...-": "=", ".-.-.": "+", "-....-": "-", "..--.-": "_", ".-..-.": '"', ".--.-.": "@",
    "...-..-": "$",
}  # fmt: skip
MORSE = {letter: code for code, letter in _MORSE_LETTERS.items()}
_MORSE_MARKS = str.maketrans("•·●–—_−", "...----")
_MORSE = re.compile(r"(?<!\S)[.-]{1,7}(?:[ \n/|]{1,9}[.-]{1,7}){3,}(?!\S)")
_MORSE_PART = re.compile(r"([.-]+)([ \n/|]*)")


def _marked(text: str) -> str:
    """A text in which all that serves as a dot or a dash is one; empty where there are too few of them for Morse code."""
    if text.isascii():
        text = text.replace("_", "-")
        return text if text.count("-") + text.count(".") > 3 else ""
    return text.translate(_MORSE_MARKS)


def _morse(text: str, raw: str) -> list[Replacement]:
    marked = _marked(text)
    found = []
    for match in _MORSE.finditer(marked):
        letters = []
        for part in _MORSE_PART.finditer(match[0]):
            gap = part[2]
            letters.append(_MORSE_LETTERS.get(part[1], "\ufffd"))
            if "/" in gap or "|" in gap or "\n" in gap or len(gap) > 2:
                letters.append(" ")
        found.append((*match.span(), "".join(letters)))
    return found


# Invisible characters that spell something

_TAGS = re.compile("[\U000e0020-\U000e007e]+|[\ufe00-\ufe0f\U000e0100-\U000e01ef]{4,}")


def _tags(text: str, raw: str) -> list[Replacement]:
    if raw.isascii():
        return []
    found = []
    for match in _TAGS.finditer(raw):
        run = match[0]
        if run[0] < "\U000e0100" and run[0] > "\ufe0f":
            found.append((*match.span(), "".join(chr(ord(char) - 0xE0000) for char in run)))
        else:
            # Variation selectors 1 to 256 as bytes.
            decoded = _as_text(bytes(ord(c) - 0xFE00 if c <= "\ufe0f" else ord(c) - 0xE0100 + 16 for c in run))
            if decoded is not None:
                found.append((*match.span(), decoded))
    return found


# Letters set apart

_SPACED = re.compile(r"(?<!\S)\S(?:[ \n]{1,9}\S(?!\S)){3,}")
_SPACES = re.compile(r"[ \n]+")
_DOTTED = re.compile(r"(?<![^\W_])[^\W_](?:[ ._*|/,~=+-]{1,3}[^\W_](?![^\W_])){3,}")
_DOTS = re.compile(r"[ ._*|/,~=+-]+")


def _spaced(text: str, raw: str) -> list[Replacement]:
    if len(raw) > 8 and raw[1:20:2].isspace() and raw[1::2].isspace():
        # Every second character, exactly: what stands between may be spaces, too, or invisible.
        return [(0, len(text), raw[::2])]
    found: list[Replacement] = []
    for match in _SPACED.finditer(text):
        found.append((*match.span(), _SPACES.sub(lambda gap: "" if gap[0] == " " else "\n" if "\n" in gap[0] else " ", match[0])))
    if not found:
        for match in _DOTTED.finditer(text):
            found.append((*match.span(), _DOTS.sub(lambda gap: "" if len(gap[0]) == 1 else " ", match[0])))
    return found


_MARK = re.compile(r"(?<=[A-Za-z])[*_~^|`=+#\\\"<>{}\[\]]{1,3}(?=[A-Za-z])|(?<=[A-Za-z0-9])[*~^|`]{1,3}(?=[A-Za-z0-9])")

_ANY_MARK = re.compile(r"[*_~^|`=+#\\\"<>{}\[\]]")


def _marks(text: str, raw: str) -> list[Replacement]:
    """Marks inside of words, but for those that words have: `b*o_m~b`."""
    return [(*match.span(), "") for match in _MARK.finditer(text)] if _ANY_MARK.search(text) else []


# Digits for letters

_LEET_TABLE = str.maketrans("01345789@$!|+", "oieastbgasilt")
_LEET_DIGIT = re.compile(r"[0134578@$!|+]")
_LEET_SIGN = re.compile(
    r"[A-Za-z][0134578@$!|+]+[A-Za-z]|(?<![A-Za-z0-9@$])[0134578@$]+[A-Za-z]{3}|(?<![A-Za-z0-9@$])[0134578@$][A-Za-z]{2}[0134578@$]"
)
_LEET_TOKEN = re.compile(r"[A-Za-z0-9@$!|+']+")
_LEET_WORDS = {
    "a", "i", "as", "at", "be", "go", "ie", "if", "is", "it", "its", "so", "to", "too", "see", "set", "sit", "tie", "toe", "eat",
    "tea", "oat", "bias", "best", "test", "state", "base", "basis", "site", "boss", "goes", "bite", "beat", "boat", "gas", "big",
    "bag", "bit", "bat", "bet", "get", "got", "goat", "sea", "seat", "east", "ease", "taste", "toast", "oasis", "assist",
}  # fmt: skip


def _leet(text: str, raw: str) -> list[Replacement]:
    if not _LEET_DIGIT.search(text) or not _LEET_SIGN.search(text):
        return []
    found = []
    for match in _LEET_TOKEN.finditer(text):
        token = match[0]
        if token.isalpha():
            continue
        end = len(token)
        while end > 1 and token[end - 1] in "!|+":
            end -= 1
        token = token[:end]
        plain = token.translate(_LEET_TABLE)
        if plain != token and (any(map(str.isalpha, token)) or plain in _LEET_WORDS or plain[::-1] in _LEET_WORDS):
            found.append((match.start(), match.start() + end, plain))
    return found


# Turned text

# What has no English letters to tell it by: percent signs and hexadecimal digits turned by 13, percent signs reversed.
_TURNED = re.compile(
    r"(?=(?:%[0-9]{2}){0,8}%[0-9]?[n-sN-S])(?:%[0-9n-sN-S]{2}){4}|(?<![0-9A-Za-z])(?=[0-9]*[n-sN-S])[0-9n-sN-S]{12,}(?![0-9A-Za-z])"
)
_TURNED_RUN = re.compile("[0-9n-sN-S]{12}")
_REVERSED = re.compile(r"(?<![%0-9A-Za-z])(?:[0-9a-fA-F]{2}%){4}")


def _rot13(text: str, raw: str) -> list[Replacement]:
    if not raw.isascii():
        # Only ASCII letters were turned, and look-alikes may stand between them.
        turned = clean(codecs.encode(raw, "rot13"))
        english = likelihood(turned) > max(likelihood(text), likelihood(codecs.encode(text, "rot13")))
        if english and _disguised(codecs.encode(turned, "rot13"), "rot13") == [(0, len(turned))]:
            return [(0, len(text), turned)]
    spans = _disguised(text, "rot13")
    if not spans and ("%" in text or _TURNED_RUN.search(text)) and _TURNED.search(text):
        spans = [(0, len(text))]
    return [(a, b, codecs.encode(text[a:b], "rot13")) for a, b in spans]


def _reverse(text: str, raw: str) -> list[Replacement]:
    spans = _backwards(text)
    if not spans and (("%" in text and _REVERSED.search(text)) or _MORSE.search(_marked(text))):
        return [(0, len(text), text[::-1])]
    return [(a, b, text[a:b][::-1]) for a, b, way in spans if way >= 0]


def _reverse_words(text: str, raw: str) -> list[Replacement]:
    """Each word turned by itself: the words of what `_reverse` gives, in the opposite order."""
    return [(a, b, _TOKEN.sub(lambda word: word[0][::-1], text[a:b])) for a, b, way in _backwards(text) if way <= 0]


@lru_cache(maxsize=1)  # both decoders ask about every text
def _backwards(text: str) -> list[tuple[int, int, int]]:
    """The stretches of turned letters, and in which order the words stand once all of the stretch is turned (`order`)."""
    return [(a, b, direction(text[a:b][::-1])) for a, b in _disguised(text, "reversed")]


def _disguised(text: str, how: str) -> list[tuple[int, int]]:
    spans = disguised(text, how)
    # Where most of a text is disguised the rest is too, if letter pairs do not say so of every word.
    if spans and 2 * sum(end - start for start, end in spans) > len(text):
        return [(0, len(text))]
    return spans


# What the decoders share

_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


def _as_text(data: bytes) -> str | None:
    """Decoded bytes as text, or None where they are none."""
    if len(data) > 3 and not data[1] and not any(data[1:40:2]) and any(data[:40:2]):
        data = data[: len(data) // 2 * 2].decode("utf-16-le", "replace").encode("utf-8", "replace")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    # Invisible characters are text: they may be a disguise as well.
    sample = text[:4096]
    return text if len(text) > 2 and len(_NO_TEXT.findall(sample)) <= 0.05 * len(sample) else None


def _in_order(found: list[Replacement]) -> list[Replacement]:
    found.sort()
    return [item for at, item in enumerate(found) if at == 0 or item[0] >= found[at - 1][1]]


ENCODINGS: dict[str, Decoder] = {"base64": _base64, "hex": _hex, "url": _url, "morse": _morse, "tags": _tags}
"""Decoders of what no one writes by chance; behind `normalize.DEPTH` of them one more is not followed but blocked."""

DECODERS: dict[str, Decoder] = {
    **ENCODINGS,
    "spaced": _spaced,
    "marks": _marks,
    "leet": _leet,
    "rot13": _rot13,
    "reverse": _reverse,
    "reverse_words": _reverse_words,
}
