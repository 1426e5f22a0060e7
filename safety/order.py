"""In which of two orders words are English: what was turned word by word has the letters of English either way.

Signs, each of which counts one: a pair of neighbours that stand in one order five times as often as in the other ("to the"), an
end mark on the last word instead of the first, a capital on the first instead of the last. The pairs are those of the
hundred most frequent words of `safety/data/requests/`, with the edges of a text and all other words as a word each,
and counted again by

    python -c "from safety import order, sources; order.write(row.text for row in sources.requests(per_act=2))"
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

TABLE = Path(__file__).parent / "data" / "word_order.json"
EDGE, OTHER = "^", "*"
WORDS, RATIO, LEAST = 100, 5, 20
CLEAR = 2

_WORD = re.compile(r"[a-z0-9']+")
_END = (".", "?", "!", '"')


def direction(text: str) -> int:
    """1 where the words of a text stand in the order of English, -1 where they stand in the opposite one, 0 where it is in doubt.

    Without doubt are `CLEAR` signs and none against them: a text may hold stretches of both orders, one to hide the other.
    """
    words = text.split()
    if not words:
        return 0
    first, last = words[0], words[-1]
    follow = _follow()
    signs = [last.endswith(_END) - first.endswith(_END), first[0].isupper() - last[0].isupper()]
    signs += [(b in follow[a]) - (a in follow[b]) for a, b in pairwise(_known(_words(text), follow))]
    ahead, back = signs.count(1), signs.count(-1)
    return (ahead >= CLEAR and not back) - (back >= CLEAR and not ahead)


def count(texts: Iterable[str]) -> dict[str, list[str]]:
    """The words that stand `RATIO` times as often behind a word as before it, and `LEAST` times at least."""
    listed = [[*_words(text)] for text in texts]
    common = {word for word, _ in Counter(word for words in listed for word in words).most_common(WORDS)}
    seen = Counter(pair for words in listed for pair in pairwise(_known(words, common)))
    follow: dict[str, list[str]] = {word: [] for word in (*sorted(common), EDGE, OTHER)}
    for (a, b), times in sorted(seen.items()):
        if times >= LEAST and times >= RATIO * seen[b, a]:
            follow[a].append(b)
    return follow


def write(texts: Iterable[str], path: Path = TABLE) -> None:
    """Count the words of texts and write the table, a line for each word."""
    rows = ",\n".join(f"{json.dumps(word)}: {json.dumps(' '.join(behind))}" for word, behind in count(texts).items())
    path.write_text("{\n" + rows + "\n}\n", encoding="utf-8")


def _words(text: str) -> Iterator[str]:
    return (word.strip("'") or "'" for word in _WORD.findall(text.lower()))


def _known(words: Iterable[str], common: Container[str]) -> list[str]:
    return [EDGE, *(word if word in common else OTHER for word in words), EDGE]


@cache
def _follow() -> dict[str, set[str]]:
    return {word: set(behind.split()) for word, behind in json.loads(TABLE.read_text(encoding="utf-8")).items()}
