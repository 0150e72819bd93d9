"""The helpers every formula stands on give the same on every library and device, and keep dtype and device."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from catalog import LIBRARIES, to_library
from ufm.arrays import (
    block_size,
    by_transpose,
    column_products,
    column_sums,
    device_of,
    flatten,
    like,
    namespace,
    norm,
    place,
    row_blocks,
    safe_exp_sum,
    to_numpy,
)

RNG = np.random.default_rng(0)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kind(x: Any) -> tuple[Any, Any, Any]:
    return type(x), x.dtype, device_of(x)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_like(library: str, dtype: Any) -> None:
    """The values, as an array of x's library, dtype and device."""
    x = to_library(library, np.zeros(2, dtype=dtype))
    made = like(np.array([[0.5, 0.25]]), x)
    assert kind(made) == kind(x)
    assert to_numpy(made).tolist() == [[0.5, 0.25]]
    assert kind(like(1.5, x)) == kind(x)


@pytest.mark.parametrize("cached", [1, 400, 1 << 20])
def test_column_products_in_blocks(library: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows of products, whatever the blocks, which cover every row once."""
    monkeypatch.setattr("ufm.arrays.CACHED_BYTES", cached)
    x, y = RNG.normal(size=(2, 3, 7, 5))
    found = column_products(to_library(library, x), to_library(library, y))
    assert to_numpy(found) == pytest.approx(np.sum(x * y, axis=1, keepdims=True), rel=1e-13, abs=1e-14)
    rows = [i for block in row_blocks(to_library(library, x)) for i in range(7)[block]]
    assert rows == list(range(7))


@pytest.mark.parametrize(("r", "c", "d"), [(4, 3, 5), (3, 4, 5), (80, 70, 90)])
def test_by_transpose(library: str, r: int, c: int, d: int) -> None:
    """x y^T of small matrices, of few rows, and of large ones."""
    x, y = RNG.normal(size=(2, r, c)), RNG.normal(size=(2, d, c))
    found = by_transpose(to_library(library, x), to_library(library, y))
    assert to_numpy(found) == pytest.approx(np.einsum("brc,bdc->brd", x, y), rel=1e-12, abs=1e-13)


def test_to_numpy_inverts(library: str) -> None:
    """To a library and back changes no bit."""
    x = RNG.normal(size=(2, 3))
    back = to_numpy(to_library(library, x))
    assert isinstance(back, np.ndarray)
    assert np.array_equal(back, x)


@pytest.mark.parametrize("x", [np.float64(0.5), np.True_, 0.5, [0.5, 1.5], "text"])
def test_to_numpy_takes_what_numpy_takes(x: Any) -> None:
    assert np.array_equal(to_numpy(x), np.asarray(x))


def test_to_numpy_leaves_the_graph_behind() -> None:
    torch = pytest.importorskip("torch")
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]


def test_sums_and_shapes(library: str) -> None:
    """column_sums adds rows, flatten keeps the batch axis, norm is over the last axis; dtype and device are x's."""
    for dtype in (np.float64, np.float32):
        x = RNG.integers(-9, 9, size=(4, 2, 3)).astype(dtype)
        on = to_library(library, x)
        for got, expected in ((column_sums(on), x.sum(axis=1, keepdims=True)), (flatten(on), x.reshape(4, 6))):
            assert kind(got) == kind(on)
            assert np.array_equal(to_numpy(got), expected)
        assert kind(norm(on)) == kind(on)
        assert to_numpy(norm(on)) == pytest.approx(np.linalg.norm(x, axis=-1), rel=4 * float(np.finfo(dtype).eps))


def test_place() -> None:
    """Placing keeps the precision; on numpy it is the array itself."""
    torch = pytest.importorskip("torch")
    x = RNG.normal(size=(2, 3))
    assert place(x, "numpy") is x
    placed = place(x, "cpu")
    assert placed.dtype == torch.float64
    assert np.array_equal(to_numpy(placed), x)


def test_place_of_a_read_only_array_is_a_copy() -> None:
    """Frozen arrays, such as a problem's, can be placed without a warning, and writing to the copy leaves them alone."""
    pytest.importorskip("torch")
    x = np.ones(3)
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placed = place(x, "cpu")
    placed[0] = 5.0
    assert x.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
def test_place_on_an_accelerator() -> None:
    x = RNG.normal(size=(2, 3))
    placed = place(x, "cuda")
    assert device_of(placed).type == "cuda"
    assert np.array_equal(to_numpy(placed), x)


def test_place_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"device 'cuda' needs torch; install the extra: pip install ufm\[torch\]"):
        place(np.zeros(2), "cuda")


def test_place_on_no_such_device() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"^device 'nowhere' [^\n]*$"):
        place(np.zeros(2), "nowhere")


def test_libraries_do_not_mix() -> None:
    """numpy and torch in one call is an error, not a silent copy."""
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError):
        namespace(np.zeros(2), torch.zeros(2))


EXPONENTS = {
    "moderate": [0.0, 0.3, -0.2, 1.5],
    "tiny sum": [0.0, -40.0, -300.0, -700.0],
    "huge": [0.0, 1e3, 900.0, -1e3],
    "one ahead by a hair": [0.0, 1e-9, -1e-9, 0.0],
    "equal": [0.0, 0.0, 0.0, 0.0],
    "beyond exp": [0.0, -745.0, -1e4, -1e308],
}


@pytest.mark.parametrize("case", EXPONENTS)
def test_safe_exp_sum(case: str, library: str) -> None:
    """log(1 + S), exp(R)/(1 + S) and S/(1 + S) have full relative accuracy wherever they are normal numbers."""
    R = EXPONENTS[case]
    keep = [0.0, 1.0, 1.0, 1.0]
    log, share, total = safe_exp_sum(to_library(library, np.array(R)[:, None]), to_library(library, np.array(keep)[:, None]))
    with mp.workdps(400):
        S = sum(mp.exp(mpf(r)) for r in R[1:])
        exact = [mp.log1p(S), S / (1 + S), *(mp.exp(mpf(r)) / (1 + S) for r in R[1:])]
        got = [to_numpy(log)[0, 0], to_numpy(total)[0, 0], *to_numpy(share)[1:, 0]]
        for g, e in zip(got, exact, strict=True):
            assert abs(mpf(float(g)) - e) <= mpf(4e-16) * e + mpf(5e-324), (float(g), e)
    assert to_numpy(share)[0, 0] == 0.0


def test_block_size() -> None:
    """Blocks shrink with the working set but never vanish on a CPU."""
    sizes = [block_size(b, "numpy") for b in (1.0, 1e4, 1e5, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert block_size(1e4, "cpu") == block_size(1e4, "numpy") == 1500
