"""Phase diagrams: what is drawn is what was given, unproven cells are never coloured, equal figures are equal files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ufm.plots import REGIME_COLOURS, Boundary, PhaseMap, phase_diagram, phase_legend, style
from ufm.records import Regime

X, Y = np.geomspace(1, 100, 5), np.geomspace(1e-3, 1e-1, 3)
CODES = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [2, 2, 2, 2, -1]])
CERTIFIED = np.ones((3, 5), dtype=bool)
CERTIFIED[0, 1] = CERTIFIED[1, 3] = False
LINE = Boundary([1, 10, 100], [1e-2, 5e-3, 1e-3], "theory")


def make(**changes):
    given = {"x": X, "y": Y, "codes": CODES, "names": ["a", "b", "c"], "colours": ["#56B4E9", "#E69F00", "#D9D9D9"], "certified": CERTIFIED}
    return PhaseMap(**given | {"boundaries": [LINE]} | changes)


def test_cells_hold_the_codes_and_mask_what_is_unproven_or_unknown():
    drawn = phase_diagram(make())
    array = np.ma.masked_array(drawn.cells.get_array()).reshape(CODES.shape)
    unproven = ~CERTIFIED | (CODES < 0)
    np.testing.assert_array_equal(np.ma.getmaskarray(array), unproven)
    np.testing.assert_array_equal(array.compressed(), CODES[~unproven])


def test_each_code_has_its_own_colour():
    drawn = phase_diagram(make())
    colours = drawn.cells.to_rgba(np.array([0, 1, 2]), bytes=True)[:, :3]
    assert ["#{:02X}{:02X}{:02X}".format(*c) for c in colours] == ["#56B4E9", "#E69F00", "#D9D9D9"]


def test_unproven_cells_are_hatched_exactly_there():
    drawn = phase_diagram(make())
    assert drawn.hatched.get_hatch()
    np.testing.assert_array_equal(drawn.hatched.get_facecolor()[:, :3], 1)
    centres = [np.exp(np.log(path.vertices[:4]).mean(axis=0)) for path in drawn.hatched.get_paths()]
    expected = [(X[i], Y[j]) for j, i in np.argwhere(~CERTIFIED | (CODES < 0))]
    np.testing.assert_allclose(centres, expected, rtol=1e-12)


def test_nothing_is_hatched_where_all_is_proven():
    assert phase_diagram(make(codes=abs(CODES), certified=None)).hatched is None


@pytest.mark.parametrize("log", [True, False])
def test_edges_lie_halfway_on_the_axis_as_drawn(log):
    x = np.geomspace(1, 16, 5) if log else np.arange(1.0, 6)
    edges = make(x=x, log=(log, True)).edges[0]
    expected = 2 ** np.arange(-0.5, 5) if log else np.arange(0.5, 6)
    np.testing.assert_allclose(edges, expected, rtol=1e-12)


def test_boundaries_are_drawn_as_given():
    (line,) = phase_diagram(make()).lines
    np.testing.assert_array_equal(line.get_xdata(), LINE.x)
    np.testing.assert_array_equal(line.get_ydata(), LINE.y)


def test_axes_are_logarithmic_and_end_with_the_cells():
    data = make()
    axes = phase_diagram(data).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    np.testing.assert_allclose(axes.get_xlim(), data.edges[0][[0, -1]])
    np.testing.assert_allclose(axes.get_ylim(), data.edges[1][[0, -1]])


def test_the_legend_names_what_occurs_once():
    data = make(names=["a", "b", "b"])
    axes = phase_diagram(data).axes
    texts = [text.get_text() for text in phase_legend(axes, data, data).get_texts()]
    assert texts == ["a", "b", "not certified", "theory"]


def test_every_regime_has_its_own_colour_but_the_unknown_has_none():
    assert set(REGIME_COLOURS) == set(Regime) - {Regime.UNKNOWN}
    assert len(set(REGIME_COLOURS.values())) == len(REGIME_COLOURS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[::-1]}, "x has shape"),
        ({"x": X - 1}, "above 0 on a logarithmic axis"),
        ({"codes": CODES.T}, r"codes has shape \(5, 3\)"),
        ({"certified": CERTIFIED[0]}, "certified has shape"),
        ({"codes": CODES + 1}, "codes go up to 3"),
        ({"names": ["a"]}, "1 names and 3 colours"),
    ],
)
def test_wrong_maps_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_two_draws_are_equal_byte_for_byte(tmp_path, kind):
    files = [style.save(phase_diagram(make()).axes.figure, tmp_path / f"{n}.{kind}") for n in "ab"]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert sorted(tmp_path.iterdir()) == files


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure, path = phase_diagram(make()).axes.figure, tmp_path / "map.png"
    path.write_text("old")
    monkeypatch.setattr(figure, "savefig", lambda file, **_: (file.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        style.save(figure, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("map.png", "old")]
    with pytest.raises(ValueError, match=r"must end in one of .png, .pdf, .svg"):
        style.save(figure, tmp_path / "map.bmp")


def test_the_look_does_not_depend_on_the_users_settings(tmp_path):
    import matplotlib

    plain = style.save(phase_diagram(make()).axes.figure, tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "image.cmap": "jet"}):
        assert style.save(phase_diagram(make()).axes.figure, tmp_path / "changed.png").read_bytes() == plain


def test_importing_plots_loads_no_drawing_library():
    check = "import sys, ufm.plots; print([m for m in ('matplotlib', 'plotly', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
