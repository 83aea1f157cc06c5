"""Fused, in-place optimizer steps for NumPy arrays (and whatever speaks DLPack).

>>> import numpy as np, fusestep as fs
>>> w = np.zeros(3, np.float32)
>>> opt = fs.Adam([w], lr=0.1)
>>> opt.step([np.full(3, 5.0, np.float32)])
>>> w.round(3)
array([-0.1, -0.1, -0.1], dtype=float32)
"""

from __future__ import annotations

from . import functional
from ._version import __version__
from .optimizer import Optimizer
from .rules import NAG, SGD, Adagrad, Adam, AdamW, NAdam
from .runtime import get_num_threads, set_num_threads, show_config

__all__ = [
    "NAG",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "NAdam",
    "Optimizer",
    "__version__",
    "functional",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]
