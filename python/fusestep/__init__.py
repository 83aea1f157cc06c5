"""Fused, in-place optimizer steps for NumPy arrays, torch tensors, and whatever speaks DLPack.

>>> import numpy as np, fusestep as fs
>>> w = np.zeros(3, np.float32)
>>> opt = fs.Adam([w], lr=0.1)
>>> opt.step([np.full(3, 5.0, np.float32)])
>>> w.round(3)
array([-0.1, -0.1, -0.1], dtype=float32)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional
from ._averages import EmaWarmup
from ._memory import memory
from ._version import __version__
from .fisher import Fisher
from .gradients import Outer, Rows, Samples
from .optimizer import Optimizer
from .rules import NAG, SGD, Adagrad, Adam, AdamW, NAdam, RowwiseAdagrad
from .runtime import get_num_threads, set_num_threads, show_config
from .selections import CyclicBlocks, Mask, RandomBlocks, TopK

if TYPE_CHECKING:
    from . import linear as linear
    from . import torch as torch

__all__ = [
    "NAG",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CyclicBlocks",
    "EmaWarmup",
    "Fisher",
    "Mask",
    "NAdam",
    "Optimizer",
    "Outer",
    "RandomBlocks",
    "Rows",
    "RowwiseAdagrad",
    "Samples",
    "TopK",
    "__version__",
    "functional",
    "get_num_threads",
    "memory",
    "set_num_threads",
    "show_config",
]


def __getattr__(name: str) -> Any:
    if name in ("torch", "linear"):  # they import a framework, so only when they are asked for
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
