"""Values of options: equality, copies, and numbers that JSON can hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def same(a: Any, b: Any) -> bool:
    """Whether two entries of a configuration are equal; arrays, element by element."""
    if a is b:
        return True
    if isinstance(a, np.ndarray | torch.Tensor) or isinstance(b, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.shape == b.shape and bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return type(a) is type(b) and a == b


def snapshot(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, in copies: lists and arrays may be changed in place."""
    return {k: copy.deepcopy(v) if isinstance(v, list | dict | np.ndarray) else v for k, v in config.items()}


def plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers as Python's, which JSON can hold; in lists and dicts, too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and any(
        isinstance(v, np.generic | torch.Tensor | list | tuple | dict) for v in value
    ):
        return type(value)(plain(v) for v in value)
    return value
