"""What log-weights may be, and what they are where they are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from polyak.core import checks

LOGW = checks.Tensor(floating=True, least_ndim=1)
ON_COLLAPSE = checks.Choice("error", "uniform")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SHOWN = 4  # systems in a message


def wide(device: torch.device) -> torch.dtype:
    """The type of weights: double precision, where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def looks(x: Tensor, check: bool | None) -> bool:
    """Whether values are looked at: by default on the CPU, where it does not keep anything waiting."""
    if check is not None:
        return check
    return x.is_cpu and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def systems(bad: Tensor) -> str:
    """ " in system (3,)": where a truth of shape batch holds; "" where there is one system only."""
    if bad.ndim == 0:
        return ""
    rows = [tuple(row) for row in bad.nonzero().tolist()]
    shown = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
    return f" in system{'s' * (len(rows) > 1)} {shown}"


def sized(name: str, logw: Tensor) -> None:
    """ValueError where there are no particles."""
    if logw.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one particle in its last dimension, got shape {tuple(logw.shape)}")


def look(name: str, logw: Tensor, on_collapse: str) -> None:
    """ValueError with the systems' rows: NaN, more than one +inf, and, unless that means equal weights, nothing but -inf."""
    if logw.numel() == 0:
        return
    top = (logw.detach() if logw.requires_grad else logw).amax(-1)
    if math.isfinite((top if top.numel() == 1 else top.sum()).item()):  # NaN is the largest of all
        return
    if bool((bad := top.isnan()).any()):
        raise ValueError(f"{name} has NaN{systems(bad)}")
    infinite = (logw == torch.inf).sum(-1)
    if bool((bad := infinite > 1).any()):
        raise ValueError(
            f"{name} has more than one +inf{systems(bad)}; one is an atom, of two the shares are not known"
        )
    if on_collapse == "error" and bool((bad := top == -torch.inf).any()):
        raise ValueError(
            f'{name} is -inf for every particle{systems(bad)}: no weight is left; on_collapse="uniform" goes on with equal ones'
        )


def prepared(name: str, logw: Tensor, on_collapse: str, check: bool | None) -> Tensor:
    """Log-weights in double precision, looked at if they are."""
    sized(name, logw)
    if looks(logw, check):
        look(name, logw, on_collapse)
    return logw if logw.dtype == torch.float64 else logw.to(wide(logw.device))


def cleaned(logw: Tensor) -> tuple[Tensor, Tensor]:
    """The log-weights with a finite largest one in every system, and what the largest was, of shape (*batch, 1).

    An atom at +inf is alone, and a system without weight has equal ones.
    """
    top = logw.detach().amax(-1, keepdim=True)
    lone = torch.where((logw == top) | top.isnan(), 0.0, -torch.inf).to(logw.dtype)
    return torch.where(top.isfinite(), logw, lone), top


def effective(logw: Tensor) -> Tensor:
    """The effective sample size, of shape batch; N of a system without weight."""
    clean, _ = cleaned(logw)
    w = (clean - clean.detach().amax(-1, keepdim=True)).exp()
    return (w.sum(-1).square() / w.square().sum(-1)).clamp(1, logw.shape[-1])


def fitting(name: str, given: Tensor, logw: Tensor) -> Tensor:
    """An increment in the type of the log-weights, whose shape it has, or broadcasts to."""
    try:
        fits = torch.broadcast_shapes(given.shape, logw.shape) == logw.shape
    except RuntimeError:
        fits = False
    if not fits or given.device != logw.device:
        raise ValueError(
            f"{name} must have the log-weights' shape {tuple(logw.shape)} on {logw.device}, "
            f"got {tuple(given.shape)} on {given.device}"
        )
    return given.to(logw.dtype)


def indices(name: str, given: Tensor, N: int) -> Tensor:
    """Integers as int64; on the CPU, of which each is in [0, N)."""
    if given.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers, got {given.dtype}")
    if given.numel() and looks(given, None):
        least, most = (int(v) for v in given.aminmax())
        if least < 0 or most >= N:
            raise ValueError(f"{name} must be in [0, {N}), got {least if least < 0 else most}")
    return given.to(torch.int64)
