"""Digests of batches, models and samples, to tell whether two are equal; and a search for targets that are among the inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

_LEAST_ROWS = 16  # below, a column equals the target by chance
_SAME = 1 - 1e-6


def digest(value: Any) -> str:
    """A digest of what a structure of tensors, arrays and plain values holds."""
    running = hashlib.sha256()
    _feed(running, value)
    return running.hexdigest()


def _feed(running: Any, value: Any) -> None:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        running.update(f"{value.dtype}{tuple(value.shape)}".encode())
        running.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):  # as PIL's images have
        value = np.asarray(value)
        if value.dtype == object:  # holds addresses
            _feed(running, value.tolist())
            return
        running.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            running.update(str(key).encode())
            _feed(running, part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(running, part)
    elif isinstance(value, (str, int, float, bool, type(None))):
        running.update(repr(value).encode())


def targets(batches: list[Any], name: str) -> list[str]:
    """A warning where a column of the inputs is the target, or one class's indicator: batches that are (inputs, target)."""
    import torch

    pairs = [b for b in batches if isinstance(b, (list, tuple)) and len(b) == 2]
    if not pairs or not all(isinstance(part, torch.Tensor) and part.ndim for pair in pairs for part in pair):
        return []
    inputs, target = (torch.cat([pair[i].detach().cpu() for pair in pairs]) for i in (0, 1))
    rows = len(target)
    if rows < _LEAST_ROWS or len(inputs) != rows or target.numel() != rows or inputs.is_complex():
        return []
    x, y = inputs.reshape(rows, -1).double(), target.reshape(rows, 1).double()
    if not target.is_floating_point():
        classes = torch.unique(target)
        indicators = [(target.reshape(rows, 1) == c).double() for c in classes[:100]]
        y = torch.cat([y, *(i for i in indicators if 3 <= float(i.sum()) <= rows - 3)], 1)
    x, y = (v - v.mean(0) for v in (x, y))
    norms = x.norm(dim=0)[:, None] * y.norm(dim=0)
    correlation = torch.where(norms > 0, (x.T @ y).abs() / norms, 0.0).amax(1)
    found = torch.nonzero(correlation > _SAME).flatten().tolist()
    if not found:
        return []
    which = f"number {found[0]}" if len(found) == 1 else f"numbers {', '.join(map(str, found[:3]))}"
    return [f"{name}: the target is among the inputs (column {which}, correlation 1 over {rows} rows)"]
