"""Check what the CUDA compiler has made of the kernels.

    nvcc --keep ... csrc/cuda/step.cu && python check_kernels.py step.ptx

A kernel that moves dense parameters or rows must read and write four float32 of each operand at
once: where the compiler splits that up, results stay right, and the step becomes slower. And no
operation may be another than the one that the CPU does: no fused multiply-add, no approximation.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

# Update<Loop<Rule, states>, T, List<items, axes, item>> as it is mangled; no axes: dense ones. The
# items of rows are tables.
ENTRY = re.compile(
    r"\.entry\s+(\w*UpdateI\w*LoopI\w+?ELi(\d)EEE[fd]\w*ListILi\d+E(?:Li0E|\w*TableOf)\w*)"
)
WIDE_LOAD = re.compile(r"ld\.(?:global\.)?(?:nc\.)?v4\.\w32")
WIDE_STORE = re.compile(r"st\.(?:global\.)?v4\.\w32")
INEXACT = re.compile(r"\b(?:fma|mad)\.\w+\.f(?:32|64)|\.approx|\.ftz")


class Kernel(NamedTuple):
    """A kernel of dense parameters, or of rows."""

    name: str
    states: int
    text: str

    def has_wide_access(self) -> bool:
        """Parameter, gradient and state are read; parameter and state are written."""
        loads, stores = len(WIDE_LOAD.findall(self.text)), len(WIDE_STORE.findall(self.text))
        return loads >= 2 + self.states and stores >= 1 + self.states


def kernels(ptx: str) -> list[Kernel]:
    """Return the kernels of dense parameters and of rows."""
    starts = [match.start() for match in re.finditer(r"\.entry\s", ptx)] + [len(ptx)]
    found = []
    for match in ENTRY.finditer(ptx):
        end = min(start for start in starts if start > match.start())
        found.append(Kernel(match[1], int(match[2]), ptx[match.start() : end]))
    return found


def main(path: str) -> int:
    """Return 0 if all is as it should be."""
    ptx = Path(path).read_text()
    dense = kernels(ptx)
    narrow = [kernel.name for kernel in dense if not kernel.has_wide_access()]
    inexact = sorted(set(INEXACT.findall(ptx)))
    sys.stdout.write(
        f"{len(dense)} kernels of dense parameters and rows; "
        f"without 16-byte access: {narrow or 'none'}; "
        f"inexact operations: {inexact or 'none'}\n"
    )
    return int(not dense or bool(narrow) or bool(inexact))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
