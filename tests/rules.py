"""The table of rules that drives the tests. A new rule adds a row here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fusestep as fs
import reference

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Rule:
    """One optimizer class with one set of options."""

    cls: type[fs.Optimizer]
    reference: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    torch: str = ""  # the class in torch.optim, and what it needs besides the options
    torch_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.options.items() if k != "lr")
        return f"{self.cls.__name__}({shown})"


_MOMENTS = ("exp_avg", "exp_avg_sq")
_NAG = {"nesterov": True, "momentum": 0.9}

RULES = [
    Rule(fs.SGD, reference.sgd, {"lr": 0.1}, (), "SGD"),
    Rule(fs.SGD, reference.sgd, {"lr": 0.1, "weight_decay": 0.1}, (), "SGD"),
    Rule(fs.SGD, reference.sgd, {"lr": 0.05, "momentum": 0.9}, ("momentum_buffer",), "SGD"),
    Rule(
        fs.SGD,
        reference.sgd,
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
        ("momentum_buffer",),
        "SGD",
    ),
    Rule(
        fs.SGD,
        reference.sgd,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        ("momentum_buffer",),
        "SGD",
    ),
    Rule(fs.NAG, reference.nag, {"lr": 0.02}, ("momentum_buffer",), "SGD", _NAG),
    Rule(
        fs.NAG,
        reference.nag,
        {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1},
        ("momentum_buffer",),
        "SGD",
        {"nesterov": True},
    ),
    Rule(fs.Adam, reference.adam, {"lr": 0.01}, _MOMENTS, "Adam"),
    Rule(
        fs.Adam,
        reference.adam,
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        _MOMENTS,
        "Adam",
    ),
    Rule(
        fs.Adam,
        reference.adam,
        {"lr": 0.01, "amsgrad": True, "betas": (0.0, 0.9)},
        (*_MOMENTS, "max_exp_avg_sq"),
        "Adam",
    ),
    Rule(
        fs.Adam,
        reference.adam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        _MOMENTS,
        "Adam",
    ),
    Rule(fs.AdamW, reference.adamw, {"lr": 0.01}, _MOMENTS, "AdamW"),
    Rule(
        fs.AdamW,
        reference.adamw,
        {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True},
        (*_MOMENTS, "max_exp_avg_sq"),
        "AdamW",
    ),
    Rule(fs.NAdam, reference.nadam, {"lr": 0.01}, _MOMENTS, "NAdam"),
    Rule(
        fs.NAdam,
        reference.nadam,
        {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.1, "eps": 1e-4},
        _MOMENTS,
        "NAdam",
    ),
    Rule(
        fs.NAdam,
        reference.nadam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
        _MOMENTS,
        "NAdam",
    ),
    Rule(fs.Adagrad, reference.adagrad, {"lr": 0.1}, ("sum",), "Adagrad"),
    Rule(
        fs.Adagrad,
        reference.adagrad,
        {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
        ("sum",),
        "Adagrad",
    ),
]

# One row for each class and number of state arrays, for tests that are not about options.
PLAIN = [rule for i, rule in enumerate(RULES) if i in (0, 2, 5, 7, 9, 11, 13, 16)]

# State of one element for each row, and no class of torch's: for the tests that are about these.
ROWWISE = [
    Rule(fs.RowwiseAdagrad, reference.rowwise_adagrad, {"lr": 0.1}, ("sum",)),
    Rule(
        fs.RowwiseAdagrad,
        reference.rowwise_adagrad,
        {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1},
        ("sum",),
    ),
]
