"""Optimizer state in safetensors files: no pickle, and never half a file."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from . import _state_dict
from ._arrays import backend_of

_FORMAT = "1"


def write(path: str | os.PathLike[str], state_dict: dict[str, Any]) -> None:
    """Write a state dict to `path`, replacing the file only once the new one is on disk."""
    from safetensors.numpy import save_file

    tensors, header = _split(state_dict)
    metadata = {"fusestep": _FORMAT, "header": json.dumps(header)}
    target = Path(path).resolve()  # of a link, what it leads to is replaced, not the link
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        like = target if target.exists() else temporary
        mode = like.stat().st_mode & 0o777  # safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state dict in a file that :func:`write` made."""
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    with source.open("rb"):  # raises what Python raises for a file that cannot be read
        pass
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(source, metadata.get("fusestep"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{source} is truncated or not a safetensors file ({error})") from error
    except (AttributeError, TypeError) as error:  # safetensors' way of saying: unknown dtype
        raise ValueError(f"{source} holds tensors that are not state ({error})") from error
    try:
        return _join(json.loads(metadata["header"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} has a damaged header ({error!r})") from error


def _split(state_dict: dict[str, Any]) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Split a state dict into named tensors and what JSON can say."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    entries = []
    for key, entry in state_dict["state"].items():
        arrays = {
            name: backend_of(x).to_numpy(x) for name, x in entry.items() if hasattr(x, "shape")
        }
        tensors.update({f"{key}/{name}": np.asarray(x, order="C") for name, x in arrays.items()})
        scalars = {name: x for name, x in entry.items() if name not in arrays}
        entries.append({"key": key, "arrays": list(arrays), "scalars": scalars})
    header = {name: part for name, part in state_dict.items() if name != "state"}
    return tensors, {**header, "state": entries}


def _join(header: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_split`."""
    state = {}
    for entry in header.pop("state"):
        key = entry["key"]
        arrays = {name: tensors.pop(f"{key}/{name}") for name in entry["arrays"]}
        state[key] = {**entry["scalars"], **arrays}
    if tensors:
        raise ValueError(f"unknown tensors: {', '.join(sorted(tensors))}")
    _state_dict.expect_keys(header, "the header", {"param_groups", "fusestep"}, set())
    return {"state": state, **header}


def _check_format(source: Path, found: str | None) -> None:
    if found is None:
        raise ValueError(f"{source} was not written by fusestep's save()")
    if found != _FORMAT:
        raise ValueError(f"{source} has format {found}; this version reads format {_FORMAT}")


def _sync_directory(directory: Path) -> None:
    """Make the renaming itself durable, where the system lets us."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
