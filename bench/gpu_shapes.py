"""What is stepped on a GPU: the CPU's lists of shapes, and larger ones."""

from __future__ import annotations

from shapes import Shape, Workload, _checked, _convolution_and_norm, gpt2_small

BILLION = 1_000_000_000
_SMALLEST = 1_000_000  # elements of a "large" tensor on a GPU with next to no memory

_REHEARSAL_DIVISOR = 16  # of every extent
_REHEARSAL_LARGE = 2_000_000  # elements of the largest tensor


def resnet50() -> tuple[Shape, ...]:
    """Shapes of ResNet-50 for ImageNet (He et al. 2016, table 1), in the order of its layers."""
    shapes: list[Shape] = _convolution_and_norm(3, 64, kernel=7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            shapes += _bottleneck(channels, width)
            channels = 4 * width
    shapes += [(1000, channels), (1000,)]
    return _checked(shapes, tensors=161, elements=25_557_032)


def _bottleneck(channels: int, width: int) -> list[Shape]:
    block = _convolution_and_norm(channels, width, kernel=1)
    block += _convolution_and_norm(width, width, kernel=3)
    block += _convolution_and_norm(width, 4 * width, kernel=1)
    if channels != 4 * width:  # the shortcut has to change the number of channels, too
        block += _convolution_and_norm(channels, 4 * width, kernel=1)
    return block


def fitting(elements: int, bytes_per_element: int, available: int) -> int:
    """Return `elements`, halved until they fit into the bytes that are available."""
    while elements > _SMALLEST and elements * bytes_per_element > available:
        elements //= 2
    return elements


def workloads(is_rehearsal: bool, largest: int) -> dict[str, Workload]:
    """Return all workloads by name.

    Parameters
    ----------
    is_rehearsal
        Cut all extents down to what a CPU steps in no time.
    largest
        Elements of the workload "large" (else).
    """
    shapes: dict[str, tuple[Shape, ...]] = {
        "large": ((_REHEARSAL_LARGE if is_rehearsal else largest,),),
        "100M": ((100_000_000,),),
        "1 x 1k": ((1_000,),),
        "100 x 1k": ((1_000,),) * 100,
        "500 x 1k": ((1_000,),) * 500,
        "1000 x 1k": ((1_000,),) * 1_000,
        "gpt2": gpt2_small(),
        "resnet50": resnet50(),
    }
    if is_rehearsal:
        shapes["100M"] = ((_REHEARSAL_LARGE,),)
        for name in ("gpt2", "resnet50"):
            shapes[name] = tuple(map(_shrunk, shapes[name]))
    return {name: Workload(name, of_all) for name, of_all in shapes.items()}


def _shrunk(shape: Shape) -> Shape:
    return tuple(max(1, extent // _REHEARSAL_DIVISOR) for extent in shape)
