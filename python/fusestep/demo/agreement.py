"""Whether two optimizers ended in the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .network import Arrays

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""What float32 may lose over a long stream; a mistake in a rule shows far above it."""


@dataclass(frozen=True)
class Agreement:
    """How far apart two sets of parameters are.

    Attributes
    ----------
    same
        They are equal within float tolerance.
    largest_difference
        Between two elements, absolute.
    """

    same: bool
    largest_difference: float


def compare(ours: Arrays, theirs: Arrays) -> Agreement:
    """Compare parameters of the same names and shapes."""
    return Agreement(
        same=all(np.allclose(ours[k], theirs[k], RELATIVE, ABSOLUTE) for k in ours),
        largest_difference=max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours),
    )
