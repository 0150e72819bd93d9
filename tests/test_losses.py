"""Laws of every loss, against its formula written as a plain loop over classes and differentiated by three independent means.

Arrays are (G, K, cols) with one run per cell, columns are samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf

from catalog import COUNTS, LIBRARIES, LOSSES, autograd_ce, to_library
from ufm.arrays import device_of, to_numpy
from ufm.losses import MSE, TABLE, CrossEntropy, DotRegression, Focal, FromAutograd, from_autograd

G, K = 2, 3
COUNT = np.array(COUNTS[G, K])
LABELS = np.stack([np.repeat(np.arange(K), row) for row in COUNT])  # (G, cols)
ONEHOT = np.moveaxis(np.eye(K)[LABELS], -1, -2)  # (G, K, cols)
RNG = np.random.default_rng(1)
SIGNS = RNG.choice([-1.0, 1.0], size=ONEHOT.shape)
NOISE = RNG.standard_normal(ONEHOT.shape)
V = np.random.default_rng(2).standard_normal(ONEHOT.shape)

LOGITS = {
    "zero": np.zeros(ONEHOT.shape),
    "moderate": 2.0 * NOISE,
    "thousands": 1e3 * SIGNS + NOISE,
    "right by 40": 40.0 * ONEHOT + NOISE,
    "right by 350": 350.0 * ONEHOT + NOISE,
    "right by 700": 700.0 * ONEHOT + NOISE,
    "wrong by 700": -700.0 * ONEHOT + NOISE,
}
MODERATE = LOGITS["moderate"]

BUILT = [(name, make(G, K)) for name, make in LOSSES]
EVERY = pytest.mark.parametrize("loss", [loss for _, loss in BUILT], ids=[name for name, _ in BUILT])
NATIVE = pytest.mark.parametrize(
    "loss", [x for _, x in BUILT if not isinstance(x, FromAutograd)], ids=[n for n, x in BUILT if x.name != "autograd"]
)
PROVEN = ("CE", "MSE", "DR")  # convex, with a conjugate
CONVEX = pytest.mark.parametrize("loss", [x for _, x in BUILT if x.name in PROVEN], ids=[n for n, x in BUILT if x.name in PROVEN])
ENTROPIC = pytest.mark.parametrize("loss", [x for _, x in BUILT if x.name == "CE"], ids=[n for n, x in BUILT if x.name == "CE"])
AT = pytest.mark.parametrize("at", LOGITS)


def targets(loss: Any) -> Any:
    return loss.targets(ONEHOT, COUNT)


def columns() -> list[tuple[int, int]]:
    return [(g, c) for g in range(G) for c in range(ONEHOT.shape[2])]


def in_cell(parameter: Any, g: int) -> list[float]:
    """A loss parameter of cell g, one number per class."""
    return [float(x) for x in np.broadcast_to(parameter, (G, K))[g]]


def formula(m: Any, loss: Any, z: Any, g: int, c: int) -> Any:
    """The loss of one column as papers write it; m supplies exp and log for the kind of numbers in z."""
    y, n = int(LABELS[g, c]), COUNT[g]
    if isinstance(loss, FromAutograd):
        loss = CrossEntropy() if loss.function is autograd_ce else MSE()
    if isinstance(loss, MSE):
        return sum((z[j] - float(j == y)) ** 2 for j in range(K)) / 2
    if isinstance(loss, DotRegression):
        return (z[y] - 1) ** 2 / 2
    if isinstance(loss, Focal):
        p = m.exp(z[y]) / sum(m.exp(z[j]) for j in range(K))
        return (1 - p) ** loss.gamma * -m.log(p)
    temperature, a = in_cell(loss.temperature, g), [0.0] * K
    if loss.logit_adjustment is not None:
        scalar = np.ndim(loss.logit_adjustment) == 0
        a = [float(loss.logit_adjustment) * math.log(n_k / sum(n)) for n_k in n] if scalar else in_cell(loss.logit_adjustment, g)
    weight = 1.0 if loss.class_weights is None else in_cell(loss.class_weights, g)[y]
    u = [z[j] / temperature[j] + a[j] for j in range(K)]
    t = [(1 - loss.label_smoothing) * (j == y) + loss.label_smoothing / K for j in range(K)]
    return weight * (m.log(sum(m.exp(x) for x in u)) - sum(t[j] * u[j] for j in range(K)))


def numbers(Z: Any, g: int, c: int) -> list[Any]:
    return [mpf(float(x)) for x in Z[g, :, c]]


def close(got: Any, exact: Any, floor: float, relative: float = 1e-12) -> bool:
    """Whether a float is within `relative` of an exact number, or within `floor`."""
    return abs(mpf(float(got)) - exact) <= mpf(relative) * abs(exact) + mpf(floor)


TINY = 1e-307  # below this float64 has no full precision


def digits_and_step(at: str) -> tuple[int, str]:
    """Decimal digits, and the step of differences, that resolve the exponentials of these logits."""
    return (160, "1e-30") if at in ("zero", "moderate", "right by 40") else (700, "1e-60")


@NATIVE
@AT
def test_value(loss: Any, at: str) -> None:
    """The value is the formula's to 1e-12 of itself, from e^-700 to 1e6."""
    got = loss.value(LOGITS[at], targets(loss))
    floor = TINY if not getattr(loss, "label_smoothing", 0) else 1e-13  # smoothing weighs differences of logits
    with mp.workdps(digits_and_step(at)[0]):
        for g, c in columns():
            assert close(got[g, c], formula(mp, loss, numbers(LOGITS[at], g, c), g, c), floor)


@NATIVE
@AT
def test_slope(loss: Any, at: str) -> None:
    """Every entry of the slope is the formula's derivative to 1e-12 of itself: differences of many digits."""
    got = loss.slope(LOGITS[at], targets(loss))
    floor = TINY if not getattr(loss, "label_smoothing", 0) else 1e-15
    digits, step = digits_and_step(at)
    with mp.workdps(digits):
        h = mpf(step)
        for g, c in columns():
            z = numbers(LOGITS[at], g, c)
            for j in range(K):
                ahead, behind = ([x + s * h * (i == j) for i, x in enumerate(z)] for s in (1, -1))
                exact = (formula(mp, loss, ahead, g, c) - formula(mp, loss, behind, g, c)) / (2 * h)
                assert close(got[g, j, c], exact, floor), (g, j, c)


@NATIVE
@AT
def test_curve(loss: Any, at: str) -> None:
    """The Hessian along V is the formula's second difference, to 1e-12 of the column's largest entry.

    Where a wrong class leads by hundreds the loss is a straight line in float64, and the curve is zero to rounding only.
    """
    got = loss.curve(LOGITS[at], targets(loss), V)
    digits, step = digits_and_step(at)
    with mp.workdps(digits):
        h = mpf(step)
        for g, c in columns():
            z, v = numbers(LOGITS[at], g, c), numbers(V, g, c)

            def along(s: int, t: int, j: int, z: Any = z, v: Any = v, g: int = g, c: int = c, h: Any = h) -> Any:
                return formula(mp, loss, [z[i] + s * h * v[i] + t * h * (i == j) for i in range(K)], g, c)

            exact = [(along(1, 1, j) - along(1, -1, j) - along(-1, 1, j) + along(-1, -1, j)) / (4 * h * h) for j in range(K)]
            floor = 1e-12 * max(abs(e) for e in exact) + (TINY if at not in ("thousands", "wrong by 700") else 1e-15)
            assert all(close(got[g, j, c], exact[j], floor) for j in range(K)), (g, c, got[g, :, c], exact)


@EVERY
def test_slope_and_curve_against_torch(loss: Any) -> None:
    """torch's backward and double backward through the formula give the slope and the curve."""
    torch = pytest.importorskip("torch")
    slope, curve = loss.slope(MODERATE, targets(loss)), loss.curve(MODERATE, targets(loss), V)
    for g, c in columns():
        z = torch.tensor(MODERATE[g, :, c], requires_grad=True)
        (first,) = torch.autograd.grad(formula(torch, loss, z, g, c), z, create_graph=True)
        (second,) = torch.autograd.grad(first @ torch.tensor(V[g, :, c]), z)
        assert slope[g, :, c] == pytest.approx(first.detach().numpy(), rel=1e-12, abs=1e-14)
        assert curve[g, :, c] == pytest.approx(second.numpy(), rel=1e-12, abs=1e-14)


@EVERY
def test_value_and_slope_against_autograd(loss: Any) -> None:
    """The autograd package gives the formula's value and gradient."""
    import autograd.numpy as anp
    from autograd import value_and_grad

    value, slope = loss.value(MODERATE, targets(loss)), loss.slope(MODERATE, targets(loss))
    for g, c in columns():
        expected, gradient = value_and_grad(lambda z, g=g, c=c: formula(anp, loss, z, g, c))(MODERATE[g, :, c])
        assert value[g, c] == pytest.approx(expected, rel=1e-13)
        assert slope[g, :, c] == pytest.approx(gradient, rel=1e-12, abs=1e-14)


@EVERY
@pytest.mark.parametrize("at", ["zero", "moderate"])
def test_differences(loss: Any, at: str) -> None:
    """Value, slope and curve are one function and its derivatives along V."""
    T, Z, h = targets(loss), LOGITS[at], 1e-5
    first = (loss.value(Z + h * V, T) - loss.value(Z - h * V, T)) / (2 * h)
    second = (loss.slope(Z + h * V, T) - loss.slope(Z - h * V, T)) / (2 * h)
    assert first == pytest.approx(np.sum(loss.slope(Z, T) * V, axis=1), abs=2e-9)
    assert second == pytest.approx(loss.curve(Z, T, V), abs=2e-9)


@EVERY
@AT
def test_value_and_slope_is_both(loss: Any, at: str) -> None:
    """One call gives what two calls give, bit for bit, with the shapes (B, cols) and (B, K, cols)."""
    value, slope = loss.value_and_slope(LOGITS[at], targets(loss))
    assert np.array_equal(value, loss.value(LOGITS[at], targets(loss)))
    assert np.array_equal(slope, loss.slope(LOGITS[at], targets(loss)))
    assert value.shape == LABELS.shape
    assert slope.shape == ONEHOT.shape
    assert np.all(np.isfinite(value))


@ENTROPIC
@AT
def test_slopes_sum_to_zero(loss: Any, at: str) -> None:
    """sum_j temperature_j g_j = 0 to the rounding of its K terms, however small the slopes are."""
    slope = np.broadcast_to(loss.temperature, (G, K))[:, :, None] * loss.slope(LOGITS[at], targets(loss))
    curve = np.broadcast_to(loss.temperature, (G, K))[:, :, None] * loss.curve(LOGITS[at], targets(loss), V)
    for x in (slope, curve):
        assert np.all(np.abs(x.sum(axis=1)) <= K * 2.3e-16 * np.abs(x).max(axis=1) + TINY)


@CONVEX
@AT
def test_fenchel_young_equality(loss: Any, at: str) -> None:
    """value(z) + conjugate(g) = z.g at g = slope(z)."""
    T, Z = targets(loss), LOGITS[at]
    value, slope = loss.value_and_slope(Z, T)
    conjugate = loss.conjugate(slope, T)
    size = np.abs(value) + np.abs(conjugate) + np.sum(np.abs(Z * slope), axis=1)
    assert np.all(np.abs(value + conjugate - np.sum(Z * slope, axis=1)) <= 1e-12 * size + TINY)


def random_slopes(loss: Any, rng: np.random.Generator, concentration: float = 0.5) -> Any:
    """Slopes anywhere in the conjugate's domain."""
    if isinstance(loss, MSE):
        return 3.0 * rng.standard_normal(ONEHOT.shape)
    if isinstance(loss, DotRegression):
        return 3.0 * rng.standard_normal(ONEHOT.shape) * ONEHOT
    T = targets(loss)
    v = np.moveaxis(rng.dirichlet([concentration] * K, size=LABELS.shape), -1, -2)
    soft = ONEHOT if T.soft is None else T.soft
    omega = np.ones((G, 1, 1)) if T.weight is None else T.weight
    return omega * (v - soft) / np.broadcast_to(loss.temperature, (G, K))[:, :, None]


@CONVEX
def test_fenchel_young_inequality(loss: Any) -> None:
    """value(z) + conjugate(g) >= z.g for all z and all g of the domain, where the conjugate is finite."""
    T, rng = targets(loss), np.random.default_rng(3)
    for scale in (0.1, 1.0, 10.0, 100.0):
        for _ in range(10):
            Z, slope = scale * rng.standard_normal(ONEHOT.shape), random_slopes(loss, rng)
            conjugate = loss.conjugate(slope, T)
            size = np.abs(loss.value(Z, T)) + np.abs(conjugate) + np.sum(np.abs(Z * slope), axis=1)
            assert np.all(np.isfinite(conjugate))
            assert np.all(loss.value(Z, T) + conjugate >= np.sum(Z * slope, axis=1) - 1e-14 * size)


@ENTROPIC
def test_conjugate_domain(loss: Any) -> None:
    """Finite on the corners of the simplex, infinite once an entry of v = temperature g/omega + t is negative."""
    T = targets(loss)
    soft = ONEHOT if T.soft is None else T.soft
    unit = (np.ones((G, 1, 1)) if T.weight is None else T.weight) / np.broadcast_to(loss.temperature, (G, K))[:, :, None]
    for j in range(K):
        corner = np.zeros(ONEHOT.shape)
        corner[:, j] = 1.0
        assert np.all(np.isfinite(loss.conjugate(unit * (corner - soft), T)))
    inner = np.full(ONEHOT.shape, 1.0 / K)
    assert np.all(np.isfinite(loss.conjugate(unit * (inner - soft), T)))
    assert np.all(np.isinf(loss.conjugate(unit * (inner + 1.01 * (K / (K - 1)) * (inner - ONEHOT) * (1 - 1 / K) - soft), T)))
    wrong = np.roll(ONEHOT, 1, axis=1)
    assert np.all(np.isinf(loss.conjugate(unit * (ONEHOT + 1e-9 * (ONEHOT - wrong) - soft), T)))


def test_no_conjugate_without_convexity() -> None:
    """A loss that is not known to be convex offers no conjugate."""
    for name, loss in BUILT:
        assert hasattr(loss, "conjugate") == hasattr(loss, "recentre") == (loss.name in PROVEN), name


WEIGHTS = np.random.default_rng(4).uniform(0.1, 2.0, LABELS.shape)


@CONVEX
@pytest.mark.parametrize("at", [*LOGITS, "anywhere"])
def test_recentre(loss: Any, at: str) -> None:
    """The weighted slopes sum to zero, relative to their own size, and stay in the conjugate's domain; doing it twice is doing it once."""
    T = targets(loss)
    slope = random_slopes(loss, np.random.default_rng(5)) if at == "anywhere" else loss.slope(LOGITS[at], T)
    moved = loss.recentre(slope, T, WEIGHTS)
    w = WEIGHTS[:, None, :]
    size = np.sum(w * np.abs(slope), axis=(1, 2))[:, None]
    assert np.all(np.abs(np.sum(w * moved, axis=2)) <= 1e-15 * size)
    assert np.all(np.isfinite(loss.conjugate(moved, T)))
    again = loss.recentre(moved, T, WEIGHTS)
    assert np.all(np.abs(again - moved) <= 2e-15 * size[:, :, None])


@CONVEX
@pytest.mark.parametrize("at", [*LOGITS, "anywhere"])
def test_recentre_moves_little(loss: Any, at: str) -> None:
    """The slopes move, in weighted 1-norm, by at most a few times the sum they had: a nearly centred dual point stays a good one."""
    T = targets(loss)
    slope = random_slopes(loss, np.random.default_rng(5)) if at == "anywhere" else loss.slope(LOGITS[at], T)
    moved, w = loss.recentre(slope, T, WEIGHTS), WEIGHTS[:, None, :]
    temperature = np.broadcast_to(getattr(loss, "temperature", 1.0), (G, K))[:, :, None]
    off = np.sum(np.abs(np.sum(w * temperature * slope, axis=2)), axis=1)
    change = np.sum(np.abs(w * temperature * (moved - slope)), axis=(1, 2))
    assert np.all(change <= 2 * off + 1e-15 * np.sum(np.abs(w * temperature * slope), axis=(1, 2)))


@EVERY
@pytest.mark.parametrize("library", LIBRARIES)
@AT
def test_every_library_agrees(loss: Any, library: str, at: str) -> None:
    """numpy, torch, the strict reference and its second device give the same numbers, in their own arrays."""
    T, Z = targets(loss), LOGITS[at]
    on = to_library(library, Z)
    T_on, V_on = T.map(lambda x: to_library(library, x)), to_library(library, V)
    slope = loss.slope(Z, T)
    pairs = [
        (loss.value(on, T_on), loss.value(Z, T)),
        (loss.slope(on, T_on), slope),
        (loss.curve(on, T_on, V_on), loss.curve(Z, T, V)),
    ]
    if hasattr(loss, "conjugate"):
        pairs.append((loss.conjugate(to_library(library, slope), T_on), loss.conjugate(slope, T)))
        moved = loss.recentre(to_library(library, slope), T_on, to_library(library, WEIGHTS))
        pairs.append((moved, loss.recentre(slope, T, WEIGHTS)))
    for got, expected in pairs:
        assert type(got) is type(on)
        assert (got.dtype, device_of(got)) == (on.dtype, device_of(on))
        assert to_numpy(got) == pytest.approx(expected, rel=1e-13, abs=5e-15 * max(1.0, np.abs(expected).max()))


@NATIVE
def test_meta_device(loss: Any) -> None:
    """Nothing is made on the default device or read back: the formulas run on tensors without memory."""
    torch = pytest.importorskip("torch")
    T = targets(loss).map(lambda x: torch.asarray(np.array(x)).to("meta"))
    Z = torch.empty(ONEHOT.shape, dtype=torch.float64, device="meta")
    results = [*loss.value_and_slope(Z, T), loss.value(Z, T), loss.slope(Z, T), loss.curve(Z, T, Z)]
    if hasattr(loss, "conjugate"):
        w = torch.empty(LABELS.shape, dtype=torch.float64, device="meta")
        results += [loss.conjugate(Z, T), loss.recentre(Z, T, w)]
    assert all(x.device.type == "meta" and x.dtype == torch.float64 for x in results)


@AT
def test_focal_without_focus_is_cross_entropy(at: str) -> None:
    """gamma = 0: the same value, slope and curve, bit for bit."""
    Z, T = LOGITS[at], targets(CrossEntropy())
    for method, arguments in (("value", (Z, T)), ("slope", (Z, T)), ("curve", (Z, T, V))):
        assert np.array_equal(getattr(Focal(0.0), method)(*arguments), getattr(CrossEntropy(), method)(*arguments)), method


def test_trivial_options_change_nothing() -> None:
    """Weights 1, shift 0, temperature 1 and smoothing 0 are the textbook loss, bit for bit, and cost no arrays."""
    same = CrossEntropy(0.0, class_weights=np.ones(K), logit_adjustment=0.0, temperature=np.ones((G, K)))
    T = targets(same)
    assert (T.soft, T.weight, T.shift, T.temperature) == (None, None, None, None)
    assert np.array_equal(same.value(MODERATE, T), CrossEntropy().value(MODERATE, targets(CrossEntropy())))


@pytest.mark.parametrize(
    ("written", "native"),
    [(name, "mse" if name == "autograd_mse" else "ce") for name, loss in BUILT if isinstance(loss, FromAutograd)],
)
def test_user_written_loss_is_its_native_twin(written: str, native: str) -> None:
    """A loss written with autograd.numpy has the value, slope and curve of the loss it copies."""
    user, own = dict(BUILT)[written], dict(BUILT)[native]
    T = targets(own)
    for method, arguments in (("value", (MODERATE, T)), ("slope", (MODERATE, T)), ("curve", (MODERATE, T, V))):
        got, expected = getattr(user, method)(*arguments), getattr(own, method)(*arguments)
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-14), method


def test_user_written_loss_needs_no_derivative_by_hand() -> None:
    """Any smooth function of a column will do: here the Huber-like sqrt(1 + |z - e|^2)."""
    import autograd.numpy as anp

    loss = from_autograd(lambda z, e: anp.sqrt(1 + anp.sum((z - e) ** 2)))
    E = MODERATE - ONEHOT
    root = np.sqrt(1 + np.sum(E * E, axis=1, keepdims=True))
    assert loss.value(MODERATE, targets(loss)) == pytest.approx(root[:, 0], rel=1e-15)
    assert loss.slope(MODERATE, targets(loss)) == pytest.approx(E / root, rel=1e-14)


def test_the_catalogue_holds_every_loss() -> None:
    """A loss in the table at the foot of ufm.losses has rows in the catalogue."""
    assert set(TABLE) == {loss.name for _, loss in BUILT}
