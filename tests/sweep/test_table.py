"""Tables: columns, picks, grids, and exports that read back exactly."""

from __future__ import annotations

import csv
import json
import os
import sys

import numpy as np
import pytest
from scipy.io import netcdf_file

from toys import POINTS, guilty, random_rows
from ufm import sweep


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return sweep.run(random_rows, POINTS, out=tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """x = 1..4, of which 3 failed."""
    out = tmp_path_factory.mktemp("holes")
    return sweep.run(guilty, [{"x": x, "folder": str(out)} for x in range(1, 5)], out=out)


def of(**columns):
    """A table with these columns of results, a point {"i": row} each."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sweep.Table([{"i": i} for i in range(len(rows))], rows, [None] * len(rows), "1")


def test_columns_have_the_types_of_their_values(table):
    kinds = {name: (table[name].dtype.kind, table[name].shape) for name in table.names}
    assert kinds == {
        "depth": ("i", (28,)),
        "kind": ("U", (28,)),
        "lam": ("f", (28,)),
        "value": ("f", (28,)),
        "trace": ("f", (28, 5)),
        "text": ("U", (28,)),
        "sure": ("b", (28,)),
        "none": ("f", (28,)),
        "few": ("b", (28, 2)),
        "some": ("U", (28, 2)),
        "count": ("i", (28, 3)),
        "single": ("f", (28, 5)),
    }
    assert table["single"].dtype == np.float32
    assert len(table) == 28


def test_missing_values_are_nan_and_empty_text():
    odd = of(
        n=[1, None],
        b=[True, None],
        s=["a", None],
        a=[np.arange(2), None],
        t=[np.array(["x"]), None],
        m=[1, "auto"],
        f=[1, 2.5],
        g=[True, 2],
    )
    np.testing.assert_array_equal(odd["n"], [1, np.nan])
    np.testing.assert_array_equal(odd["b"], [1, np.nan])
    np.testing.assert_array_equal(odd["a"], [[0, 1], [np.nan, np.nan]])
    assert [odd[name].tolist() for name in ("s", "t", "m", "f", "g")] == [["a", ""], [["x"], [""]], ["1", "auto"], [1, 2.5], [1, 2]]
    assert odd.values("n") == [1, None]


def test_arrays_of_several_shapes_are_told_apart():
    ragged = of(a=[np.zeros(2), np.zeros(3)], b=[np.zeros(2), 1.0])
    for name in ("a", "b"):
        with pytest.raises(sweep.SweepError, match=f"'{name}' has values of shapes"):
            ragged[name]
    assert ragged.pick([1])["a"].shape == (1, 3)
    assert [len(value) for value in ragged.values("a")] == [2, 3]


def test_picks(table, holes):
    assert table.where(depth=2, kind="a")["lam"].tolist() == sorted(set(table["lam"]))
    assert len(table.pick(table["sure"])) == table["sure"].sum()
    assert len(table.where()) == 28
    assert table.pick([3, 1])["lam"].tolist() == table["lam"][[3, 1]].tolist()
    assert holes.where(y=None)["x"].tolist() == [3]
    assert [point["x"] for point, _ in holes.pick(holes["x"] > 2).failures] == [3]
    assert len(table.pick(np.zeros(28, dtype=bool))["trace"]) == 0
    for wrong in ([True], [0.5], [[0]]):
        with pytest.raises(sweep.SweepError, match=r"table.pick: got .* a mask of 28"):
            table.pick(wrong)
    for call in (lambda: table["lambda"], lambda: table.where(lambda_=1), lambda: table.on_grid("lambda", "depth")):
        with pytest.raises(sweep.SweepError, match=r"no column 'lambda_?'; the columns are: depth, kind, lam"):
            call()


def test_a_grid_from_any_order_of_rows(table):
    part = table.where(kind="b")
    cells = part.pick(np.random.default_rng(0).permutation(len(part))).on_grid("lam", "depth")
    assert cells["lam"].tolist() == sorted(cells["lam"])
    assert cells["depth"].tolist() == [1, 2]
    assert (cells["value"].shape, cells["trace"].shape, cells["status"].shape) == ((2, 7), (2, 7, 5), (2, 7))
    for j, depth in enumerate(cells["depth"]):
        for i, lam in enumerate(cells["lam"]):
            assert cells["value"][j, i] == table.where(kind="b", depth=depth, lam=lam)["value"][0]


def test_what_is_no_full_grid_is_refused(table, holes):
    with pytest.raises(sweep.SweepError, match=r"2 rows have lam=0.001, depth=1, .* pick rows by kind first"):
        table.on_grid("lam", "depth")
    with pytest.raises(sweep.SweepError, match=r"1 of 14 cells have no row, the first at lam=0.001, depth=1"):
        table.where(kind="a").pick(range(1, 14)).on_grid("lam", "depth")
    for axis in ("y", "folder"):
        with pytest.raises(sweep.SweepError, match=r"'y' is no axis|no column|cells have no row|is no axis"):
            holes.on_grid(axis, "y")
    with pytest.raises(sweep.SweepError, match="'trace' is no axis"):
        table.on_grid("trace", "depth")


def test_csv_reads_back_exactly(table, holes, tmp_path):
    with table.to_csv(tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["depth", "kind", "lam", "value", "trace_1"]
    assert [float(row["value"]) for row in rows] == table["value"].tolist()
    assert [[float(row[f"trace_{m}"]) for m in range(1, 6)] for row in rows] == table["trace"].tolist()
    assert [row["some_2"] for row in rows] == ["yé"] * 28
    assert [row["text"] for row in rows] == table["text"].tolist()
    assert {row["status"] for row in rows} == {"ok"}
    with holes.to_csv(tmp_path / "holes.csv").open(newline="") as file:
        assert [(row["x"], row["y"], row["status"]) for row in csv.DictReader(file)][2] == ("3", "", "failed")
    with pytest.raises(sweep.SweepError, match="'a_1'"):
        of(a=[np.zeros(2)], a_1=[1]).to_csv(tmp_path / "twice.csv")


def test_npz_reads_back_exactly(table, tmp_path):
    with np.load(table.to_npz(tmp_path / "rows.npz"), allow_pickle=False) as stored:
        assert stored.files == [*table.names, "status"]
        for name in table.names:
            assert stored[name].dtype == table[name].dtype
            np.testing.assert_array_equal(stored[name], table[name])
    assert np.load(of(file=[1, 2]).to_npz(tmp_path / "file.npz"))["file"].tolist() == [1, 2]


def test_netcdf_reads_back_exactly(table, tmp_path):
    path = table.to_netcdf(tmp_path / "rows.nc")
    with netcdf_file(path, mmap=False) as file:
        assert json.loads(file.ufm_sweep) == {"version": table.version, "rows": 28, "failed": 0}
        for name in ("depth", "lam", "value", "trace", "sure", "few", "count", "single", "none"):
            np.testing.assert_array_equal(file.variables[name][:], table[name])
        assert file.variables["some"].dimensions == ("row", "some_0", "some_1")
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(path, engine="scipy") as data:
        assert data["text"].values.tolist() == table["text"].tolist()
        assert data["some"].values.tolist() == table["some"].tolist()
    large = of(big=[2**40, 1], small=[-(2**31) + 1, 2])
    with netcdf_file(large.to_netcdf(tmp_path / "large.nc"), mmap=False) as file:
        assert (file.variables["big"][:].tolist(), file.variables["small"][:].tolist()) == ([2**40, 1], [-(2**31) + 1, 2])
    for bad, sentence in ((of(n=[2**53 + 1]), "2\\^53"), (of(λ=[1.0]), "ASCII"), (table.pick([]), "no rows")):
        with pytest.raises(sweep.SweepError, match=sentence):
            bad.to_netcdf(tmp_path / "bad.nc")
    assert not (tmp_path / "bad.nc").exists()


def test_xarray_has_the_points_as_coordinates(table, monkeypatch):
    pytest.importorskip("xarray")
    data = table.to_xarray()
    assert set(data.coords) == {"depth", "kind", "lam"}
    assert set(data.data_vars) == {*table.names, "status"} - {"depth", "kind", "lam"}
    for name in table.names:
        np.testing.assert_array_equal(data[name].values, table[name])
    assert json.loads(data.attrs["ufm_sweep"])["rows"] == 28
    cube = data.set_index(row=["depth", "kind", "lam"])["value"].unstack("row")
    assert cube.shape == (2, 2, 7)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"ufm\[export\]"):
        table.to_xarray()


@pytest.mark.parametrize("kind", ["csv", "npz", "netcdf"])
def test_an_export_appears_whole_or_not_at_all(table, tmp_path, monkeypatch, kind):
    path = tmp_path / "rows"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(sweep.CannotWrite, match="No space left"):
        getattr(table, f"to_{kind}")(path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("rows", "old")]
    with pytest.raises(sweep.CannotWrite, match="nowhere"):
        getattr(table, f"to_{kind}")(tmp_path / "nowhere" / "rows")
