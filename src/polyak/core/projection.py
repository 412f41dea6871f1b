"""Projections onto the tangent space of spheres: for weights whose scale does not matter (Heo et al., arXiv 2006.08217)."""

from __future__ import annotations

import torch

from polyak.core import checks

VIEWS = ("channel", "layer")


def rows(t: torch.Tensor, view: str) -> torch.Tensor:
    """``t`` as a matrix: "channel": a row for each index of its first dimension; "layer": one row of all its elements."""
    checks.one_of("view", view, VIEWS)
    if t.dim() == 0:
        return t.reshape(1, 1)
    return t.flatten(1) if view == "channel" and t.dim() > 1 else t.reshape(1 if view == "layer" else len(t), -1)


def row_norms(t: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row of a matrix, of shape (rows, 1)."""
    return torch.linalg.vector_norm(t, dim=1, keepdim=True)


def cosines(a: torch.Tensor, b: torch.Tensor, view: str, eps: float = 1e-8) -> torch.Tensor:
    """``|<a_r, b_r>| / max(||a_r|| ||b_r||, eps)`` for each row r of a view, of shape (rows,)."""
    a, b = rows(a, view), rows(b, view)
    return ((a * b).sum(1, keepdim=True).abs() / (row_norms(a) * row_norms(b)).clamp(min=eps)).squeeze(1)


def radial(u: torch.Tensor, w: torch.Tensor, view: str, eps: float = 1e-8) -> torch.Tensor:
    """How far ``u`` points along ``w``: ``<u_r, n_r>`` with ``n_r = w_r / (||w_r|| + eps)``, of shape (rows, 1)."""
    w = rows(w, view)
    return (rows(u, view) * w).sum(1, keepdim=True) / (row_norms(w) + eps)


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
    n = rows(w, view) / (row_norms(rows(w, view)) + eps)
    return (rows(u, view) - n * (rows(u, view) * n).sum(1, keepdim=True)).reshape(u.shape)
