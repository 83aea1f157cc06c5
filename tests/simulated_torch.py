"""torch's CUDA tensors as far as fusestep.torch looks at them, in the host's memory.

With the extensions built by ``cmake -DFUSESTEP_CUDA=SIMULATED``, whose kernels are loops over the
grid. torch itself knows only tensors on the CPU here; what differs is what fusestep is told of
them. The same tests run with real CUDA tensors where there is a GPU.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fusestep.torch import _state, _tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

CPU = torch.device("cpu")
GPUS = torch.device("cuda", 0), torch.device("cuda", 1)


def local(tensor: Any) -> Any:
    """Return the part of a DTensor that is here; other tensors as they are."""
    return getattr(tensor, "_local_tensor", tensor)


class Simulation:
    """Which device each tensor counts as being on: the one that its storage was marked with.

    Tensors that nobody has marked (gradients that autograd has made, copies that deepcopy has) are
    on the first GPU, or on the CPU inside of `without_gpu`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._default = GPUS[0]
        self.stream = 0
        patch.setattr(_tensors, "device_of", self.device_of)
        patch.setattr(_tensors, "zeros", self._zeros)
        patch.setattr(_tensors, "moved", self._moved)
        patch.setattr(_tensors, "current_stream", lambda index: self.stream)
        patch.setattr(_tensors, "USE_EXCHANGE_TABLE", False)
        patch.setattr(_state, "_empty_like", self._empty_like)
        patch.setattr(_state, "number", self._number)
        patch.setattr(_state, "fitted", self._fitted)

    _real_empty_like = staticmethod(_state._empty_like)
    _real_fitted = staticmethod(_state.fitted)
    _real_number = staticmethod(_state.number)

    def put(self, tensor: Any, device: torch.device) -> Any:
        """Return a copy on a device."""
        return self.mark(tensor.detach().clone(), device)

    def mark(self, tensor: Any, device: torch.device) -> Any:
        """Have a tensor, and all that shares its storage, count as being on a device."""
        local(tensor).untyped_storage().simulated_device = device
        return tensor

    def device_of(self, tensor: Any) -> torch.device:
        tensor = local(tensor)
        if tensor.device.type != "cpu":
            return tensor.device
        if tensor.layout is torch.sparse_coo:
            tensor = tensor._values()
        if tensor.layout is not torch.strided:
            return self._default
        return getattr(tensor.untyped_storage(), "simulated_device", self._default)

    @contextmanager
    def without_gpu(self) -> Iterator[None]:
        """Have everything as it is without a GPU, for optimizers that are made in the meantime."""
        before = self._default, _tensors.USE_EXCHANGE_TABLE
        self._default, _tensors.USE_EXCHANGE_TABLE = CPU, True
        try:
            yield
        finally:
            self._default, _tensors.USE_EXCHANGE_TABLE = before

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Have a CUDA graph be captured. What is launched is run, too."""
        before, self.stream = self.stream, 7
        with self._patch.context() as patch:
            patch.setenv("FUSESTEP_SIMULATE", "capture")
            try:
                yield
            finally:
                self.stream = before

    # ---- in place of functions of the package ---------------------------------------------------

    def _zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Any:
        return self.mark(torch.zeros(count, dtype=dtype), device)

    def _moved(self, tensor: Any, device: torch.device) -> Any:
        return tensor if self.device_of(tensor) == device else self.put(tensor, device)

    def _empty_like(self, tensor: Any, dtype: torch.dtype) -> Any:
        device = self.device_of(tensor)
        return self.mark(self._real_empty_like(tensor, dtype), device)

    def _fitted(self, value: Any, label: str, parameter: Any, dtype: torch.dtype) -> Any:
        result = self._real_fitted(value, label, parameter, dtype)
        device = self.device_of(parameter)
        if self.device_of(value) != device:
            return self.put(result, device)
        return result if result is value else self.mark(result, device)

    def _number(self, name: str, value: Any) -> float:
        """Fetch a number; from a GPU that is not allowed while a graph is captured."""
        is_fetched = isinstance(value, torch.Tensor) and self.device_of(value) in GPUS
        if is_fetched and os.environ.get("FUSESTEP_SIMULATE") == "capture":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return self._real_number(name, value)
