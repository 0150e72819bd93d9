"""ufm"""
from ufm import counts, losses, starts
from ufm.certificate import certify
from ufm.losses import MSE, CrossEntropy, Focal
from ufm.problem import Problem
from ufm.solvers import solve
