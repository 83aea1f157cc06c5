"""The native extension. Private: its functions take exactly the types written here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

class Optimizer:
    maximize: bool
    skip_nonfinite: bool
    max_norm: float | None
    @property
    def steps(self) -> int: ...
    @property
    def skipped_steps(self) -> int: ...
    def __init__(
        self,
        rule: str,
        options: Mapping[str, float],
        names: Sequence[str],
        parameters: list[Any],
        states: list[list[Any]],
    ) -> None: ...
    def step(
        self, gradients: Sequence[Any], lr: float | None, grad_scale: float, zero_grad: bool
    ) -> None: ...
    def make_capturable(self) -> None: ...
    def set_rate(self, lr: float) -> None: ...
    def set_counts(self, steps: int, skipped_steps: int) -> None: ...
    def set_option(self, name: str, value: float) -> None: ...
    def progress(self, index: int) -> tuple[int, float]: ...
    def set_progress(self, index: int, step: int, momentum_product: float) -> None: ...
    def exclusively(self, function: Callable[[], _T]) -> _T: ...

class TorchOptimizer:
    skip_nonfinite: bool
    max_norm: float | None
    skipped_steps: int
    def __init__(self, tensors: Any, use_exchange_table: bool) -> None: ...
    def step(
        self,
        optimizer: Any,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_scale: float,
        zero_grad: bool,
        loss_scale: Any = None,
        found_inf: Any = None,
    ) -> None: ...
    def set_resident(self, value: bool) -> None: ...
    def unused(self) -> dict[int, list[int]]: ...
    def forget(self) -> None: ...
    def add_group(
        self,
        group: dict[str, Any],
        rule: str,
        options: Mapping[str, float],
        maximize: bool,
        watched: set[str],
        is_mutable: bool,
    ) -> None: ...
    def set_options(
        self,
        index: int,
        group: dict[str, Any],
        rule: str,
        options: Mapping[str, float],
        maximize: bool,
        watched: set[str],
        is_mutable: bool,
    ) -> None: ...
    def add_parameter(
        self,
        tensor: Any,
        name: str,
        states: list[Any] | None,
        scalars: list[Any],
        places: list[tuple[Any, int]],
        is_first: bool,
        is_sharded: bool,
    ) -> None: ...
    def seal(self, state: dict[Any, Any]) -> None: ...

def allocate_state(shape: Sequence[int], strides: Sequence[int], code: int, bits: int) -> Any: ...
def describe_array(
    array: Any, name: str
) -> tuple[int, str, tuple[int, ...], tuple[int, ...], str]: ...
def set_rows_type(type: type[Any]) -> None: ...
def is_array(object: Any) -> bool: ...
def describe_rule(
    rule: str, options: Mapping[str, float]
) -> tuple[list[str], list[str], float]: ...
def apply(
    rule: str,
    options: Mapping[str, float],
    parameter: Any,
    gradient: Any,
    states: list[Any],
    step: int,
    momentum_product: float,
    lr: float,
    grad_scale: float,
    maximize: bool,
) -> float: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def active_tier() -> str: ...
def use_tier(name: str) -> None: ...
def tiers() -> list[tuple[str, bool]]: ...
