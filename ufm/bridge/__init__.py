"""The torch bridge: the theory held against one's own network, and heads, data and a loop to train with. It alone needs torch.

    reading = bridge.ufm_problem(counts, width=..., ...)    the Problem whose prediction applies to a training run, with what it assumes
    bridge.penalty(problem, weights, features)              exactly that problem's regularisation, for the training loss
    monitor = bridge.Monitor(model, head="fc", classes=10)  the metrics of ufm.metrics, layer by layer, in one pass
    bridge.train(model, data, training)                     a short loop with exact resume                               -> History

Torch's tensors have samples in rows, `ufm` in columns; the rooms here turn them.
"""

try:
    import torch as torch
except ImportError as error:
    raise ImportError("ufm.bridge needs torch; install the extra: pip install ufm[torch]") from error

from ufm.bridge import data, models, place
from ufm.bridge.heads import FixedETFHead, NearestETFHead
from ufm.bridge.lightning import lightning_callback
from ufm.bridge.monitor import Monitor
from ufm.bridge.problem import Reading, penalty, ufm_problem
from ufm.bridge.train import SGD, Adam, History, Training, train

__all__ = [
    "SGD",
    "Adam",
    "FixedETFHead",
    "History",
    "Monitor",
    "NearestETFHead",
    "Reading",
    "Training",
    "data",
    "lightning_callback",
    "models",
    "penalty",
    "place",
    "train",
    "ufm_problem",
]
