"""Panels: what is drawn is what was given, unproven and unsettled cells are never coloured, equal figures are equal files."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex

from ufm import plots
from ufm.plots import REGIME_COLOURS, Bars, Boundary, Curve, Curves, Dots, Matrix, PhaseMap, ShareMap, report, style
from ufm.plots.keys import merged
from ufm.records import Regime

X, Y = np.geomspace(1, 100, 5), np.geomspace(1e-3, 1e-1, 3)
CODES = np.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [2, 2, 2, 2, -1]])
CERTIFIED = np.ones((3, 5), dtype=bool)
CERTIFIED[0, 1] = CERTIFIED[1, 3] = False
UNPROVEN = ~CERTIFIED | (CODES < 0)
COLOURS = ["#56b4e9", "#e69f00", "#d9d9d9"]
LINE = Boundary([1, 10, 100], [1e-2, 5e-3, np.nan], "theory", dash=(4, 2))
HOVER = np.array([[f"cell {j} < {i}\n2nd line" for i in range(5)] for j in range(3)])

SHARES = np.linspace(0, 1, 15).reshape(3, 5)
SHARES[2, 4] = np.nan
SETTLED = np.ones((3, 5), dtype=bool)
SETTLED[0, 4] = SETTLED[2, 4] = SETTLED[2, 0] = False
IDLE = np.zeros((3, 5), dtype=bool)
IDLE[2, :2] = True


def phase(**changes):
    given = {"x": X, "y": Y, "codes": CODES, "names": ["a", "b", "c"], "colours": COLOURS, "certified": CERTIFIED, "hover": HOVER}
    return PhaseMap(**given | {"boundaries": [LINE], "dots": Dots([10], [1e-2], "dots"), "title": "$R^2$", "labels": ("x", "y")} | changes)


def share(**changes):
    given = {"x": X, "y": Y, "values": SHARES, "trusted": SETTLED, "idle": IDLE, "bar": "share", "boundaries": [LINE], "hover": HOVER}
    return ShareMap(**given | changes)


def curve(label="c", colour="#0072B2", **changes):
    given = {"x": [1, 2, 4], "y": [0.2, 0.5, 1], "low": [0.1, 0.4, 0.8], "high": [0.4, 0.6, 1], "trusted": [True, False, True]}
    return Curve(**given | {"label": label, "colour": colour, "hover": ["p", "q", "r"]} | changes)


def centres(polygons):
    return [np.exp(np.log(path.vertices[:4]).mean(axis=0)) for path in polygons.get_paths()]


def places(where):
    return [(X[i], Y[j]) for j, i in np.argwhere(where)]


def traces(panel):
    """The traces of a page's panel, as the JSON in the HTML holds them."""
    text = plots.page([[panel]], name="n", title="t").decode()
    start = text.index("[", text.index('"n",', text.index("Plotly.newPlot")))
    return json.JSONDecoder().raw_decode(text[start:])[0]


def numbers(array):
    if isinstance(array, list):
        return np.array(array, dtype=float)
    assert array["dtype"] == "f4"
    shape = [int(n) for n in array.get("shape", "-1").split(",")]
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype="<f4").reshape(shape)


def hatched_in_page(panel):
    """Centres of the cells a page hatches."""
    (trace,) = [t for t in traces(panel) if "fillpattern" in t and len(numbers(t["x"])) > 1]
    corners = np.stack([numbers(trace[axis]).reshape(-1, 6)[:, :4] for axis in "xy"], axis=2)
    return np.exp(np.log(corners).mean(axis=1))


def test_cells_hold_the_codes_and_mask_what_is_unproven_or_unknown():
    array = np.ma.masked_array(plots.phase_diagram(phase()).cells.get_array()).reshape(CODES.shape)
    np.testing.assert_array_equal(np.ma.getmaskarray(array), UNPROVEN)
    np.testing.assert_array_equal(array.compressed(), CODES[~UNPROVEN])


def test_each_code_has_its_own_colour():
    cells = plots.phase_diagram(phase()).cells
    assert [to_hex(colour) for colour in cells.to_rgba(np.array([0, 1, 2]))] == COLOURS


def test_unproven_cells_are_hatched_exactly_there():
    drawn = plots.phase_diagram(phase())
    assert drawn.hatched.get_hatch()
    np.testing.assert_array_equal(drawn.hatched.get_facecolor()[:, :3], 1)
    np.testing.assert_allclose(centres(drawn.hatched), places(UNPROVEN), rtol=1e-12)
    assert drawn.plain is None


def test_nothing_is_hatched_where_all_is_proven():
    assert plots.phase_diagram(phase(codes=abs(CODES), certified=None)).hatched is None


def test_shares_are_coloured_only_where_runs_settled_and_the_question_arises():
    drawn = plots.share_map(share())
    array = np.ma.masked_array(drawn.cells.get_array()).reshape(SHARES.shape)
    known = SETTLED & ~IDLE & np.isfinite(SHARES)
    np.testing.assert_array_equal(np.ma.getmaskarray(array), ~known)
    np.testing.assert_array_equal(array.compressed(), SHARES[known])
    np.testing.assert_allclose(centres(drawn.hatched), places(~SETTLED & ~IDLE & np.isfinite(SHARES)), rtol=1e-12)
    np.testing.assert_allclose(centres(drawn.plain), places(IDLE), rtol=1e-12)
    assert drawn.hatched.get_hatch()
    assert drawn.plain.get_hatch() is None
    assert (drawn.cells.norm.vmin, drawn.cells.norm.vmax) == (0, 1)


def test_shares_go_from_light_to_dark():
    from matplotlib.colors import to_rgb

    lightness = [np.dot((0.2126, 0.7152, 0.0722), to_rgb(colour)) for colour in style.SHARE]
    assert np.all(np.diff(lightness) < -0.02)


@pytest.mark.parametrize("log", [True, False])
def test_edges_lie_halfway_on_the_axis_as_drawn(log):
    x = np.geomspace(1, 16, 5) if log else np.arange(1.0, 6)
    edges = phase(x=x, log=(log, True)).edges[0]
    expected = 2 ** np.arange(-0.5, 5) if log else np.arange(0.5, 6)
    np.testing.assert_allclose(edges, expected, rtol=1e-12)


@pytest.mark.parametrize(("draw", "data"), [(plots.phase_diagram, phase()), (plots.share_map, share())])
def test_boundaries_are_drawn_as_given_and_axes_end_with_the_cells(draw, data):
    drawn = draw(data)
    (line,) = drawn.lines
    np.testing.assert_array_equal(line.get_xdata(), LINE.x)
    np.testing.assert_array_equal(line.get_ydata(), LINE.y)
    assert line.get_linestyle() != "-"
    assert (drawn.axes.get_xscale(), drawn.axes.get_yscale()) == ("log", "log")
    np.testing.assert_allclose(drawn.axes.get_xlim(), data.edges[0][[0, -1]])
    np.testing.assert_allclose(drawn.axes.get_ylim(), data.edges[1][[0, -1]])


def test_titles_labels_and_dots_are_drawn():
    drawn = plots.phase_diagram(phase())
    assert (drawn.axes.get_title(loc="left"), drawn.axes.get_xlabel(), drawn.axes.get_ylabel()) == ("$R^2$", "x", "y")
    assert (drawn.dots.get_xdata(), drawn.dots.get_ydata()) == ([10], [1e-2])


def test_small_panels_still_have_a_tick_every_decade():
    from matplotlib.figure import Figure

    axes = plots.phase_diagram(phase(x=np.geomspace(1, 1e3, 5)), Figure(figsize=(1.2, 1.2)).add_subplot()).axes
    ticks = axes.get_xticks()
    np.testing.assert_allclose(ticks[(ticks > 0.5) & (ticks < 2e3)], [1, 10, 100, 1000])


def test_the_legend_names_what_occurs_once():
    maps = phase(names=["a", "b", "b"]), share(idle_name="a", untrusted="not settled")
    axes = plots.phase_diagram(maps[0]).axes
    texts = [text.get_text() for text in plots.legend(axes, *maps).get_texts()]
    assert texts == ["a", "b", "not certified", "not settled", "theory", "dots"]
    assert {key.label: key.colours for key in merged(maps)}["b"] == ("#d9d9d9", "#e69f00"), "light to dark"


def test_the_legend_leaves_out_what_does_not_occur():
    nowhere = Boundary(X, np.full(5, np.nan), "nowhere")
    data = phase(codes=0 * CODES, certified=None, boundaries=[nowhere, Boundary(X, X)], dots=None)
    assert [key.label for key in data.keys] == ["a"]


def test_curves_have_their_points_bands_and_hollow_markers():
    drawn = plots.draw_curves(Curves([curve("a"), curve("b", "#E69F00")], log=(True, False), limits=(-0.1, 1.1), ticks=(1, 3)))
    assert [text.get_text() for text in drawn.axes.get_xticklabels()] == ["1", "3"]
    assert (drawn.axes.get_xscale(), drawn.axes.get_yscale(), drawn.axes.get_ylim()) == ("log", "linear", (-0.1, 1.1))
    for line, band, markers, colour in zip(drawn.lines, drawn.bands, drawn.markers, ("#0072b2", "#e69f00"), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), [[1, 0.2], [2, 0.5], [4, 1]])
        np.testing.assert_array_equal(markers.get_offsets(), [[1, 0.2], [2, 0.5], [4, 1]])
        assert [to_hex(face) for face in markers.get_facecolor()] == [colour, "#ffffff", colour]
        outline = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
        assert outline == {(1, 0.1), (2, 0.4), (4, 0.8), (1, 0.4), (2, 0.6), (4, 1)}
    first, second = (markers.get_sizes()[0] for markers in drawn.markers)
    assert first > second, "curves that coincide must all show"


def test_hatched_cells_and_hollow_markers_with_the_same_meaning_are_both_in_the_legend():
    assert [key.kind for key in merged([share(idle=None), Curves([curve(label="")])]) if key.label == "not settled"] == ["hatch", "dot"]


def test_a_legend_of_curves_names_hollow_markers_only_where_there_are_some():
    assert [key.label for key in Curves([curve()]).keys] == ["c", "not settled"]
    assert [key.label for key in Curves([curve(trusted=None)]).keys] == ["c"]


def test_every_regime_has_its_own_colour_but_the_unknown_has_none():
    assert set(REGIME_COLOURS) == set(Regime) - {Regime.UNKNOWN}
    assert len(set(REGIME_COLOURS.values())) == len(REGIME_COLOURS)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (phase, {"x": X[::-1]}, "PhaseMap: x has shape"),
        (phase, {"x": X - 1}, "above 0 on a logarithmic axis"),
        (phase, {"codes": CODES.T}, r"codes has shape \(5, 3\)"),
        (phase, {"certified": CERTIFIED[0]}, "certified has shape"),
        (phase, {"hover": HOVER[0]}, "hover has shape"),
        (phase, {"codes": CODES + 1}, "codes go up to 3"),
        (phase, {"names": ["a"]}, "1 names and 3 colours"),
        (share, {"values": SHARES + 0.1}, r"values run from 0.1 to .* in \[0, 1\]"),
        (share, {"trusted": SETTLED[0]}, "trusted has shape"),
        (share, {"idle": IDLE.T}, "idle has shape"),
        (curve, {"x": [1, 1, 2]}, "must be rising"),
        (curve, {"low": [0.1, 0.6, 0.8]}, "outside its interval"),
        (curve, {"trusted": [True]}, r"trusted has shape \(1,\)"),
        (Curves, {"curves": [curve(x=[0, 1, 2])]}, "above 0 on a logarithmic axis"),
        (Curves, {"curves": [curve(**dict.fromkeys(("x", "y", "low", "high", "trusted", "hover"), ()))]}, "no point"),
    ],
)
def test_wrong_data_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_page_colours_the_same_cells_in_the_same_colours():
    trace = traces(phase())[0]
    np.testing.assert_array_equal(numbers(trace["z"]), np.where(UNPROVEN, np.nan, CODES))
    assert [colour for _, colour in trace["colorscale"]] == [colour for colour in COLOURS for _ in "ab"]
    assert (trace["zmin"], trace["zmax"]) == (-0.5, 2.5)
    np.testing.assert_allclose(numbers(trace["x"]), phase().edges[0], rtol=1e-6)
    shares = traces(share())[0]
    np.testing.assert_allclose(numbers(shares["z"]), np.where(SETTLED & ~IDLE, SHARES, np.nan), rtol=1e-6)


def test_a_page_hatches_what_the_still_figure_hatches():
    np.testing.assert_allclose(hatched_in_page(phase()), places(UNPROVEN), rtol=1e-5)
    np.testing.assert_allclose(hatched_in_page(share()), places(~SETTLED & ~IDLE & np.isfinite(SHARES)), rtol=1e-5)


def test_a_page_has_hover_texts_lines_and_legend():
    drawn = traces(phase())
    assert drawn[0]["hovertext"][1][3] == "cell 1 &lt; 3<br>2nd line"
    (line,) = [t for t in drawn if t.get("line", {}).get("dash") and not t["showlegend"]]
    np.testing.assert_allclose(numbers(line["y"]), LINE.y, rtol=1e-6)
    assert [t["name"] for t in drawn if t.get("showlegend")] == [key.label for key in merged([phase()])]


def test_a_page_draws_curves_with_bands_and_hollow_markers():
    band, line, *_ = traces(Curves([curve()]))
    np.testing.assert_allclose(numbers(band["x"]), [1, 2, 4, 4, 2, 1])
    np.testing.assert_allclose(numbers(band["y"]), [0.1, 0.4, 0.8, 1, 0.6, 0.4], rtol=1e-6)
    np.testing.assert_allclose(numbers(line["y"]), [0.2, 0.5, 1], rtol=1e-6)
    assert line["marker"]["color"] == ["#0072B2", "white", "#0072B2"]
    assert line["hovertext"] == ["p", "q", "r"]


def test_a_page_has_logarithmic_axes_that_zoom_together_and_words():
    maps = [phase(labels=("$R$", "y")), phase(labels=("$R$", "y"))]
    layout = report.figure([maps]).to_dict()["layout"]
    assert {layout[axis]["type"] for axis in ("xaxis", "yaxis", "xaxis2", "yaxis2")} == {"log"}
    np.testing.assert_allclose(layout["xaxis"]["range"], np.log10(phase().edges[0][[0, -1]]))
    assert (layout["xaxis2"]["matches"], layout["yaxis2"]["matches"]) == ("x", "y")
    assert (layout["yaxis"]["title"]["text"], layout["yaxis2"]["title"]["text"]) == ("y", "")
    assert [note["text"] for note in layout["annotations"]] == ["R<sup>2</sup>"] * 2
    text = plots.page([maps], name="n", title="a < $b_1$", caption="proven $\\leq 10^{-9}$").decode()
    assert "<h1>a &lt; b<sub>1</sub></h1>" in text
    assert "<p>proven ≤ 10<sup>−9</sup></p>" in text


@pytest.mark.parametrize(("ends", "said"), [((2.0, 60.0), ["2", "5", "10", "20", "50"]), ((0.2, 5.0), ["0.2", "0.5", "1", "2", "5"])])
def test_a_short_logarithmic_axis_of_a_page_says_its_numbers_in_full(ends, said):
    axis = report.figure([[Curves([curve(x=[ends[0], 1.5 * ends[0], ends[1]])], log=(True, False))]]).to_dict()["layout"]["xaxis"]
    assert list(axis["ticktext"]) == said
    np.testing.assert_allclose(list(axis["tickvals"]), [float(tick) for tick in said])


def test_a_page_opens_without_a_network(tmp_path):
    path = plots.write_page(tmp_path / "map.html", [[phase(), share()], [Curves([curve()]), None]], title="t")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.html", "plotly.min.js"]
    assert re.findall(r'src="([^"]*)"', path.read_text()) == ["plotly.min.js"]
    assert 'id="map"' in path.read_text()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (r"$\kappa^2/n_{\min}$,  $\kappa=N\lambda$", "κ<sup>2</sup>/n<sub>min</sub>,  κ=Nλ"),
        ("a < b\nc", "a &lt; b<br>c"),
        (r"$(K-1)n_{\min}$", "(K−1)n<sub>min</sub>"),
    ],
)
def test_mathtext_as_html(text, html):
    assert style.html(text) == html


@pytest.mark.parametrize(("text", "message"), [("$a", "odd number of dollars"), (r"$\aleph$", "not one of the known symbols")])
def test_mathtext_that_cannot_be_html_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        style.html(text)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
@pytest.mark.parametrize("draw", [lambda: plots.phase_diagram(phase()), lambda: plots.draw_curves(Curves([curve()]))])
def test_two_draws_are_equal_byte_for_byte(tmp_path, kind, draw):
    files = [style.save(draw().axes.figure, tmp_path / f"{n}.{kind}") for n in "ab"]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert sorted(tmp_path.iterdir()) == files


def test_equal_data_is_an_equal_page():
    one, two = (plots.page([[phase(), share(), Curves([curve()])]], name="n", title="t") for _ in "ab")
    assert one == two
    assert one != plots.page([[phase(codes=0 * CODES), share(), Curves([curve()])]], name="n", title="t")


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure, path = plots.phase_diagram(phase()).axes.figure, tmp_path / "map.png"
    path.write_text("old")
    monkeypatch.setattr(figure, "savefig", lambda file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        style.save(figure, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("map.png", "old")]
    with pytest.raises(ValueError, match=r"must end in one of .png, .pdf, .svg"):
        style.save(figure, tmp_path / "map.bmp")


def test_the_look_does_not_depend_on_the_users_settings(tmp_path):
    import matplotlib

    plain = style.save(plots.phase_diagram(phase()).axes.figure, tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "image.cmap": "jet"}):
        assert style.save(plots.phase_diagram(phase()).axes.figure, tmp_path / "changed.png").read_bytes() == plain


def test_importing_plots_loads_no_drawing_library():
    check = "import sys, ufm.plots; print([m for m in ('matplotlib', 'plotly', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


LOGITS = np.array([[2.0, -1.0, 0.0], [-1.0, 2.5, np.nan], [0.0, 0.5, 1.0]])
COUNTS, UNSETTLED = [[3, 0], [1, 5]], [0, 5]


def matrix(**changes):
    return Matrix(**{"values": LOGITS, "title": "M", "labels": ("class", "logit"), "blocks": (2, 1), "bar": "logit"} | changes)


def bars(**changes):
    given = {"x": [10, "$2^{-3}$"], "counts": COUNTS, "names": ["a", "b"], "colours": ["#0072b2", "#e69f00"], "unsettled": UNSETTLED}
    return Bars(**given | changes)


def rectangles(container):
    return [(r.get_x() + r.get_width() / 2, r.get_y(), r.get_height()) for r in container.patches]


def test_a_matrix_is_drawn_with_its_first_row_on_top_and_centred_colours():
    drawn = plots.draw_matrix(matrix())
    array = np.ma.masked_array(drawn.cells.get_array()).reshape(3, 3)
    np.testing.assert_array_equal(np.ma.getmaskarray(array), np.isnan(LOGITS))
    np.testing.assert_array_equal(array.compressed(), LOGITS[np.isfinite(LOGITS)])
    assert (drawn.cells.norm.vmin, drawn.cells.norm.vmax) == (-2.5, 2.5)
    assert (drawn.axes.get_xlim(), drawn.axes.get_ylim()) == ((0.5, 3.5), (3.5, 0.5))
    red, _, blue = drawn.cells.cmap(1.0)[:3]
    assert red > 2 * blue, "large values are red"
    np.testing.assert_allclose(drawn.cells.cmap(0.5)[:3], 0.97, atol=0.01)
    segments = [segment.tolist() for segment in drawn.lines.get_segments()]
    assert segments == [[[2.5, 3.5], [2.5, 0.5]], [[0.5, 2.5], [3.5, 2.5]]]


def test_a_logarithmic_matrix_clips_zero_to_its_lowest_colour_and_says_so():
    data = matrix(values=[[1.0, 1e-3, 0.0]], colours="log", limits=(1e-2, 1.0), blocks=())
    np.testing.assert_array_equal(data.clipped, [[1.0, 1e-2, 1e-2]])
    assert data.beyond == (True, False)
    drawn = plots.draw_matrix(data)
    assert (drawn.cells.norm(1.0), drawn.cells.norm(1e-2), drawn.cells.norm(0.1)) == (1.0, 0.0, pytest.approx(0.5))
    assert matrix(values=[[1.0, 1e-3, 0.0]], colours="log", blocks=()).limits == (1e-3, 1.0)
    assert drawn.lines is None


def test_a_matrix_of_many_names_writes_some_of_them():
    ticks = matrix(values=np.eye(25), blocks=()).ticks
    assert ticks[0] == ticks[1] == {float(i): str(i) for i in range(1, 26, 3)}
    named = matrix(names=("abc", ("$H$", "$W_1$", "$Z$")))
    assert [text.get_text() for text in plots.draw_matrix(named).axes.get_yticklabels()] == ["$H$", "$W_1$", "$Z$"]
    assert named.hover[1, 1] == "row $W_1$, column b: 2.5"


def test_bars_stack_shares_from_the_bottom_and_hatch_the_unsettled():
    drawn = plots.draw_bars(bars())
    assert [rectangles(container) for container in drawn.bars] == [[(0, 0, 0.75), (1, 0, 0)], [(0, 0.75, 0.25), (1, 0, 0.5)]]
    assert rectangles(drawn.hatched) == [(0, 1, 0), (1, 0.5, 0.5)]
    assert drawn.hatched.patches[1].get_hatch()
    assert [to_hex(container.patches[0].get_facecolor()) for container in drawn.bars] == ["#0072b2", "#e69f00"]
    assert [text.get_text() for text in drawn.axes.get_xticklabels()] == ["10", "$2^{-3}$"]
    assert drawn.axes.get_ylim() == (0, 1)


def test_bars_name_what_occurs_only():
    assert [(key.label, key.kind) for key in bars().keys] == [("a", "patch"), ("b", "patch"), ("not settled", "hatch")]
    settled = bars(counts=[[3, 4], [0, 0]], unsettled=None)
    assert [key.label for key in settled.keys] == ["a"]
    assert plots.draw_bars(settled).hatched is None
    assert len(plots.draw_bars(settled).bars) == 1


def test_bars_tell_counts_and_wilson_s_intervals():
    from scipy.stats import binomtest

    hover = bars().hover
    assert hover.shape == (3, 2)
    for i, j, count, total in ((0, 0, 3, 4), (1, 1, 5, 10), (2, 1, 5, 10), (0, 1, 0, 10)):
        interval = binomtest(count, total).proportion_ci(method="wilson")
        assert hover[i, j].endswith(f"{count} of {total} runs, share {count / total:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    assert hover[2, 0].startswith("not settled: 0 of 4")


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (matrix, {"values": LOGITS[0]}, r"values have shape \(3,\)"),
        (matrix, {"values": LOGITS * np.nan}, "give a matrix with finite numbers"),
        (matrix, {"colours": "log"}, "needs values >= 0"),
        (matrix, {"blocks": (2, 2)}, "blocks add up to 4"),
        (matrix, {"names": ("ab", ())}, "2 and 3 names of columns and rows"),
        (matrix, {"hover": [["a"]]}, r"hover has shape \(1, 1\)"),
        (matrix, {"limits": (1, -1)}, "must rise"),
        (matrix, {"values": abs(LOGITS), "colours": "log", "limits": (0, 1)}, "above 0 on a logarithmic scale"),
        (bars, {"counts": np.transpose(COUNTS)[:1]}, "give counts"),
        (bars, {"unsettled": [1]}, r"unsettled \(1,\)"),
        (bars, {"colours": ["#000000"]}, "1 colours"),
        (bars, {"counts": [[0.5, 0], [1, 5]]}, "whole numbers"),
        (bars, {"counts": [[0, 0], [0, 5]]}, "a run or more at every point"),
    ],
)
def test_wrong_matrices_and_bars_are_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_page_shows_the_same_matrix():
    heat, *lines = traces(matrix())[:3]
    np.testing.assert_allclose(numbers(heat["z"]), LOGITS, rtol=1e-6)
    assert (heat["zmin"], heat["zmax"], heat["showscale"]) == (-2.5, 2.5, True)
    assert heat["colorbar"]["title"]["text"] == "logit"
    assert heat["hovertext"][0][1] == "row 1, column 2: -1"
    np.testing.assert_array_equal(numbers(lines[0]["x"]), [2.5, 2.5, np.nan, 0.5, 3.5])
    log = traces(matrix(values=[[1.0, 1e-3, 0.0]], colours="log", limits=(1e-2, 1.0), blocks=(), bar=""))[0]
    np.testing.assert_allclose(numbers(log["z"]), [[0, -2, -2]])
    assert log["showscale"] is False
    layout = report.figure([[matrix()]]).to_dict()["layout"]
    assert (layout["yaxis"]["range"], list(layout["yaxis"]["ticktext"])) == ([3.5, 0.5], ["1", "2", "3"])


def test_a_page_shows_the_same_bars():
    drawn = [t for t in traces(bars()) if t["type"] == "bar"]
    np.testing.assert_allclose([numbers(t["y"]) for t in drawn], [[0.75, 0], [0.25, 0.5], [0, 0.5]])
    assert [t["marker"]["color"] for t in drawn] == ["#0072b2", "#e69f00", "white"]
    assert drawn[2]["marker"]["pattern"]["shape"] == "/"
    assert drawn[1]["hovertext"][1] == bars().hover[1, 1]
    layout = report.figure([[bars()]]).to_dict()["layout"]
    assert (layout["barmode"], list(layout["xaxis"]["ticktext"])) == ("stack", ["10", "2<sup>−3</sup>"])


def test_lines_without_markers_have_none_in_either_kind_of_figure():
    level = curve("level", marker="", dash=(4, 2), low=[0.2, 0.5, 1], high=[0.2, 0.5, 1])
    drawn = plots.draw_curves(Curves([level]))
    assert not drawn.markers
    assert drawn.lines[0].get_linestyle() == "--"
    assert [key.label for key in Curves([level]).keys] == ["level"], "no point of it can be hollow"
    line, *_ = traces(Curves([level]))
    assert (line["mode"], line["line"]["dash"]) == ("lines", "5.6px,2.8px")


def test_ordered_colours_go_from_dark_to_light():
    from matplotlib.colors import to_rgb

    lightness = [np.dot((0.2126, 0.7152, 0.0722), to_rgb(colour)) for colour in style.ordered(6)]
    assert np.all(np.diff(lightness) > 0.02)


def test_an_axis_of_very_many_decades_has_few_ticks():
    ticks = plots.share_map(share(x=np.geomspace(1e-28, 1, 5))).axes.get_xticks()
    assert 3 <= np.sum((ticks > 1e-29) & (ticks < 10)) <= 7
