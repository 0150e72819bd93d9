"""Floors and margins on spheres: their formulas at 50 digits, and minimisation over everything they bound, which never gets below them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from mpmath import mp, mpf
from scipy.optimize import minimize

import ufm
from ufm import etf, frames, heads
from ufm.theory import limits

BIASES = ("none", "free", "centred")


@pytest.mark.parametrize("K", [2, 3, 10, 1000, 10**6])
@pytest.mark.parametrize("tau", [0.0, 1e-12, 0.3, 5.0, 40.0, 690.0, 1e5])
@pytest.mark.parametrize("T", [0.5, 1.0, 7.0])
def test_cross_entropy_floor(K: int, tau: float, T: float) -> None:
    """log(1 + (K-1) exp(-tau K/((K-1) T))) to the rounding of the exponent; zero where it is below 1e-308."""
    with mp.workdps(60):
        exact = mp.log1p((K - 1) * mp.exp(-mpf(tau) * K / (K - 1) / mpf(T)))
        got = float(limits.cross_entropy_floor(K, tau, T))
        assert abs(got - exact) <= mpf(1e-15 * (1 + tau / T)) * exact + mpf(1e-308)
        assert got >= 0


def test_known_values() -> None:
    """tau = 5: the values printed for 10, 50, 100 and 1000 classes; margins 1.1111 and 50/9; arrays broadcast."""
    floors = limits.cross_entropy_floor([10, 50, 100, 1000], 5.0)
    assert floors == pytest.approx([0.03420, 0.26093, 0.49116, 2.04091], abs=5e-6)
    assert limits.cosine_margin([2, 10]) == pytest.approx([2.0, 10 / 9], rel=1e-15)
    assert limits.logit_margin(10, [1.0, 5.0]) == pytest.approx([10 / 9, 50 / 9], rel=1e-15)
    assert limits.cross_entropy_floor([[2], [3]], [1.0, 2.0, 3.0]).shape == (2, 3)
    assert limits.squared_error_floor([2, 3], 0.1).shape == limits.squared_error_floor([2, 3], 0.1, "free").shape == (2,)


def mean_loss(torch: Any, name: str, Z: Any, y: Any) -> Any:
    """The mean over samples of a loss of logits Z (K, N), as torch has it."""
    if name == "CE":
        return torch.nn.functional.cross_entropy(Z.T, y)
    if name == "MSE":
        return 0.5 * ((Z.T - torch.eye(len(Z), dtype=Z.dtype)[y]) ** 2).sum(dim=1).mean()
    return 0.5 * ((Z[y, torch.arange(len(y))] - 1) ** 2).mean()


def searched(
    name: str, bias: str, tau: float, d: int, counts: list[int], rows: bool, tries: int = 3, T: float = 1.0, relu: bool = False
) -> float:
    """The least mean loss found over features of norm tau, W of unit rows (or in the ball ||W||^2 <= K), and a bias of that kind."""
    torch = pytest.importorskip("torch")
    K, y = len(counts), torch.as_tensor(np.repeat(np.arange(len(counts)), counts))
    N, rng = len(y), np.random.default_rng(0)

    def loss(x: Any) -> Any:
        W, H, b = x[: K * d].reshape(K, d), x[K * d : -K].reshape(d, N), x[-K:, None]
        size = W.norm(dim=1, keepdim=True) if rows else torch.clamp(W.norm() / K**0.5, min=1.0)
        H = H * H if relu else H  # any direction of entries >= 0
        W, H = W / size, tau * H / H.norm(dim=0)
        Z = W @ H
        Z = Z + b if bias == "free" else Z - Z.mean(dim=1, keepdim=True) if bias == "centred" else Z
        return mean_loss(torch, name, Z / T, y)

    def both(x: Any) -> tuple[float, Any]:
        leaf = torch.tensor(x, requires_grad=True)
        value = loss(leaf)
        value.backward()
        return float(value.detach()), leaf.grad.numpy()

    begin = rng.standard_normal((tries, K * d + d * N + K))
    found = [minimize(both, x, jac=True, method="L-BFGS-B", options=dict(maxiter=3000, ftol=1e-15, gtol=1e-10)) for x in begin]
    return float(min(result.fun for result in found))


def floor(name: str, K: int, tau: float, bias: Any) -> float:
    if name == "CE":
        return float(limits.cross_entropy_floor(K, tau))
    return float(limits.squared_error_floor(K, tau, bias) if name == "MSE" else limits.dot_regression_floor(tau, bias))


@pytest.mark.parametrize("name", ["CE", "MSE", "DR"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("tau", [0.4, 0.9, 3.0])
def test_minimisation_ends_at_the_floor(name: str, bias: str, tau: float) -> None:
    """Unit rows reach the floor, at the width it asks for and above, and nothing in the ball ||W||^2 <= K falls below it."""
    for K, d in ((2, 4), (3, 3)):
        exact = floor(name, K, tau, bias)
        for rows in (True, False):
            assert exact - 1e-13 <= searched(name, bias, tau, d, [2] * K, rows) <= exact + 1e-8


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("tau", [0.4, 3.0])
def test_rectified_features_end_at_their_own_floor(bias: str, tau: float) -> None:
    """Entries >= 0: unit rows reach log(1 + (K-1) exp(-tau sqrt(K/(K-1)))), nothing in the ball falls below it."""
    for K, d in ((2, 4), (3, 3)):
        exact = float(limits.cross_entropy_floor(K, tau, features="relu"))
        assert exact == pytest.approx(np.log1p((K - 1) * np.exp(-tau * np.sqrt(K / (K - 1)))), rel=1e-14)
        assert exact > float(limits.cross_entropy_floor(K, tau)) + 0.01
        for rows in (True, False):
            assert exact - 1e-13 <= searched("CE", bias, tau, d, [2] * K, rows, relu=True) <= exact + 1e-8


@pytest.mark.parametrize("K", [2, 10, 1000])
def test_orthogonal_features_reach_the_floor_of_rectified_ones(K: int) -> None:
    """h_k = tau e_k with the nearest simplex ETF as classifier: margins and cross-entropy of features="relu"."""
    tau, H = 5.0, np.eye(K)
    Z = tau * etf.nearest(H).W @ H
    gaps = Z[0, 0] - Z[1:, 0]
    assert gaps == pytest.approx(float(limits.logit_margin(K, tau, "relu")), rel=1e-12)
    assert np.log1p(np.sum(np.exp(-gaps))) == pytest.approx(float(limits.cross_entropy_floor(K, tau, features="relu")), rel=1e-11)


def test_temperature() -> None:
    exact = float(limits.cross_entropy_floor(3, 2.0, 0.5))
    assert exact - 1e-13 <= searched("CE", "free", 2.0, 3, [2, 2, 2], rows=True, T=0.5) <= exact + 1e-9


@pytest.mark.parametrize(("name", "bias"), [("CE", "free"), ("MSE", "free"), ("DR", "none")])
def test_unequal_classes_fall_below(name: str, bias: str) -> None:
    """With seven samples to one the mean loss gets below the balanced floor (dot regression with the ball's room): hence the hypothesis."""
    assert searched(name, bias, 0.4, 3, [7, 1], rows=name != "DR") < floor(name, 2, 0.4, bias) - 5e-3


@pytest.mark.parametrize("K", [2, 3, 7])
def test_margins_are_largest_at_an_etf(K: int) -> None:
    """Equality at collapse to an ETF, on average also with a bias; random points, near an ETF or not, stay below."""
    rng, tau = np.random.default_rng(K), 1.7
    W = frames.simplex_etf(K, K + 1)
    y = np.repeat(np.arange(K), 3)
    b = rng.standard_normal((K, 1))

    def margins(W: Any, H: Any) -> tuple[float, float]:
        hard = ufm.metrics.margins((W @ H + b)[None], y, "mean")
        return float(hard.mean()), float(ufm.metrics.cosine_margin(H[None], W[None], y)[0])

    H = tau * W[y].T
    assert margins(W, H) == pytest.approx((tau * K / (K - 1), K / (K - 1)), rel=1e-14)
    for spread in (1e-3, 0.1, 1.0, 100.0):
        for _ in range(50):
            V, X = W + spread * rng.standard_normal(W.shape), H + spread * rng.standard_normal(H.shape)
            V *= np.sqrt(K) / np.linalg.norm(V)
            X *= tau / np.linalg.norm(X, axis=0)
            got = margins(V, X)
            assert got[0] < limits.logit_margin(K, tau)
            assert got[1] < limits.cosine_margin(K)


def test_unequal_classes_have_larger_margins() -> None:
    """All samples in one class, and all of W in its row: tau sqrt(3) on average, above tau 3/2."""
    W, H = np.sqrt(3) * np.eye(3, 4) * np.eye(3)[:, :1], np.tile(np.eye(4)[:, :1], 5)
    assert np.mean(ufm.metrics.margins((W @ H)[None], np.zeros(5, dtype=int))) > limits.logit_margin(3, 1.0) + 0.2


def problem(**changes: Any) -> ufm.Problem:
    options = dict(counts=[4, 4, 4], width=4, features="free", lam_w=0.0, lam_h=0.0, radius=2.0, head=heads.UnitRows()) | changes
    return ufm.Problem(options.pop("counts"), **options)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, limits.cross_entropy_floor(3, 2.0)),
        ({"lam_b": 0.3}, limits.cross_entropy_floor(3, 2.0)),
        ({"head": heads.FixedETF()}, limits.cross_entropy_floor(3, 2.0)),
        ({"loss": ufm.CrossEntropy(temperature=4.0)}, limits.cross_entropy_floor(3, 0.5)),
        ({"loss": ufm.CrossEntropy(logit_adjustment=1.0)}, limits.cross_entropy_floor(3, 2.0)),
        ({"loss": ufm.MSE(), "radius": 0.5}, limits.squared_error_floor(3, 0.5, "none")),
        ({"loss": ufm.MSE(), "radius": 0.5, "lam_b": 0.0}, limits.squared_error_floor(3, 0.5, "free")),
        ({"loss": ufm.MSE(), "head": heads.FixedETF()}, 1 / 6),
        ({"loss": ufm.MSE(), "head": heads.FixedETF(bias=None), "radius": 0.5}, limits.squared_error_floor(3, 0.5, "centred")),
        ({"loss": ufm.DotRegression(), "radius": 0.5}, 0.125),
        ({"loss": ufm.DotRegression(), "radius": 0.5, "lam_b": 0.0}, 0.0),
        ({"loss": ufm.DotRegression(), "head": heads.FixedETF()}, 0.0),
    ],
)  # fmt: skip
def test_limits_of_a_problem(changes: Any, exact: float) -> None:
    """The floor of the problem's own loss, temperature, bias and radius."""
    got = limits.at_radius(problem(**changes))
    assert got.value == pytest.approx([float(exact)], rel=1e-14)
    assert got.source.tolist() == [limits.PROVEN]
    tau = changes.get("radius", 2.0)
    assert (got.logit_margin, got.cosine_margin) == (pytest.approx([1.5 * tau]), pytest.approx([1.5]))


def test_cells_without_a_floor_say_why() -> None:
    """NaN for unequal classes, margins too; NaN for the value alone where it is a bound that is not attained."""
    got = limits.at_radius(problem(counts=[[4, 4, 4], [6, 4, 2], [7, 7, 7]]))
    assert np.isnan(np.array(got[:3])).tolist() == [[False, True, False]] * 3
    assert got.source.tolist() == [limits.PROVEN, limits.UNEQUAL, limits.PROVEN]
    for changes, why in (
        ({"loss": ufm.CrossEntropy(temperature=[1.0, 1.0, 2.0])}, limits.SHIFTED),
        ({"loss": ufm.CrossEntropy(logit_adjustment=[0.0, 0.0, 1.0])}, limits.SHIFTED),
        ({"loss": ufm.MSE(), "lam_b": 0.1}, limits.PENALISED),
        ({"width": 1}, "floor not known to be attained: width is 1; use width >= 2"),
        ({"width": 2, "loss": ufm.MSE()}, "floor not known to be attained: width is 2; use width >= 3"),
        ({"width": 2, "loss": ufm.MSE(), "radius": 0.5}, "floor not known to be attained: width is 2; use width >= 3"),
        ({"width": 1, "loss": ufm.DotRegression()}, "floor not known to be attained: width is 1; use width >= 2"),
    ):
        got = limits.at_radius(problem(**changes))
        assert np.isnan(np.array(got[:3])).tolist() == [[True], [False], [False]]
        assert got.source.tolist() == [why]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"radius": None}, "features have a radius"),
        ({"head": heads.Learned(), "lam_w": 0.1}, "the head keeps the norms of W"),
        ({"loss": ufm.Focal(2.0)}, "loss is cross-entropy, squared error or dot regression"),
        ({"loss": ufm.CrossEntropy(label_smoothing=0.1)}, "no smoothing and no class weights"),
        ({"loss": ufm.CrossEntropy(class_weights=[1.0, 1.0, 2.0])}, "no smoothing and no class weights"),
    ],
)
def test_problems_without_a_floor(changes: Any, says: str) -> None:
    """NoTheory names the hypothesis that fails."""
    with pytest.raises(ufm.NoTheory, match=f"what fails: [^;]*{re.escape(says)}[^;]*; use"):
        limits.at_radius(problem(**changes))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: limits.cross_entropy_floor(1, 1.0), "classes is 1, but must be whole numbers, at least 2"),
        (lambda: limits.cross_entropy_floor(2.5, 1.0), "classes is 2.5, but must be whole"),
        (lambda: limits.logit_margin(3, -1.0), "logit_margin: radius is -1.0, but must be finite and at least 0"),
        (lambda: limits.logit_margin(3, np.inf), "radius is inf"),
        (lambda: limits.logit_margin(3, 1.0, "rely"), "logit_margin: features is 'rely', but must be 'free' or 'relu'"),
        (lambda: limits.cross_entropy_floor(3, 1.0, 0.0), "temperature is 0.0, but must be positive"),
        (lambda: limits.squared_error_floor(3, 1.0, "attached"), "bias is 'attached', but must be 'none', 'free' or 'centred'"),  # type: ignore[arg-type]
        (lambda: limits.dot_regression_floor(1.0, "x"), "bias is 'x', but must be"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_not_a_problem() -> None:
    with pytest.raises(TypeError, match="problem is 3, but must be"):
        limits.at_radius(3)  # type: ignore[arg-type]


def test_a_nearest_etf_cannot_lean_out_of_its_own_span() -> None:
    """Dot regression past its targets, one column a class, width K - 1: descent stops above 0, and no floor is claimed."""
    head = ufm.heads.NearestETF()
    problem = ufm.Problem([1] * 3, width=2, features="free", lam_w=0, lam_h=0, radius=1.7, head=head, loss=ufm.DotRegression())
    assert np.isnan(limits.at_radius(problem).value[0])
    run = ufm.simulate(problem, ufm.rules.GradientDescent(0.2), steps=2000, every=2000)
    assert run.last("value")[0] > 0.05
