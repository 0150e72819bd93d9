"""Figures are drawn from stored rows alone, and say in one sentence when the rows are not theirs."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from figures import (
    FIGURES,
    __main__,
    collapse,
    minority_collapse,
    minority_collapse_bias,
    minority_collapse_cuts,
    minority_collapse_sizes,
    stored,
)
from ufm import counts, plots, sweep
from ufm.records import Regime

ROOT = Path(__file__).parent.parent
RATIOS, STRENGTHS = [1.0, 10.0, 100.0], [0.1, 1.0, 20.0]
FILES = {f"{name}.{kind}" for name, (study, _) in FIGURES.items() if study == "minority_collapse" for kind in ("png", "pdf", "html")}


def figures(*arguments):
    return subprocess.run([sys.executable, "-m", "figures", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def row(point, _seed):
    """A row as the study writes it, with numbers made up from the point."""
    K, ratio, strength = point["K"], point["ratio"], point["strength"]
    n = counts.step(K, round(5000 / ratio), ratio) if point["pattern"] == "step" else counts.exponential(K, 5000, ratio)
    zero, last = (K - 1) / K, (K - 1) / K * n[0] / n[-1]
    free = point["features"] == "free"
    regime = Regime.ALL_ZERO if strength >= last else Regime.MINORITY_ZERO if strength >= zero else Regime.DISTINCT
    made = {"n_min": int(n[-1]), "N": int(n.sum()), "lam": 1e-3 * strength, "gap": 1e-10, "regime": regime.name, "lam_b": 0.01}
    made |= {"predicted_regime": regime.name, "distinct": regime == Regime.DISTINCT}
    made["margins"] = np.repeat([3.25, 0.0 if strength >= zero else 1.5], K // 2)
    made["dead"] = {Regime.DISTINCT: 0, Regime.MINORITY_ZERO: K // 2, Regime.ALL_ZERO: K}[regime]
    made |= {"strength_merged": 0.5 if free else zero, "strength_zero": zero, "strength_all": last}
    if point["panel"] == "bias":
        made |= {"strength_merged": np.nan, "strength_zero": np.nan}
    if (ratio, strength) == (10.0, 0.1):
        made["gap"] = np.nan
    if point["descents"]:
        killed = round(4 * min(1.0, strength)) / 4
        made |= {"killed": killed, "killed_low": 0.8 * killed, "killed_high": min(1.0, killed + 0.2), "killed_classes": 2 * killed}
        made |= {"settled": 0.5 if (ratio, strength) == (100.0, 0.1) else 0.9, "reached": 1 - killed, "excess": 1e-3}
    return made


def rows(points, seeds):
    return [row(point, seed) for point, seed in zip(points, seeds, strict=True)]


def points():
    def panel(name, K, **axes):
        one = dict(panel=[name], K=[K], width=[2 * K], features=["relu"], pattern=["step"], bias=["none"], scale=[1.0], momentum=[0.9])
        return sweep.grid(**one | dict(descents=[4], steps=[300], tol=[1e-9], settled_below=[1e-4], dead_below=[1e-2]) | axes)

    cells, at = dict(ratio=RATIOS, strength=STRENGTHS), dict(ratio=[100.0], strength=[0.1, 0.6])
    both = dict(features=["relu", "free"], pattern=["step", "exponential"])
    return [
        *panel("map", 10, **cells | both),
        *panel("boundary", 10, **dict(ratio=RATIOS[1:], strength=[0.85, 0.895, 0.91, 0.95], descents=[0]) | both),
        *panel("bias", 10, **cells | dict(bias=["free", "penalised"], pattern=["step", "exponential"], descents=[0])),
        *panel("few classes", 4, **cells),
        *panel("many classes", 100, **cells | dict(descents=[0])),
        *panel("many classes, descent", 100, **cells | dict(strength=[1.0])),
        *panel("scale", 10, scale=[0.1, 1.0, 10.0], **at),
        *panel("width", 10, width=[10, 20, 40], **at),
        *panel("momentum", 10, momentum=[0.0, 0.9], **at),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a small study."""
    folder = tmp_path_factory.mktemp("figures") / "study"
    sweep.run(rows, points(), out=folder)
    return folder


@pytest.fixture(scope="module")
def table(whole):
    return collapse.read(whole, *collapse.DESCENT)


@pytest.fixture(scope="module")
def drawn(whole, tmp_path_factory):
    """All figures of it, drawn once, in a folder that is made for them."""
    out = tmp_path_factory.mktemp("figures") / "new" / "pictures"
    return minority_collapse.draw_all(whole, out), out


def part(folder, keep):
    """A store with some of the rows."""
    sweep.run(rows, [point for point in points() if keep(point)], out=folder)
    return folder


def grid(table, **changes):
    return collapse.cells(table, panel="map", features="relu", pattern="step") | changes


def test_the_map_holds_the_rows(table):
    data = collapse.regime_map(grid(table), "t")
    np.testing.assert_array_equal(data.x, RATIOS)
    np.testing.assert_array_equal(data.y, STRENGTHS)
    np.testing.assert_array_equal(data.codes, [[0, 0, 0], [10, 5, 5], [10, 10, 5]])
    np.testing.assert_array_equal(data.known, [[True, False, True], [True] * 3, [True] * 3])
    assert [data.names[code] for code in (0, 5, 10)] == [r.value for r in (Regime.DISTINCT, Regime.MINORITY_ZERO, Regime.ALL_ZERO)]


@pytest.mark.parametrize("unproven", [1e-8, np.nan])
def test_only_proven_and_known_regimes_are_coloured(table, unproven):
    gap = np.full((3, 3), 1e-10)
    gap[2, 0] = unproven
    regime = grid(table)["regime"].copy()
    regime[0, 0], regime[1, 1], regime[0, 2] = "UNKNOWN", "", "MERGED"
    data = collapse.regime_map(grid(table, gap=gap, regime=regime), "t")
    np.testing.assert_array_equal(data.known, [[False, True, True], [True, False, True], [False, True, True]])
    assert data.names[data.codes[0, 2]] == Regime.MERGED.value


def test_shades_tell_how_many_classes_are_at_zero(table):
    data = collapse.regime_map(grid(table), "t")
    green = [colour[1] for colour in data.colours[1:10]]
    assert len(set(data.colours)) == len(data.colours)
    assert np.all(np.diff(green) < 0), "light to dark"


def test_killed_cells_are_coloured_only_where_settled_proven_and_the_optimum_keeps_a_class(table):
    data = collapse.killed_map(grid(table), "t")
    np.testing.assert_array_equal(data.idle, [[False] * 3, [True, False, False], [True, True, False]])
    np.testing.assert_array_equal(data.hatched, [[False, True, True], [False] * 3, [False] * 3])
    np.testing.assert_array_equal(data.values[data.known], [0.0, 1.0, 1.0, 1.0])
    gap = np.full((3, 3), np.nan)
    assert not collapse.killed_map(grid(table, gap=gap), "t").known.any()
    assert not collapse.killed_map(grid(table, gap=gap), "t").idle.any()


def labelled(data):
    return {b.label: np.asarray(b.y) for b in data.boundaries if b.label}


def test_theory_lines_are_the_stored_columns_and_one_where_two_coincide(table):
    relu, free = (
        labelled(collapse.regime_map(grid(table) | g, "t"))
        for g in ({}, collapse.cells(table, panel="map", features="free", pattern="step"))
    )
    merged, zero, last = (look["label"] for look in (collapse.MERGED, collapse.ZERO, collapse.ALL))
    np.testing.assert_allclose(relu[zero], [np.nan, 0.9, 0.9])
    np.testing.assert_allclose(relu[last], [0.9, 9, 90])
    assert set(relu) == {zero, last}
    np.testing.assert_allclose(free[merged], [0.5, 0.5, 0.5])
    bias = collapse.regime_map(collapse.cells(table, panel="bias", bias="free", pattern="step"), "t")
    assert set(labelled(bias)) == {last}


def test_each_class_of_an_exponential_pattern_has_its_line(table):
    cells = collapse.cells(table, panel="map", features="relu", pattern="exponential")
    thin = [b.y for b in collapse.regime_map(cells, "t").boundaries][:8]
    n = np.array([counts.exponential(10, 5000, ratio) for ratio in RATIOS])
    np.testing.assert_allclose(thin, (0.9 * n[:, 1:9] / n[:, 9:]).T)
    with pytest.raises(stored.BadRows, match="not those of an exponential pattern"):
        collapse.lines(cells | {"N": cells["N"] + 1})


def test_dots_lie_in_the_middle_of_the_last_bracket(table):
    dots = collapse.bisected(table, features="relu", pattern="exponential")
    np.testing.assert_array_equal(dots.x, RATIOS[1:])
    np.testing.assert_allclose(dots.y, np.sqrt(0.895 * 0.91))
    assert collapse.bisected(table.where(panel="map"), features="relu") is None


def test_hover_texts_tell_the_row(table):
    text = collapse.killed_map(grid(table), "t").hover[1, 2]
    assert "margins of the classes, largest first: 3.25 (5 classes), 0 (5 classes)" in text
    for told in (
        "R = 100,",
        "κ²/n_min = 1,",
        "λ = 0.001",
        "some classes at zero (5 of 10",
        "gap 1.0e-10",
        "4 of 4 seeds",
        "settled 90%",
        "(0.80 to 1.00)",
    ):
        assert told in text


def test_rows_of_two_runs_make_no_curve(table):
    rows = table.where(panel="scale", strength=0.6)
    with pytest.raises(stored.BadRows, match="two rows of the panel 'scale' have the same place"):
        collapse.killed_curve(rows, np.ones(len(rows)), "t", "black")


def test_the_main_figure_has_its_panels_labels_and_caption(table):
    drawing = minority_collapse.make(table)
    assert [[panel.title for panel in line] for line in drawing.panels] == [
        [f"{p}: {w}" for p in ("step", "exponential") for w in ("optimum", "descent")]
    ] * 2
    assert [line[0].labels[1] for line in drawing.panels] == [
        f"{name}:  " + r"$\kappa^2/n_{\min}$,  $\kappa=N\lambda$" for name in ("ReLU", "no ReLU")
    ]
    for told in (
        r"\leq 10^{-9}$ in 32 of 36 cells",
        "4 seeds a cell",
        "projected gradient descent with momentum 0.9",
        "at most 300 steps",
        "fewer than 90 %",
    ):
        assert told in drawing.caption


def test_the_still_figure_shows_labels_once_and_everything_in_its_legend(table):
    figure = stored.still(minority_collapse.make(table))
    axes = figure.axes[:8]
    assert [ax.get_title(loc="left")[:3] for ax in axes] == [f"({letter})" for letter in "abcdefgh"]
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False, False] * 2
    assert [bool(ax.get_xlabel()) for ax in axes] == [False] * 4 + [True] * 4
    assert figure.axes[8].get_ylabel() == collapse.BAR
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts >= {Regime.DISTINCT.value, Regime.MINORITY_ZERO.value, Regime.ALL_ZERO.value, "not certified", collapse.UNSETTLED}
    assert texts >= {look["label"] for look in (collapse.MERGED, collapse.ZERO, collapse.ALL, collapse.EACH)}
    caption = figure.get_supxlabel()
    assert len(caption.splitlines()) > 2


@pytest.mark.parametrize("figure", [minority_collapse, minority_collapse_bias, minority_collapse_sizes, minority_collapse_cuts])
def test_no_word_runs_over_the_edge_or_into_another_panel(table, figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    still = stored.still(figure.make(table))
    canvas = FigureCanvasAgg(still)
    canvas.draw()
    caption = next(text for text in still.texts if text.get_text() == still.get_supxlabel())
    boxes = [artist.get_window_extent(canvas.get_renderer()) for artist in (caption, still.legends[0])]
    titles = [axes._left_title.get_window_extent(canvas.get_renderer()) for axes in still.axes]
    assert all(box.x0 >= 0 and box.x1 <= still.bbox.width for box in (*boxes, *titles))
    assert all(left.x1 < right.x0 or left.y0 > right.y1 for left, right in pairwise(box for box in titles if box.width))


def test_cuts_have_a_curve_a_strength_with_intervals_and_hollow_markers(table):
    (panels,) = minority_collapse_cuts.make(table).panels
    assert [panel.log[0] for panel in panels] == [True, True, False]
    weak, strong = panels[1].curves
    np.testing.assert_array_equal(weak.x, [1, 2, 4])
    assert (weak.label, strong.label) == ("$t=0.11$", "$t=0.67$")
    assert not weak.trusted.any()
    assert strong.trusted.all()
    np.testing.assert_allclose((strong.low[0], strong.y[0], strong.high[0]), (0.4, 0.5, 0.7))


def test_sizes_leave_out_points_where_the_optimum_keeps_nothing(table):
    (panels,) = minority_collapse_sizes.make(table).panels
    np.testing.assert_array_equal(panels[3].curves[0].x, [10, 100])
    assert {int(code) for code in panels[2].codes.flat} == {0, 50, 100}
    row = table.where(panel="many classes, descent")
    with pytest.raises(stored.BadRows, match="keeps no class"):
        minority_collapse_sizes.along(row.pick(row["regime"] == "ALL_ZERO"))


def test_captions_are_broken_between_words_and_never_in_a_formula():
    text = "one $a + b$ two three"
    assert stored.wrapped(text, 8).splitlines() == ["one", "$a + b$", "two", "three"]


def test_every_figure_is_three_files_and_the_pages_share_one_program(drawn):
    paths, out = drawn
    assert {path.name for path in paths} == FILES
    assert {path.name for path in out.iterdir()} == FILES | {"plotly.min.js"}


def test_places_may_be_empty_and_matrices_share_the_bar_of_the_last_in_their_row():
    heat = {"values": np.eye(3), "labels": ("class", "logit")}
    row = [plots.Matrix(**heat, title="m"), plots.Matrix(**heat, title="n", bar="logit")]
    bars = plots.Bars(x=["a"], counts=[[1]], names=["one"], colours=["#000000"], title="b")
    figure = stored.still(stored.Drawing([[*row, None], [bars, None, None]], "t", "c", 3.0, 2))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == ["(a) m", "(b) n", "(c) b", ""]
    assert shown[-1].get_ylabel() == "logit", "one colour bar"
    assert [axes.get_ylabel() for axes in shown[:2]] == ["logit", ""]


def test_another_process_draws_the_same_bytes_without_scipy_or_global_state(whole, drawn, tmp_path):
    name = "minority_collapse_sizes"  # has every kind of panel
    check = (
        f"import sys; from figures.__main__ import main; main([{name!r}, '--rows', {str(whole)!r}, '--out', {str(tmp_path)!r}]); "
        "print([m for m in sys.modules if m.startswith(('matplotlib.pyplot', 'scipy'))])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*(f"file: {tmp_path / name}.{kind}" for kind in ("png", "pdf", "html")), "[]"]
    for kind in ("png", "pdf", "html"):
        first, second = (hashlib.sha256((folder / f"{name}.{kind}").read_bytes()).hexdigest() for folder in (drawn[1], tmp_path))
        assert first == second, kind


def test_the_pages_hold_the_rows_and_the_words(drawn):
    text = (drawn[1] / "minority_collapse.html").read_text()
    for told in (
        "some classes at zero (5 of 10 at zero)",
        "4 of 4 seeds killed a class",
        "imbalance ratio R",
    ):
        assert told in text


def other(points, seeds):
    return [{"value": 1.0} for _ in points]


def spoil(folder, whole, kind):
    """Put something into `folder` that is not the study, and say which figures cannot be drawn from it."""
    if kind == "foreign":
        sweep.run(other, [{"a": 1}], out=folder)
    elif kind == "damaged":
        shutil.copytree(whole, folder)
        (folder / "cells.sqlite").write_bytes(b"not a database at all")
    elif kind == "no bias":
        part(folder, lambda point: point["panel"] != "bias")
    elif kind == "torn":
        part(folder, lambda point: (point["ratio"], point["strength"]) != (10.0, 1.0))
    elif kind == "one cell wide":
        part(folder, lambda point: point["ratio"] == 10.0)
    elif kind == "two studies":
        part(folder, lambda point: True)
        sweep.run(rows, [point | {"steps": 3} for point in points()], out=folder)


@pytest.mark.parametrize("kind", ["missing", "foreign", "damaged", "no bias", "torn", "one cell wide", "two studies"])
def test_rows_that_are_not_a_whole_study_are_refused_in_one_sentence(whole, tmp_path, capsys, kind):
    spoil(tmp_path / "study", whole, kind)
    assert __main__.main(["minority_collapse_bias", "--rows", str(tmp_path / "study"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("figures minority_collapse_bias: ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_study_that_lacks_one_figure_draws_none_at_once(tmp_path):
    folder = part(tmp_path / "study", lambda point: point["panel"] != "width")
    with pytest.raises(stored.BadRows, match="no rows with panel 'width'"):
        minority_collapse.draw_all(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(minority_collapse_bias.draw(folder, tmp_path / "out")) == 3


def test_rows_with_an_unheard_regime_are_refused(tmp_path):
    sweep.run(gone, points()[:9], out=tmp_path)
    with pytest.raises(stored.BadRows, match="'GONE' in column 'regime'"):
        collapse.read(tmp_path)


def gone(points, seeds):
    return [row(point, 0) | {"regime": "GONE"} for point in points]


def test_the_command_fails_with_one_sentence(whole, tmp_path):
    (tmp_path / "file").write_text("mine")
    for arguments, message in [
        (("minority_colapse",), "did you mean minority_collapse?"),
        (("minority_collapse", "--rows", tmp_path / "none"), "none holds no cells.sqlite"),
        (("minority_collapse_bias", "--rows", whole, "--out", tmp_path / "file"), "cannot write to"),
    ]:
        done = figures(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_the_list_names_every_figure_and_every_figure_is_listed():
    assert all(name in figures().stdout for name in FIGURES)
    assert {path.stem for path in (ROOT / "figures").glob("minority_collapse*.py")} <= set(FIGURES)
    assert all(callable(importlib.import_module(f"figures.{name}").draw) for name in FIGURES)


def test_short_logarithmic_axes_have_plain_numbers_that_do_not_touch():
    """Widths 10 to 80 and scales 0.2 to 5 in a small panel: 1, 2 and 5 times the decades, no 2 x 10^1 between them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for x, told in ((np.array([10.0, 30.0, 80.0]), ["10", "20", "50"]), (np.geomspace(0.2, 5, 4), ["0.2", "0.5", "1", "2", "5"])):
        curve = plots.Curve(x, x / x[-1], x / x[-1], x / x[-1], "c", "black")
        figure = stored.still(stored.Drawing([[plots.Curves([curve]), None, None]], "t", "c", 2.0, 1))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axis = figure.axes[0].xaxis
        assert [text for text in (label.get_text() for label in axis.get_ticklabels()) if text in told] == told
        assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))
        low, high = axis.get_view_interval()
        shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in shown]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_shared_legend_is_in_the_order_of_the_outcomes():
    def bars(counts, names, shared):
        return plots.Bars(x=["a"], counts=[[c] for c in counts], names=names, colours=plots.style.ordered(len(names)), shared=shared)

    def legend(*panels):
        figure = stored.still(stored.Drawing([panels], "t", "c", 2.0, 3))
        return [text.get_text() for text in figure.legends[0].get_texts()]

    names = ["rank 1", "rank 2", "rank 3"]
    assert legend(bars([0, 0, 1], names, True), bars([1, 1, 0], names, True)) == names
    assert legend(bars([0, 1, 1], names, False), bars([1, 1, 0], names, False)) == names
    assert legend(bars([0, 1, 0], names, False)) == ["rank 2"]


def test_long_names_of_bars_are_written_aslant():
    def rotation(names):
        panel = plots.Bars(x=names, counts=[[1] * len(names)], names=["one"], colours=["#000000"])
        return plots.draw_bars(panel).axes.get_xticklabels()[0].get_rotation()

    assert (rotation(["1", "2"]), rotation(["descent", "momentum", "flow, samples"])) == (0.0, 40.0)


def test_a_small_real_study_can_be_drawn(tmp_path):
    study = pytest.importorskip("studies.minority_collapse")
    chosen = [p for p in study.points(study.Options(smoke=True, out=tmp_path)) if p["panel"] in ("bias",)]
    sweep.run(study.minority_collapse, chosen, out=tmp_path, same=study.SAME)
    (panels,) = minority_collapse_bias.make(collapse.read(tmp_path)).panels
    assert all(panel.known.all() for panel in panels)
