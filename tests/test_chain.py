"""Laws of the factor chain at every depth, against loops over entries and torch's automatic derivatives."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest

from catalog import LIBRARIES, to_library
from ufm.arrays import device_of, to_numpy
from ufm.chain import Chain, forward, pullback, push, push_pullback, rectify

B, D, K, COLS = 3, 4, 3, 5
CHAINS = [Chain(depth, features, hidden) for depth, features, hidden in product((1, 2, 3, 4), (False, True), (False, True))]
EACH = pytest.mark.parametrize(
    "chain", CHAINS, ids=[f"{c.depth}-H{'+' * c.features_rectified}-s{'+' * c.hidden_rectified}" for c in CHAINS]
)


class Point(NamedTuple):
    """Factors, a slope of the logits, and a move of each."""

    factors: list[Any]
    slope: Any
    moves: list[Any]
    slope_move: Any

    def map(self, function: Any) -> Point:
        return Point(
            [function(x) for x in self.factors], function(self.slope), [function(x) for x in self.moves], function(self.slope_move)
        )


def draw(chain: Chain) -> Point:
    rng = np.random.default_rng(chain.depth)

    def factors() -> list[Any]:
        return [rng.standard_normal((B, *shape)) for shape in chain.shapes(D, K, COLS)]

    return Point(factors(), rng.standard_normal((B, K, COLS)), factors(), rng.standard_normal((B, K, COLS)))


def everything(chain: Chain, at: Point) -> list[Any]:
    """Logits, layers, gradients, and the change of each of them along the moves."""
    Z, layers = forward(chain, at.factors)
    Z_change, changes = push(chain, at.factors, layers, at.moves)
    turned = push_pullback(chain, at.factors, layers, at.slope, at.moves, changes, at.slope_move)
    return [Z, *layers, *pullback(chain, at.factors, layers, at.slope), Z_change, *changes, *turned]


def inner(a: Any, b: Any) -> Any:
    """Sum of products over all factors, per run."""
    return sum(np.sum(x * y, axis=(1, 2)) for x, y in zip(a, b, strict=True))


def times(W: Any, A: Any) -> Any:
    """W A of one run, entry by entry."""
    rows, cols = W.shape[0], A.shape[1]
    return np.array([[sum(W[i, j] * A[j, c] for j in range(W.shape[1])) for c in range(cols)] for i in range(rows)])


def positive(A: Any, yes: bool) -> Any:
    return np.array([[max(x, 0.0) for x in row] for row in A]) if yes else A


@EACH
def test_forward_is_the_product(chain: Chain) -> None:
    """Z = W_L s(W_{L-1} ... s(W_1 A_0)) with A_0 = H or relu(H), layer by layer."""
    factors = draw(chain).factors
    Z, layers = forward(chain, factors)
    assert len(layers) == chain.depth
    for b in range(B):
        A = positive(factors[0][b], chain.features_rectified)
        for layer in range(chain.depth):
            assert layers[layer][b] == pytest.approx(A, rel=1e-13, abs=1e-14)
            pre = times(factors[layer + 1][b], A)
            A = positive(pre, chain.hidden_rectified and layer < chain.depth - 1)
        assert Z[b] == pytest.approx(A, rel=1e-13, abs=1e-13)


def torch_logits(chain: Chain, factors: Any) -> Any:
    torch = pytest.importorskip("torch")
    A = torch.relu(factors[0]) if chain.features_rectified else factors[0]
    for layer in range(1, chain.depth + 1):
        A = torch.bmm(factors[layer], A)
        A = torch.relu(A) if chain.hidden_rectified and layer < chain.depth else A
    return A


@EACH
def test_derivatives_against_torch(chain: Chain) -> None:
    """pullback, push and push_pullback are the gradient of <slope, Z> in the factors and its Hessian along moves of factors and slope."""
    torch = pytest.importorskip("torch")
    at = draw(chain)
    _, layers = forward(chain, at.factors)
    Z_change, changes = push(chain, at.factors, layers, at.moves)
    turned = push_pullback(chain, at.factors, layers, at.slope, at.moves, changes, at.slope_move)

    def paired(*arrays: Any) -> Any:
        return torch.sum(arrays[-1] * torch_logits(chain, arrays[:-1]))

    inputs = tuple(torch.tensor(x, requires_grad=True) for x in (*at.factors, at.slope))
    gradient = torch.autograd.grad(paired(*inputs), inputs)[:-1]
    along = tuple(torch.tensor(x) for x in (*at.moves, at.slope_move))
    *second, Z_second = torch.autograd.functional.hvp(paired, inputs, along)[1]
    got = [*pullback(chain, at.factors, layers, at.slope), *turned, Z_change]
    for mine, theirs in zip(got, [*gradient, *second, Z_second], strict=True):
        expected = theirs.numpy()
        assert mine == pytest.approx(expected, rel=1e-12, abs=1e-13 * np.abs(expected).max())


@EACH
def test_differences(chain: Chain) -> None:
    """Logits, layers and gradients change along the moves as push and push_pullback say."""
    at, h = draw(chain), 1e-5
    ahead, behind = (
        at._replace(factors=[f + s * h * m for f, m in zip(at.factors, at.moves, strict=True)], slope=at.slope + s * h * at.slope_move)
        for s in (1, -1)
    )
    half = len(everything(chain, at)) // 2
    for plus, minus, change in zip(
        everything(chain, ahead)[:half], everything(chain, behind)[:half], everything(chain, at)[half:], strict=True
    ):
        assert (plus - minus) / (2 * h) == pytest.approx(change, abs=1e-8 * max(1.0, np.abs(change).max()))


@EACH
def test_adjoint(chain: Chain) -> None:
    """<push(moves), slope> = <moves, pullback(slope)> for every run."""
    at = draw(chain)
    _, layers = forward(chain, at.factors)
    pushed = inner([push(chain, at.factors, layers, at.moves)[0]], [at.slope])
    pulled = inner(at.moves, pullback(chain, at.factors, layers, at.slope))
    assert pushed == pytest.approx(pulled, rel=1e-12)


@EACH
def test_second_derivative_is_symmetric(chain: Chain) -> None:
    """<u, change of pullback along v> = <v, change of pullback along u> at a fixed slope."""
    at, other = draw(chain), [np.roll(m, 1, axis=0) for m in draw(chain).moves]
    _, layers = forward(chain, at.factors)

    def along(moves: Any) -> list[Any]:
        changes = push(chain, at.factors, layers, moves)[1]
        return push_pullback(chain, at.factors, layers, at.slope, moves, changes, np.zeros_like(at.slope))

    assert inner(other, along(at.moves)) == pytest.approx(inner(at.moves, along(other)), rel=1e-12, abs=1e-13)


@EACH
@pytest.mark.parametrize("t", [1e-9, 0.3, 7.0, 1e9])
def test_homogeneous_in_each_factor(chain: Chain, t: float) -> None:
    """Scaling one factor by t > 0 scales the logits by t; by Euler, <factor, pullback> = <slope, Z> for each."""
    at = draw(chain)
    Z, layers = forward(chain, at.factors)
    for i in range(chain.depth + 1):
        scaled = [t * f if j == i else f for j, f in enumerate(at.factors)]
        assert forward(chain, scaled)[0] == pytest.approx(t * Z, rel=1e-13, abs=1e-13 * t * np.abs(Z).max())
    for factor, gradient in zip(at.factors, pullback(chain, at.factors, layers, at.slope), strict=True):
        assert inner([factor], [gradient]) == pytest.approx(inner([Z], [at.slope]), rel=1e-12, abs=1e-13)


def test_slope_of_the_relu_at_zero_is_zero() -> None:
    """relu'(0) = 0, for features and inner layers, forwards and backwards."""
    chain = Chain(2, features_rectified=True, hidden_rectified=True)
    H, W1, W2 = np.array([[[0.0, 1.0, -1.0]]]), np.zeros((1, 1, 1)), np.ones((1, 2, 1))
    ones = [np.ones_like(x) for x in (H, W1, W2)]
    _, layers = forward(chain, (H, W1, W2))
    assert all(np.all(g == 0) for g in pullback(chain, (H, W1, W2), layers, np.ones((1, 2, 3))))
    assert np.all(push(chain, (H, W1, W2), layers, ones)[0] == 0)
    _, layers = forward(chain, (H, ones[1], W2))
    assert pullback(chain, (H, ones[1], W2), layers, np.ones((1, 2, 3)))[0].tolist() == [[[0.0, 2.0, 0.0]]]
    assert push(chain, (H, ones[1], W2), layers, [ones[0], W1, np.zeros_like(W2)])[1][0].tolist() == [[[0.0, 1.0, 0.0]]]


def test_rectify() -> None:
    assert rectify(np.array([-1.0, 0.0, 2.0, np.inf])).tolist() == [0.0, 0.0, 2.0, np.inf]
    assert np.isnan(rectify(np.array([np.nan])))[0]


@pytest.mark.parametrize("bias", [False, True])
def test_shapes(bias: bool) -> None:
    """(d, cols), (d, d) between, (K, d), and (K, 1) for a bias."""
    assert Chain(1, bias=bias).shapes(4, 3, 5) == [(4, 5), (3, 4), *([(3, 1)] * bias)]
    assert Chain(3, bias=bias).shapes(4, 3, 5) == [(4, 5), (4, 4), (4, 4), (3, 4), *([(3, 1)] * bias)]


@EACH
def test_a_bias_is_left_to_the_objective(chain: Chain) -> None:
    """Factors past W_L do not enter the chain."""
    factors = draw(chain).factors
    assert np.array_equal(forward(chain, [*factors, np.ones((B, K, 1))])[0], forward(chain, factors)[0])


@EACH
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_agrees(chain: Chain, library: str) -> None:
    """numpy, torch, the strict reference and its second device give the same numbers, in their own arrays."""
    at = draw(chain)
    on = at.map(lambda x: to_library(library, x))
    for got, expected in zip(everything(chain, on), everything(chain, at), strict=True):
        assert (type(got), got.dtype, device_of(got)) == (type(on.slope), on.slope.dtype, device_of(on.slope))
        assert to_numpy(got) == pytest.approx(expected, rel=1e-13, abs=5e-15 * max(1.0, np.abs(expected).max()))


@EACH
def test_single_precision_stays_single(chain: Chain) -> None:
    """No step widens the arrays it is given."""
    torch = pytest.importorskip("torch")
    at = draw(chain).map(lambda x: torch.asarray(x.astype(np.float32)))
    assert {x.dtype for x in everything(chain, at)} == {torch.float32}


@EACH
def test_meta_device(chain: Chain) -> None:
    """Nothing is made on the default device: tensors without memory go through, in the right shapes."""
    torch = pytest.importorskip("torch")
    at = draw(chain)
    results = everything(chain, at.map(lambda x: torch.asarray(x).to("meta")))
    assert {x.device.type for x in results} == {"meta"}
    assert [tuple(x.shape) for x in results] == [x.shape for x in everything(chain, at)]


@EACH
def test_misplaced_array_is_noticed(chain: Chain) -> None:
    """With any one input left on another device, some step refuses: the check on the second device can fail.

    torch multiplies matrices of a CPU and of `meta` without complaint, so only the strict reference sees this in a chain of products.
    """
    at = draw(chain)
    inputs = [*at.factors, at.slope, *at.moves, at.slope_move]
    n = chain.depth + 1
    for stays in range(len(inputs)):
        x = [to_library("strict" if i == stays else "strict_device1", a) for i, a in enumerate(inputs)]
        with pytest.raises(ValueError, match="device"):
            everything(chain, Point(x[:n], x[n], x[n + 1 : -1], x[-1]))
