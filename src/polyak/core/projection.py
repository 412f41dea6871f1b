"""Projections onto the tangent space of spheres: for weights whose scale does not matter (Heo et al., arXiv 2006.08217).

A *view* says what a sphere is of: "channel", every index of the first dimension (a row); "layer", the tensor as a whole. Results
for each row keep the tensor's number of dimensions, so that they broadcast against it; nothing is reshaped, which tensors sharded
in unequal parts do not allow.
"""

from __future__ import annotations

import torch

from polyak.core import checks

VIEWS = ("channel", "layer")
_VIEW = checks.Choice(*VIEWS)
_TWO = dict(view=_VIEW, eps=checks.non_negative)


@checks.operands(t=checks.tensor, view=_VIEW)
def row_sums(t: torch.Tensor, view: str) -> torch.Tensor:
    """The sum of each row of a view, of shape (rows, 1, ...) or (1, 1, ...). Of one dimension, every element is a row."""
    return _row_sums(t, view)


def _row_sums(t: torch.Tensor, view: str) -> torch.Tensor:
    if view == "channel" and t.dim() < 2:
        return t
    return t.sum(_dims(t, view), keepdim=True)


@checks.operands(t=checks.tensor, view=_VIEW)
def row_norms(t: torch.Tensor, view: str) -> torch.Tensor:
    """The Euclidean norm of each row of a view; shapes as in :func:`row_sums`."""
    return _row_norms(t, view)


def _row_norms(t: torch.Tensor, view: str) -> torch.Tensor:
    if view == "channel" and t.dim() < 2:
        return t.abs()
    return torch.linalg.vector_norm(t, dim=_dims(t, view), keepdim=True)


def _check_shapes(**two: torch.Tensor) -> None:
    (first, a), (second, b) = two.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} and {second} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _dims(t: torch.Tensor, view: str) -> tuple[int, ...]:
    return tuple(range(1 if view == "channel" else 0, t.dim()))


@checks.operands(a=checks.tensor, b=checks.tensor, **_TWO)
def cosines(a: torch.Tensor, b: torch.Tensor, view: str, eps: float = 1e-8) -> torch.Tensor:
    """``|<a_r, b_r>| / max(||a_r|| ||b_r||, eps)`` for each row r of a view; shapes as in :func:`row_sums`."""
    _check_shapes(a=a, b=b)
    return _row_sums(a * b, view).abs() / (_row_norms(a, view) * _row_norms(b, view)).clamp(min=eps)


@checks.operands(u=checks.tensor, w=checks.tensor, **_TWO)
def radial(u: torch.Tensor, w: torch.Tensor, view: str, eps: float = 1e-8) -> torch.Tensor:
    """How far ``u`` points along ``w``: ``<u_r, n_r>`` with ``n_r = w_r / (||w_r|| + eps)``; shapes as in :func:`row_sums`."""
    _check_shapes(u=u, w=w)
    return _row_sums(u * w, view) / (_row_norms(w, view) + eps)


@checks.operands(u=checks.tensor, w=checks.tensor, **_TWO)
def project_out(u: torch.Tensor, w: torch.Tensor, view: str = "channel", eps: float = 1e-8) -> torch.Tensor:
    """``u`` without its part along ``w``: ``u_r - n_r <n_r, u_r>`` with ``n_r = w_r / (||w_r|| + eps)`` for each row r.

    Args:
        u: the step, of any shape.
        w: the weight, of the same shape.
        view: "channel": each index of the first dimension is a row; "layer": the whole tensor is one.
        eps: keeps a zero weight from dividing by zero: its row is left as it is.

    Returns:
        A tensor like ``u`` (arXiv 2006.08217, equation 7).
    """
    _check_shapes(u=u, w=w)
    n = w / (_row_norms(w, view) + eps)
    return u - n * _row_sums(u * n, view)
