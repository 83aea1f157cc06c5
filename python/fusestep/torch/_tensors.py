"""What the native half asks of tensors that are not plain, and of torch before version 2.10.

A plain ``torch.Tensor`` or ``torch.nn.Parameter`` is read natively; see ``csrc/arrays/torch.h``.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Parameter", "Tensor"]

USE_EXCHANGE_TABLE = True
"""Whether to read tensors through torch's table of functions, where it has one (2.10)."""

_INTEGER, _UNSIGNED, _FLOAT, _BFLOAT, _COMPLEX = 0, 1, 2, 4, 5  # DLPack's type codes
DLPACK_DTYPES = {
    torch.float64: (_FLOAT, 64),
    torch.float32: (_FLOAT, 32),
    torch.float16: (_FLOAT, 16),
    torch.bfloat16: (_BFLOAT, 16),
    torch.complex128: (_COMPLEX, 128),
    torch.complex64: (_COMPLEX, 64),
    torch.complex32: (_COMPLEX, 32),
}
# What state may be of, besides.
STATE_DTYPES = {**DLPACK_DTYPES, torch.int16: (_INTEGER, 16), torch.uint8: (_UNSIGNED, 8)}
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds its numbers itself, in memory of the usual kind."""
    return type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process may hold a part."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the plain tensor that holds the numbers of a tensor in this process."""
    if is_sharded(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()  # type: ignore[attr-defined]
    if type(tensor) is Tensor or is_traceable_wrapper_subclass(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def local_gradient(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, bool]:
    """Return the part of a gradient that belongs to this process's part of the parameter.

    Also whether it is a copy, because the gradient was distributed otherwise.
    """
    if not is_sharded(parameter) or not is_sharded(gradient):
        return local(gradient), False
    if gradient.placements == parameter.placements:  # type: ignore[attr-defined]
        return local(gradient), False
    with torch.no_grad():
        placements = parameter.placements  # type: ignore[attr-defined]
        copy = gradient.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(copy), True


def resolved(tensor: Tensor) -> Tensor:
    """Return a copy of a view that torch has not yet conjugated or negated."""
    with torch.no_grad():
        return tensor.resolve_conj().resolve_neg()


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row numbers and the values of a gradient in COO form, which share its memory.

    It need not be coalesced.

    Raises
    ------
    TypeError
        It does not consist of whole rows.
    """
    if gradient.sparse_dim() != 1:
        raise TypeError(
            f"is sparse in {gradient.sparse_dim()} dimensions; expected one of rows, which is "
            "sparse in one (sparse_dim() == 1), or a dense one"
        )
    return gradient._indices()[0], gradient._values()


def clear_gradient(gradient: Tensor) -> None:
    """Set a gradient to zero in place. A sparse one has no rows then."""
    with torch.no_grad():
        gradient.zero_()


def refusal(tensor: Tensor) -> str:
    """Say what is wrong with a tensor whose memory cannot be used."""
    if tensor.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        return (
            f"is sparse ({tensor.layout}); expected a dense tensor or, as the gradient of one, "
            "torch.sparse_coo"
        )
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; expected torch.strided"
    if is_traceable_wrapper_subclass(tensor) or type(tensor).__name__ == "FakeTensor":
        return (
            f"is a {type(tensor).__name__}, which keeps its numbers in other tensors; expected "
            "a torch.Tensor or a DTensor"
        )
    if problem := _device_problem(device_of(tensor)):
        return f"is on device '{tensor.device}'{problem}"
    if tensor.dtype not in DLPACK_DTYPES:
        return (
            f"has dtype {tensor.dtype}; expected float64, float32, float16, bfloat16 or a complex "
            "dtype"
        )
    return f"is a {type(tensor).__name__} whose memory cannot be read"


def _device_problem(device: torch.device) -> str:
    """Say why tensors on a device cannot be updated; nothing where they can."""
    if device.type not in _DLPACK_DEVICES:
        return "; expected the CPU or an NVIDIA GPU"
    if device.type == "cuda" and torch.version.hip is not None:
        return ", of AMD; expected the CPU or an NVIDIA GPU"
    if device.type == "cuda" and not has_cuda_kernels():
        return ", and this build of fusestep has no CUDA kernels (see docs/gpu.md)"
    return ""


def describe(
    tensor: Tensor,
) -> tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]]:
    """Return address, device (DLPack's type, index), type code and bits, shape, and strides.

    Strides are in elements.
    """
    device = device_of(tensor)
    is_readable = tensor.layout is torch.strided and not _device_problem(device)
    if not is_readable or tensor.dtype not in STATE_DTYPES:
        raise TypeError(refusal(tensor))
    code, bits = STATE_DTYPES[tensor.dtype]
    place = _DLPACK_DEVICES[device.type], device.index or 0
    return (tensor.data_ptr(), *place, code, bits, tuple(tensor.shape), tensor.stride())


# ---- devices; tests have them say that memory of the CPU is a GPU's -----------------------------


def device_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor."""
    return tensor.device


def is_on_gpu(value: Any) -> bool:
    """Return whether something is a tensor on an NVIDIA GPU."""
    return isinstance(value, Tensor) and device_of(value).type == "cuda"


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros on a device."""
    return torch.zeros(count, dtype=dtype, device=device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for it."""
    return tensor.to(device, non_blocking=True)


def current_stream(index: int) -> int:
    """Return the ``cudaStream_t`` on which torch works on a GPU at this moment."""
    return torch.cuda.current_stream(index).cuda_stream


def is_capturing() -> bool:
    """Return whether torch's current stream is being captured in a CUDA graph."""
    is_in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_in_use and torch.cuda.is_current_stream_capturing()


def has_cuda_kernels() -> bool:
    """Return whether this build of fusestep has them."""
    return importlib.util.find_spec("fusestep._cuda") is not None


def _increment_each(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _find_increment_versions() -> Any:
    """Return torch's own function where it takes a list, which it does from 2.5 on."""
    increment = getattr(torch._C, "_increment_version", _increment_each)
    try:
        increment([])
    except (TypeError, RuntimeError):
        return _increment_each
    return increment


increment_versions = _find_increment_versions()
"""Tell autograd that tensors have been changed, so that it refuses to use what it saved of them."""
