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
    """The stretches of a text that are better English under `how` (`rot13`, `reversed`) than as they stand, or under the other.

    Three states, plain and the two disguises, with the cost of a change, and the most likely path through the words (Viterbi
    1967); a bound that is taken over the whole text at once says first which states a path could be in at all.

    Returns:
        Spans of whole words in order. Linear in the length of the text.
    """
    return _stretches(text)[HOW.index(how)]


@lru_cache(maxsize=1)  # three decoders ask about every text
def _stretches(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    import numpy as np

    pairs = _codes(text)
    total = np.zeros((2, len(pairs) + 1), np.float64)
    np.cumsum(_known().gains.take(pairs, axis=1), axis=1, out=total[:, 1:])
    # The largest gain of any stretch of text: the least that it must pay for is a change at either end.
    most = (total - np.minimum.accumulate(total, axis=1)).max(axis=1)
    states = np.flatnonzero(most > COST).tolist()
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    if states:
        words = [match.span() for match in _WORD.finditer(text)]
        # A word's own pairs and those with the gaps on both of its sides; place i lies before letter i.
        starts, ends = np.array(words).T
        path = _best_path((total[:, ends + 1] - total[:, starts])[states].tolist())
        for start, end, state in path:
            found[states[state]].append((words[start][0], words[end][1]))
    return found


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


def _best_path(gains: list[list[float]]) -> list[tuple[int, int, int]]:
    """The best path through the words: first and last word of every stretch that is disguised, and as what.

    Args:
        gains: Of each disguise, for each word.
    """
    disguises = range(len(gains))
    plain, hidden = 0.0, [-COST / 2] * len(gains)  # the best gain of a path that ends in a state; an end costs half a change
    steps: list[list[int]] = []  # the state before, of plain and of each disguise; -1 is plain
    for word in zip(*gains):
        best = max(disguises, key=hidden.__getitem__)
        into_plain = best if hidden[best] - COST > plain else -1
        into_hidden, changed = (best, hidden[best] - COST) if hidden[best] > plain else (-1, plain - COST)
        steps.append([into_plain, *(at if hidden[at] >= changed else into_hidden for at in disguises)])
        plain, hidden = max(plain, hidden[best] - COST), [max(hidden[at], changed) + word[at] for at in disguises]
    best = max(disguises, key=hidden.__getitem__)
    state = best if hidden[best] - COST / 2 > plain else -1
    stretches: list[tuple[int, int, int]] = []
    for at in range(len(steps) - 1, -1, -1):
        if state >= 0:
            if stretches and stretches[-1][0] == at + 1 and stretches[-1][2] == state:
                stretches[-1] = (at, stretches[-1][1], state)
            else:
                stretches.append((at, at, state))
        state = steps[at][state + 1]
    return stretches[::-1]
