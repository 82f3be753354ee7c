"""A figure that a bench measures."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A measured value. `least` and `most`: where one is given, a value beyond it is wrong, and not merely slow."""

    name: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None

    @property
    def right(self) -> bool:
        """False beyond a bound, and for a value that is not a number."""
        return (self.value == self.value and (self.least is None or self.value >= self.least)
                and (self.most is None or self.value <= self.most))

    @property
    def bound(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        return " and ".join(f"{word} {x:g}" for word, x in bounds if x is not None)

    def __str__(self) -> str:
        return f"{self.name}: {number(self.value)} {self.unit} {self.bound}".rstrip()


def number(value: float) -> str:
    """Four digits of a value, more where it has more before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
