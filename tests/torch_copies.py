"""Copies of torch's objects, and what tells whether they are the same."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch


def through_pickle(original: Any) -> Any:
    return pickle.loads(pickle.dumps(original))


def through_a_file(original: Any) -> Any:
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def snapshot(opt: Any, params: list[Any]) -> Any:
    return copy.deepcopy(([p.detach() for p in params], opt.state_dict()))


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, types and keys and all."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
