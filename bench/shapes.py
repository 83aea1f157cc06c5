"""What is stepped: lists of tensor shapes, from one tensor of 1,000 to GPT-2 small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """The shapes of the parameters of one optimizer.

    Parameters
    ----------
    name
        Stands in test ids, in the results and in the tables.
    shapes
        One a tensor.
    """

    name: str
    shapes: tuple[Shape, ...]

    @cached_property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)


def resnet18() -> tuple[Shape, ...]:
    """Shapes of ResNet-18 for ImageNet (He et al. 2016, table 1), in the order of its layers."""
    shapes: list[Shape] = _convolution_and_norm(3, 64, kernel=7)
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += _residual_block(channels, width)
            channels = width
    shapes += [(1000, channels), (1000,)]
    return _checked(shapes, tensors=62, elements=11_689_512)


def _residual_block(channels: int, width: int) -> list[Shape]:
    block = _convolution_and_norm(channels, width, kernel=3)
    block += _convolution_and_norm(width, width, kernel=3)
    if channels != width:  # the shortcut has to change the number of channels, too
        block += _convolution_and_norm(channels, width, kernel=1)
    return block


def _convolution_and_norm(channels: int, width: int, kernel: int) -> list[Shape]:
    return [(width, channels, kernel, kernel), (width,), (width,)]


def gpt2_small() -> tuple[Shape, ...]:
    """Shapes of GPT-2 small (Radford et al. 2019); the output layer is the token embedding."""
    vocabulary, context, width, layers = 50_257, 1024, 768, 12
    norm: list[Shape] = [(width,), (width,)]
    attention = _linear(width, 3 * width) + _linear(width, width)
    perceptron = _linear(width, 4 * width) + _linear(4 * width, width)
    shapes: list[Shape] = [(vocabulary, width), (context, width)]
    shapes += layers * (norm + attention + norm + perceptron)
    shapes += norm
    return _checked(shapes, tensors=148, elements=124_439_808)


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(inputs, outputs), (outputs,)]


def _checked(shapes: list[Shape], tensors: int, elements: int) -> tuple[Shape, ...]:
    """Return the shapes after counting them: a slip would go unnoticed in a benchmark."""
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == elements
    return tuple(shapes)


_ALL = (
    Workload("1k", ((1_000,),)),
    Workload("10k", ((10_000,),)),
    Workload("100k", ((100_000,),)),
    Workload("1M", ((1_000_000,),)),
    Workload("10M", ((10_000_000,),)),
    Workload("30M", ((30_000_000,),)),
    Workload("100M", ((100_000_000,),)),
    Workload("500x1k", ((1_000,),) * 500),
    Workload("resnet18", resnet18()),
    Workload("gpt2", gpt2_small()),
)

WORKLOADS = {workload.name: workload for workload in _ALL}
QUICK = ("1k", "100k", "1M", "500x1k")
