"""The local half of MoNNA's step: Polyak's momentum with weight 1 - b, elementwise, the same for optimizer and simulator."""

from __future__ import annotations

from typing import Any

from polyak.core.elementwise import axpy
from polyak.core.momentum import ema


def rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """``m = b m + (1 - b) (g + wd p)``, ``p = p - lr m``; ``h.clip``, where there is one, scales ``g + wd p``."""
    g = axpy(h.weight_decay, p, g)
    clip = getattr(h, "clip", None)
    if clip is not None:
        g = g * clip
    m = ema(state.exp_avg, g, h.momentum)
    return axpy(-h.lr, m, p), {"exp_avg": m}


def clipping(norm: Any, max_norm: float) -> Any:
    """The factor that shortens to ``max_norm`` what is longer; a norm of 0 is left alone."""
    return max_norm / norm.clamp(min=max_norm)
