"""Points: what they may hold, and seeds that follow from their values alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ufm import sweep
from ufm.sweep.points import canonical, checked, key_of, sort_key

POINT = {"lam": 0.1, "depth": 3, "relu": True, "kind": "µ", "none": None}
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
points = st.dictionaries(st.text(min_size=1).filter(lambda name: name != "status"), values, max_size=4)


def test_seeds_are_what_they_always_were():
    assert canonical(POINT) == '{"depth":3,"kind":"\\u00b5","lam":0.1,"none":null,"relu":true}'
    assert sweep.seed_of(POINT) == 3017755408125521425  # sha256sum of that text
    assert sweep.seed_of({}) == 2452693583222387653


@given(points)
def test_neither_the_order_of_keys_nor_numpy_matters(point):
    again = {name: point[name] for name in reversed(point)}
    again = {name: np.float64(v) if isinstance(v, float) else np.int64(v) if type(v) is int else v for name, v in again.items()}
    assert sweep.seed_of(point) == sweep.seed_of(again) < 2**63
    assert repr(checked(point, "")) == repr(point)


@given(points, points)
def test_different_points_have_different_keys(one, other):
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert (key_of(one) == key_of(other)) is same


def test_one_and_one_point_zero_and_true_are_three_points():
    assert len({sweep.seed_of({"x": x}) for x in (1, 1.0, True, "1")}) == 4
    assert sweep.seed_of({"x": np.float64(1)}) == sweep.seed_of({"x": 1.0})
    assert sweep.seed_of({"x": np.bool_(True)}) == sweep.seed_of({"x": True})


def test_a_grid_is_the_product_with_the_last_axis_fastest():
    assert sweep.grid(a=[1, 2], b=np.array([0.5, 1.5])) == [{"a": 1, "b": 0.5}, {"a": 1, "b": 1.5}, {"a": 2, "b": 0.5}, {"a": 2, "b": 1.5}]
    assert {type(v) for point in sweep.grid(a=np.arange(2), b=np.linspace(0, 1, 3)) for v in point.values()} == {int, float}
    assert sweep.grid() == [{}]


def test_random_points_repeat_grow_and_keep_their_columns():
    axes = dict(x=sweep.uniform(-1, 2), lam=sweep.log_uniform(1e-4, 1e-1), depth=sweep.integers(1, 3), kind=["a", "b"])
    drawn = sweep.random(500, seed=3, **axes)
    assert drawn[:20] == sweep.random(20, seed=3, **axes)
    assert [p["x"] for p in drawn] == [p["x"] for p in sweep.random(500, seed=3, x=axes["x"], other=[1])]
    assert drawn != sweep.random(500, seed=4, **axes)
    assert all(-1 <= p["x"] <= 2 and 1e-4 <= p["lam"] <= 1e-1 for p in drawn)
    assert [len({p[name] for p in drawn}) for name in ("x", "depth", "kind")] == [500, 3, 2]
    assert abs(np.mean([math.log10(p["lam"]) for p in drawn]) + 2.5) < 0.15


def test_points_sort_by_value_not_by_text():
    ranked = [{"x": None}, {"x": -2}, {"x": 0.5}, {"x": 9}, {"x": 10.0}, {"x": "1"}]
    mixed = [ranked[i] for i in (3, 5, 0, 4, 2, 1)]
    assert sorted(mixed, key=sort_key) == ranked


@pytest.mark.parametrize(
    "point",
    [
        {"x": math.nan},
        {"x": np.inf},
        {"x": [1, 2]},
        {"x": {"y": 1}},
        {"x": np.arange(2)},
        {"x": 1j},
        {"x": np.longdouble(1)},
        {"x": 2**63},
        {1: 2},
        {"": 1},
        {"status": 1},
        3,
    ],
    ids=repr,
)
def test_what_no_point_may_hold_is_refused_in_a_sentence(point, tmp_path):
    with pytest.raises(sweep.BadPoint, match=r"point 1 (is|has) .* but (a point|keys)"):
        sweep.run(print, [{"x": 1}, point], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axis", [1, "relu", [], {"a": 1}, [math.nan]], ids=repr)
def test_what_is_no_axis_is_refused(axis):
    with pytest.raises(sweep.BadPoint, match="grid"):
        sweep.grid(x=axis)


@pytest.mark.parametrize("make", [lambda: sweep.uniform(1, 0), lambda: sweep.log_uniform(0, 1), lambda: sweep.integers(0, 1.5)])
def test_empty_ranges_are_refused(make):
    with pytest.raises(sweep.BadPoint, match="needs"):
        make()
