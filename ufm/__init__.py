"""Unconstrained features models of neural collapse: their theory, a solver that finds the optimum, the proof that it has, and descent.

    problem = ufm.Problem(counts, width=..., features="relu", lam_w=..., lam_h=...)
    ufm.predict(problem)            what theory says: value, regime, margins, Grams                    -> Prediction
    ufm.solve(problem)              the minimiser, with a proven relative gap                          -> Solution
    ufm.simulate(problem, rule)     descent from random starts, metrics on the way                     -> Trajectory
    ufm.certify(problem, factors)   what any point is worth                                            -> Certificate
    ufm.hessian(problem, factors)   the curvature there: eigenvalues, index, minimum or saddle         -> Spectrum
    ufm.classify(problem, factors)  which known structure a run ended at                               -> EndPoint

Glossary: K classes of n_k samples, N in all; d the feature width; L the number of weight matrices after the free features; factors
(H, W_1, ..., W_L[, b]), arrays (B, rows, cols) with columns = class means or samples; a problem is a grid of G cells of equal sizes, and
`runs` starts each give B = G * runs runs, cell-major. The one convention of the objective is stated in `ufm.objective`.

Rooms: counts, frames, losses, polar, etf, etf_policies, heads, problem (with the table of the papers' conventions), chain, starts,
objective, coordinates, headed, certificate, metrics, theory, rules, dynamics, solvers, landscape, sweep, plots; bridge, loaded when
asked for, needs torch.
Importing ufm loads numpy and the array-API shim only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ufm import counts, etf, frames, heads, losses, metrics, rules, starts, sweep
from ufm.certificate import certify
from ufm.dynamics import simulate
from ufm.landscape import Spectrum, classify, hessian
from ufm.losses import MSE, CrossEntropy, DotRegression, Focal
from ufm.problem import PAPERS, Problem
from ufm.records import Certificate, EndPoint, NoTheory, Prediction, Regime, Solution, Stop, Trajectory
from ufm.solvers import solve
from ufm.theory import predict

if TYPE_CHECKING:
    from ufm import bridge as bridge

__version__ = "0.1.0"

__all__ = [
    "MSE",
    "PAPERS",
    "Certificate",
    "CrossEntropy",
    "DotRegression",
    "EndPoint",
    "Focal",
    "NoTheory",
    "Prediction",
    "Problem",
    "Regime",
    "Solution",
    "Spectrum",
    "Stop",
    "Trajectory",
    "certify",
    "classify",
    "counts",
    "etf",
    "frames",
    "heads",
    "hessian",
    "losses",
    "metrics",
    "predict",
    "rules",
    "simulate",
    "solve",
    "starts",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """`ufm.bridge`, imported when first asked for: it alone needs torch."""
    if name == "bridge":
        return import_module("ufm.bridge")
    raise AttributeError(f"module 'ufm' has no attribute {name!r}")
