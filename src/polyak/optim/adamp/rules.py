"""The update rules of AdamP and SGDP, and the projection in the middle of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from polyak.core.elementwise import axpy, sqrt, where
from polyak.core.momentum import bias_correction, ema, heavy_ball, nesterov
from polyak.core.projection import cosines, project_out

NONE, CHANNEL, LAYER = 0, 1, 2  # how a tensor was projected


def adamp_rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """One step of AdamP: Adam's, without its part along the weight where the weight's scale does not matter."""
    b1, b2 = h.betas
    m = ema(state.exp_avg, g, b1)
    v = ema(state.exp_avg_sq, g * g, b2)
    u = (ema(m, g, b1) if h.nesterov else m) / (sqrt(v) / sqrt(bias_correction(b2, h.step)) + h.eps)
    u, ratio = project(u, p, g, h)
    p = axpy(-h.lr / bias_correction(b1, h.step), u, p * (1 - h.lr * h.weight_decay * ratio))
    return p, {"exp_avg": m, "exp_avg_sq": v}


def sgdp_rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """One step of SGDP. The decay's 1 / (1 - momentum) makes it comparable with an L2 penalty in SGD."""
    buffer = heavy_ball(state.momentum_buffer, g, h.momentum, 1 - h.dampening)
    u, ratio = project(nesterov(buffer, g, h.momentum) if h.nesterov else buffer, p, g, h)
    p = axpy(-h.lr, u, p * (1 - h.lr * h.weight_decay / (1 - h.momentum) * ratio))
    return p, {"momentum_buffer": u if h.project_buffer and not h.nesterov else buffer}


def project(u: Any, p: Any, g: Any, h: Any) -> tuple[Any, Any]:
    """``u`` projected, and the factor of the weight decay. ``h.projection``: "auto", "channel", "layer" or "never"."""
    if h.projection == "never":
        return u, 1.0
    if hasattr(p, "elementwise"):
        # Traced: the backend computes these two for every row, from `direction`.
        tracer = p.tracer
        tracer.marks["direction"] = u
        projected, along = tracer.input("projected", uniform=False), tracer.input("along", uniform=False)
        return u - along * p, where(projected > 0, h.wd_ratio, 1.0)
    if not h.note.matrix:
        return u, 1.0
    mode = decide(p, g, h)
    h.note.decided(mode)
    by_channel = project_out(u, p, "channel", h.eps)
    by_layer = project_out(u, p, "layer", h.eps)
    new = torch.where(mode == CHANNEL, by_channel, torch.where(mode == LAYER, by_layer, u))
    return new, 1 - (mode != NONE).to(p.dtype) * (1 - h.wd_ratio)


def decide(p: torch.Tensor, g: torch.Tensor, h: Any) -> torch.Tensor:
    """NONE, CHANNEL or LAYER on the device of ``p``: the first view in which every row's cosine is below its threshold."""
    if h.projection != "auto":
        return torch.full((), CHANNEL if h.projection == "channel" else LAYER, device=p.device)
    passes = [
        (cosines(g, p, view, h.eps) < h.delta / math.sqrt(length)).all()
        for view, length in (("channel", p.numel() // len(p)), ("layer", p.numel()))
    ]
    return torch.where(passes[0], CHANNEL, torch.where(passes[1], LAYER, NONE))
