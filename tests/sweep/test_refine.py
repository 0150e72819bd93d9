"""Bisection finds the boundary it should, and says where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from toys import edge
from ufm import sweep


def test_bisection_finds_the_line(tmp_path):
    rows = [{"row": row} for row in (0, 1, 2, 9)]
    for sign in ("height", "above"):
        table = sweep.refine(edge, rows, axis="x", between=[(-1, 3)] * 4, sign=sign, steps=30, out=tmp_path / sign)
        np.testing.assert_allclose(table["estimate"][:3], [0.1, 0.6, 1.1], atol=4 / 2**30)
        assert np.all(table["high"][:3] - table["low"][:3] == 4 / 2**30)
        assert table["bracketed"].tolist() == [True, True, True, False]
        assert table["sign_low"].tolist() == [-1] * 4
        assert table["sign_high"].tolist() == [1, 1, 1, -1]
        assert (table["low"][3], table["high"][3]) == (-1, 3)
        assert len(sweep.load(tmp_path / sign)) == 3 * 32 + 2


def test_bisection_in_the_logarithm_and_to_the_last_bit(tmp_path):
    rows = [{"row": -0.1}]
    one = sweep.refine(edge, rows, axis="x", between=[(1e-6, 1.0)], sign="height", steps=3, log=True, out=tmp_path)
    assert one["high"][0] / one["low"][0] == pytest.approx(10 ** (6 / 8))
    assert one["estimate"][0] == pytest.approx((one["low"][0] * one["high"][0]) ** 0.5)
    end = sweep.refine(edge, rows, axis="x", between=[(1e-6, 1.0)], sign="height", steps=200, log=True, out=tmp_path)
    assert 0 < end["high"][0] - end["low"][0] < 1e-15


def wall(points, seeds):
    """NaN between 1 and 2, an error between 4 and 5; the sign changes at 1.5 and at 4.5."""
    for point in points:
        if 4 < point["x"] < 5:
            raise ArithmeticError("no value here")
    return [{"s": np.nan if 1 < p["x"] < 2 else float(p["x"] >= 4.5 or p["x"] < 1.5) - 0.5, "t": "text"} for p in points]


def test_a_row_that_meets_nan_or_an_error_fails_with_the_interval_so_far(tmp_path):
    table = sweep.refine(wall, [{}, {"n": 1}, {"n": 2}], axis="x", between=[(0.5, 2.5), (3.0, 6.0), (1.2, 3)], sign="s", out=tmp_path)
    assert table.status.tolist() == ["failed", "failed", "failed"]
    assert "NaN" in table.errors[0] or "nan" in table.errors[0]
    assert "no value here" in table.errors[1]
    assert table["bracketed"].tolist() == [True, True, False]
    assert (table["low"].tolist(), table["high"].tolist()) == ([0.5, 3.0, 1.2], [2.5, 6.0, 3.0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"between": [(0, 1)] * 2}, "an interval per row"),
        ({"between": [(1, 0)]}, "low < high"),
        ({"between": [(0, 1)], "log": True}, "0 < low"),
        ({"steps": 0}, "steps"),
        ({"rows": [{"x": 1}]}, "key 'x'"),
        ({"rows": [{"low": 1}]}, "key 'low'"),
        ({"sign": "depth"}, "must name a number"),
        ({"sign": "t"}, "must name a number"),
    ],
)
def test_what_cannot_be_refined_is_refused(tmp_path, change, sentence):
    call = {"rows": [{}], "axis": "x", "between": [(0.5, 2.5)], "sign": "s", "steps": 3, "out": tmp_path} | change
    with pytest.raises(sweep.SweepError, match=sentence):
        sweep.refine(wall, call.pop("rows"), **call)
