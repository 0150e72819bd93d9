"""The landscape around a point: the curvature of F there, its symmetries, and which known structure an end point is."""

from ufm.landscape.classify import classify
from ufm.landscape.spectrum import Spectrum, hessian
from ufm.landscape.symmetry import orbit_dimension

__all__ = ["Spectrum", "classify", "hessian", "orbit_dimension"]
