"""CogDPM: forecasts of fields by diffusion, guided pixel by pixel by how unsure the model is of each.

Chen, Guo, Zhang, Wang and Long, "CogDPM: Diffusion Probabilistic Models via Cognitive Predictive Coding", arXiv 2405.02384 (ICML
2024). Of the paper its abstract and summaries were at hand, and no code: precision is estimated from the denoising steps
themselves, guidance is weighted by it, and pixels of lower precision get more. How this is done here is our reconstruction:

    U = Var_j D_c^(j)                                over the steps j so far, for each pixel; mean over an ensemble's members
    W = clip(U / q-quantile(U), lo, hi)              the quantile over the pixels of one forecast
    D = D_c + w W (D_c - D_u)                        of the data predicted with the context, and without

The precision is ``1 / U``. With W = 1 this is classifier-free guidance of scale 1 + w.

    >>> from functools import partial
    >>> make = partial(context_denoiser, network, process=EDM(), prediction="edm")  # network(x, label of t, told)
    >>> made = ensemble_forecast(make, context, solver=Heun(), steps=18, members=10, guidance=PrecisionGuidance(1.0))
    >>> made.samples, made.precision  # (B, 10, F, H, W) and (B, F, H, W)
"""

from polyak.generate.cogdpm.forecast import ContextDropout, Forecast, context_denoiser, ensemble_forecast
from polyak.generate.cogdpm.guidance import PrecisionGuidance, PrecisionState
from polyak.generate.cogdpm.scores import (
    crps,
    csi,
    ensemble_rmse,
    fss,
    power_spectrum,
    rank_histogram,
    spread_skill,
)

__all__ = [
    "ContextDropout",
    "Forecast",
    "PrecisionGuidance",
    "PrecisionState",
    "context_denoiser",
    "crps",
    "csi",
    "ensemble_forecast",
    "ensemble_rmse",
    "fss",
    "power_spectrum",
    "rank_histogram",
    "spread_skill",
]
