"""Boundaries by bisection: on each row of a map, the place where the sign of a result changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ufm.sweep.errors import BadPoint, SweepError
from ufm.sweep.points import Point, checked
from ufm.sweep.run import Engine
from ufm.sweep.table import Table
from ufm.sweep.work import Function


def refine(
    function: Function,
    rows: Iterable[Mapping[str, Any]],
    *,
    axis: str,
    between: Sequence[tuple[float, float]],
    sign: str,
    out: str | Path,
    steps: int = 12,
    log: bool = False,
    same: Sequence[str] = (),
    executor: Executor | None = None,
    block: int | None = None,
    retry_failed: bool = False,
    version: str | None = None,
    label: str | None = None,
    durability: str = "process",
    options: Mapping[str, Any] | None = None,
) -> Table:
    """Halve each row's interval `steps` times around the change of sign of the result named `sign` along `axis`.

    rows: points without `axis`; between: (low, high) per row, 0 < low < high if log (halved in the logarithm). sign: a number, of which
    the sign counts, or a boolean: 1 for True, -1 for False. The rows of a step are computed together, by the engine and store of `run`.
    Returns per row low, high, their (geometric) mean estimate, sign_low and sign_high in {-1, 0, 1, NaN}, and bracketed: False, and
    nothing refined, where the ends do not differ. A row ends as "failed" where a point on it raises or has NaN, with the interval so far.
    Raises what `run` does, and SweepError where the rows of `function` have no such column.
    """
    listed = [checked(row, f"refine: row {i}") for i, row in enumerate(rows)]
    if len(listed) != len(between) or steps < 1:
        raise SweepError(
            f"refine: got {len(listed)} rows, {len(between)} intervals and {steps} steps; give an interval per row, steps >= 1"
        )
    brackets = [Bracket(row, axis, float(low), float(high), log) for row, (low, high) in zip(listed, between, strict=True)]
    with Engine(function, Path(out), tuple(same), executor, block, retry_failed, version, label, durability, options) as engine:
        for bracket, (low, high) in zip(brackets, _pairs(_signs(engine, sign, _ends(brackets))), strict=True):
            bracket.sign_low, bracket.sign_high = low[0], high[0]
            bracket.error = low[1] or high[1]
        for _ in range(steps):
            going = [(bracket, bracket.middle) for bracket in brackets if bracket.divisible]
            for (bracket, place), found in zip(going, _signs(engine, sign, going), strict=True):
                bracket.halve(place, *found)
    return Table(listed, [bracket.outcome() for bracket in brackets], [bracket.error for bracket in brackets], engine.code)


@dataclass
class Bracket:
    """What is known of a row: the signs at the two ends of an interval, and the error that ended its refinement."""

    row: Point
    axis: str
    low: float
    high: float
    log: bool
    sign_low: float = math.nan
    sign_high: float = math.nan
    error: str | None = None

    def __post_init__(self) -> None:
        if not (-math.inf < self.low < self.high < math.inf and (self.low > 0 or not self.log)):
            rule = "0 < low < high < inf" if self.log else "finite numbers low < high"
            raise SweepError(f"refine: an interval is ({self.low!r}, {self.high!r}), but needs {rule}")
        if taken := {self.axis, *self.outcome()} & set(self.row):
            raise BadPoint(f"refine: the row {self.row!r:.120} has a key {min(taken)!r}, but that name is refine's own here; leave it out")

    @property
    def middle(self) -> float:
        """Where to look next: the mean of the ends, or their geometric mean."""
        return math.sqrt(self.low) * math.sqrt(self.high) if self.log else self.low / 2 + self.high / 2

    @property
    def bracketed(self) -> bool:
        """Whether the signs at the ends are known and differ."""
        return not math.isnan(self.sign_low) and not math.isnan(self.sign_high) and self.sign_low != self.sign_high

    @property
    def divisible(self) -> bool:
        """Whether there is something to find, and a number between the ends."""
        return self.error is None and self.bracketed and self.low < self.middle < self.high

    def halve(self, place: float, sign: float, error: str | None) -> None:
        """Keep the half whose ends differ."""
        self.error = error
        if error is None and sign == self.sign_high:
            self.high = place
        elif error is None:
            self.low, self.sign_low = place, sign

    def outcome(self) -> dict[str, Any]:
        """The row of the answer."""
        ends = {"low": self.low, "high": self.high, "estimate": self.middle}
        return ends | {"sign_low": self.sign_low, "sign_high": self.sign_high, "bracketed": self.bracketed}


Found = tuple[float, str | None]  # a sign, or NaN and why


def _ends(brackets: Sequence[Bracket]) -> list[tuple[Bracket, float]]:
    return [(bracket, place) for bracket in brackets for place in (bracket.low, bracket.high)]


def _pairs(found: Sequence[Found]) -> list[tuple[Found, Found]]:
    return list(zip(found[::2], found[1::2], strict=True))


def _signs(engine: Engine, name: str, asked: Sequence[tuple[Bracket, float]]) -> list[Found]:
    table = engine.evaluate([{**bracket.row, bracket.axis: place} for bracket, place in asked])
    return [(math.nan, error) if error else _sign(result, name) for result, error in zip(table.results, table.errors, strict=True)]


def _sign(result: Mapping[str, Any], name: str) -> Found:
    value = result.get(name, "missing")
    if isinstance(value, bool):
        return (1.0 if value else -1.0), None
    if value is None or value != value:
        return math.nan, f"refine: {name} is {value} there, which has no sign"
    if not isinstance(value, (int, float)):
        raise SweepError(f"refine: sign={name!r} must name a number or boolean of the rows, which have: {', '.join(result)}")
    return float((value > 0) - (value < 0)), None
