"""What English looks like, letter pair by letter pair: enough to tell it from its rot13 and from its reversal.

The table holds log P(a, b), the joint probability of neighbouring letters with the gap between words as a letter of its
own, counted over the project's contrast pairs (about 345,000 letters). Being joint it can be read in both directions.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Row a, column b, each "gap, a, b, ... z"; a character of code c stands for (c - 35) / 7 - 13 nats, one less above 92.
_TABLE = (
    "_d[^]V^W_bKPY`X^]HYbfSQa6S9" "_#PTS9MQ.T#SWQ`.P2YX_JMF<U:" "IO931T+#.I.#M#+T##L>7M(+#J#" "HW+F(T(#XL#QM(#W.#OAQJ++#A#"
    "aP85GW7C#Q+(E>?W6(NN5G=9#I#" "hYEQWULH>L1AWQZMO8`[WAOMRM2" "WN#+#OK(#S##G##W##Q5KH#+#6#" "XM##+U#DPP#(B.GL3#MG6J#(#>#"
    "Y]?/;b###X##962](+J9MG###H#" "[KGWRRNP(+2JUOaQK3QY^:Q(B#?" "#?###A###/#####C###1#E(####" "U;2#.V.1#N#+:8F6/#4K23#/#6#"
    "ZV7<SZE.+W#EXC2UH#1NII<6#N#" "XVH.1[4+#O##2I6QN#3G2I#/#W#" "bO6O[YAY8P8JD5GT8(6SYIF1(J1" "`GHKPJUK6J7LSW]SR#]QU]LZ@A("
    "TS/7:T9#KN#.U61RK#QJKK((#C#" "6###########/#####/##I(####" "`V>GP^;F;Y(LFKLW=+GTQNF5#O(" "dR=O9Y43UR#KIFEUL82R]O.I#E("
    "eU<G.^93cW#+F?>]:#RSLM#J+L/" "QDGIJL;M(J#5SMS:N(VTU###2A6" ";F##2Y###O###+#J+##+#3##+1#" "YT(#:S+#YV#/;#JS##RE.####7#"
    "K@#;#>##/?#####+J##/H6##+.#" "`6;:+J41#B##@?7SB#<LC##8###" "86###=###8##6##5####(1###4;"
)  # fmt: skip

COST = 9.0
"""Nats that a change between plain and disguised text costs, and half of it at the beginning or end of the text."""

_WORD = re.compile(r"\S+")


class _Pairs:
    """The gains of reading text as rot13, or as reversed, in nats a pair of letters: float32 [2, 27 * 27]."""

    def __init__(self) -> None:
        import numpy as np

        codes = np.frombuffer(_TABLE.encode("ascii"), np.uint8).astype(np.float32)
        table = ((codes - (codes > 92) - 35) / 7 - 13).reshape(27, 27)
        rotated = np.array([0, *range(14, 27), *range(1, 14)])
        self.table = table.ravel()
        self.gains = np.stack([(table[np.ix_(rotated, rotated)] - table).ravel(), (table.T - table).ravel()])
        self.letters = np.zeros(128, np.int32)
        for letter in range(26):
            self.letters[ord("a") + letter] = self.letters[ord("A") + letter] = letter + 1


_pairs: list[_Pairs] = []


HOW = ("rot13", "reversed")


def disguised(text: str, how: str) -> list[tuple[int, int]]:
    """The stretches of a text that are better English under `how` (`rot13`, `reversed`) than as they stand.

    Two states, plain and disguised, with the cost of a change, and the most likely path through the words (Viterbi 1967);
    a bound that is taken over the whole text at once says first whether any path could leave `plain`.

    Returns:
        Spans of whole words in order. Linear in the length of the text.
    """
    return _both(text)[HOW.index(how)]


@lru_cache(maxsize=1)  # three decoders ask about every text
def _both(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    import numpy as np

    pairs = _codes(text)
    total = np.zeros((2, len(pairs) + 1), np.float64)
    np.cumsum(_known().gains.take(pairs, axis=1), axis=1, out=total[:, 1:])
    # The largest gain of any stretch of text: the least that it must pay for is a change at either end.
    most = (total - np.minimum.accumulate(total, axis=1)).max(axis=1).tolist()
    if max(most) <= COST:
        return [], []
    words = [match.span() for match in _WORD.finditer(text)]
    # A word's own pairs and those with the gaps on both of its sides; place i lies before letter i.
    starts, ends = np.array(words).T
    gains = total[:, ends + 1] - total[:, starts]
    found = [_best_path(words, row.tolist()) if gain > COST else [] for row, gain in zip(gains, most)]
    return found[0], found[1]


def likelihood(text: str) -> float:
    """The logarithm of a text's probability, pair of letters by pair: comparable between texts of one length."""
    return float(_known().table[_codes(text)].sum())


def _known() -> _Pairs:
    if not _pairs:
        _pairs.append(_Pairs())
    return _pairs[0]


def _codes(text: str) -> np.ndarray:
    """The pairs at the len(text) + 1 places between two letters, as indices of the table."""
    import numpy as np

    codes = np.zeros(len(text) + 2, np.int32)
    codes[1:-1] = _known().letters[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    pairs: np.ndarray = codes[:-1] * 27 + codes[1:]
    return pairs


def _best_path(words: list[tuple[int, int]], gains: list[float]) -> list[tuple[int, int]]:
    plain, hidden = 0.0, -COST / 2  # the best gain of a path that ends in either state; an end costs half a change
    steps: list[tuple[bool, bool]] = []
    for gain in gains:
        from_hidden = hidden - COST > plain
        from_plain = plain - COST > hidden
        steps.append((from_hidden, from_plain))
        plain, hidden = (hidden - COST if from_hidden else plain), (plain - COST if from_plain else hidden) + gain
    state = hidden - COST / 2 > plain
    spans: list[tuple[int, int]] = []
    for at in range(len(words) - 1, -1, -1):
        previous = steps[at][0] if not state else not steps[at][1]
        if state:
            if not spans or spans[-1][0] != at + 1:
                spans.append((at, at))
            else:
                spans[-1] = (at, spans[-1][1])
        state = previous
    return [(words[a][0], words[b][1]) for a, b in reversed(spans)]
