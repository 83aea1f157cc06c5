"""Drop-in optimizers for PyTorch: ``from fusestep.torch import Adam``, and nothing else changes.

Each class is a subclass of the class of the same name in ``torch.optim`` (`NAG`, which torch does
not have, of ``torch.optim.SGD``), takes the same arguments, and can exchange state dicts with it in
both directions. What changes is the step: one native call for all parameters, one pass over memory,
and the right result for gradients of any strides.
"""

from __future__ import annotations

try:
    from .convert import convert
    from .groups import decay_groups
    from .linear import FusedLinear, fuse_linear, unfuse_linear
    from .optimizer import Optimizer
    from .rules import NAG, SGD, Adagrad, Adam, AdamW, NAdam
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "fusestep.torch needs PyTorch 2.4 or later: pip install torch", name="torch"
    ) from error

__all__ = [
    "NAG",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedLinear",
    "NAdam",
    "Optimizer",
    "convert",
    "decay_groups",
    "fuse_linear",
    "unfuse_linear",
]
