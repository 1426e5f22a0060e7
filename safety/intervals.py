"""How sure a counted share is."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def wilson(hits: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a share of `hits` in `count` (Wilson 1927), 95 % by default; (0, 1) where nothing was counted.

    Unlike p +- z sqrt(p (1 - p) / n) it stays within [0, 1] and has a width where nothing, or everything, was hit.

    Raises:
        ValueError: hits is not from 0 to count.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"{hits} of {count} is no share")
    if not count:
        return 0.0, 1.0
    p, square = hits / count, z * z
    middle = (p + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(p * (1 - p) / count + square / (4 * count * count))
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == count else middle + half)
