"""The landscape around a point: the curvature of F there, its symmetries, and which known structure an end point is."""

from ufm.landscape.classify import classify
from ufm.landscape.newton import Critical, critical_near
from ufm.landscape.spectrum import Spectrum, hessian

__all__ = ["Critical", "Spectrum", "classify", "critical_near", "hessian"]
