"""The noise levels of diffusers' schedulers: betas, their cumulative products, and the spacings that options select.

Where a timestep is found from a level and then rounded, single precision decides which one it is. Tables are therefore in
float32, as diffusers has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import EDM, RHO, Discrete, TrigFlow

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
SPACINGS = ("linspace", "leading", "trailing")
SHAPES = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
# What stands for alpha_bar = 0: diffusers' own value in the schedulers that divide by alpha; elsewhere as good as 0.
FAINT, FAINTEST = 2.0**-24, 2.0**-48


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half = 0.5 - t
    snr = math.exp(-0.5 * math.copysign(1.0, half) * math.log(1 - 2 * abs(half) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(t: float) -> float:
    return math.exp(-12.0 * t)


ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": _exponential,
}


def betas_of(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """The betas of a configuration."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=dtype)
    n = checks.integer("num_train_timesteps", config["num_train_timesteps"], least=2)
    schedule = checks.one_of("beta_schedule", config.get("beta_schedule", "linear"), BETAS)
    if schedule in ALPHA_BARS:
        alpha_bar = ALPHA_BARS[schedule]
        betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]
        return torch.tensor(betas, dtype=dtype)
    start, end = config["beta_start"], config["beta_end"]
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=dtype)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n, dtype=dtype)) * (end - start) + start
    return torch.linspace(start**0.5, end**0.5, n, dtype=dtype) ** 2


@dataclass(frozen=True)
class Table:
    """A chain: its betas and ``alpha_bar`` as diffusers has them, and its levels ``sigma / alpha``."""

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def sigmas(self) -> np.ndarray[Any, Any]:
        return (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()

    def process(self) -> Discrete:
        """The process, all points kept. Points beyond the last one's level are moved between their neighbours'."""
        products = self.alphas_cumprod.double().clamp(min=FAINTEST)
        kept = int((products[:-1] > products[-1]).sum())
        missing = len(products) - 1 - kept
        if missing:
            ends = products[[kept - 1, -1]].log()
            between = torch.linspace(0, 1, missing + 2, dtype=torch.float64)[1:-1]
            products[kept:-1] = torch.lerp(ends[0], ends[1], between).exp()
        return Discrete(alphas_cumprod=products, lam_min=-math.inf)


def table_of(config: Mapping[str, Any], *, faint: bool, exact: bool = False) -> Table:
    """The chain of a configuration.

    Args:
        config: num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, snr_shift_scale,
            rescale_betas_zero_snr.
        faint: a product that zero terminal SNR makes 0 is 2^-24, as in the schedulers that divide by alpha.
        exact: in float64.
    """
    shift = config.get("snr_shift_scale")
    double = exact or (shift is not None and config.get("beta_schedule") == "scaled_linear")
    betas = betas_of(config, torch.float64 if double else torch.float32)
    products = torch.cumprod(1 - betas, 0)
    if shift is not None:
        products = products / (shift + (1 - shift) * products)
    if config.get("rescale_betas_zero_snr"):  # Lin et al., arXiv 2305.08891, algorithm 1
        root = products.sqrt()
        products = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        if shift is None:
            betas = 1 - torch.cat([products[:1], products[1:] / products[:-1]])
            products = torch.cumprod(1 - betas, 0)
        if faint:
            products[-1] = FAINT
    return Table(betas, products)


class ChainLevels(EDM):
    """The levels of a chain as a process of their own: samples are ``y = x / alpha = x0 + sigma eps``, and time is sigma.

    Args:
        sigmas: the chain's levels, increasing; or
        sigma_min, sigma_max: the range in which the network is asked.
        logs: the logarithms of the levels.

    A network is told the index of a level in the chain; between two, what log sigma says.
    """

    def __init__(
        self, sigmas: Any = None, sigma_min: float = 0.002, sigma_max: float = 80.0, *, logs: Any = None
    ) -> None:
        super().__init__(sigma_min, sigma_max)
        logs = np.log(sigmas) if logs is None else logs
        object.__setattr__(self, "logs", torch.as_tensor(logs, dtype=torch.float64))

    logs: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChainLevels):
            return NotImplemented
        ends = (self.sigma_min, self.sigma_max) == (other.sigma_min, other.sigma_max)
        return ends and torch.equal(self.logs, other.logs)

    def __hash__(self) -> int:
        return hash((self.sigma_min, self.sigma_max, len(self.logs)))

    def label(self, t: Any) -> Any:
        logs = self.logs
        if not isinstance(t, Tensor):
            return self.label(torch.tensor(t, dtype=torch.float64)).item()
        logs = logs.to(device=t.device, dtype=t.dtype)
        at = t.clamp(min=1e-10).log()
        left = (torch.searchsorted(logs, at, right=True) - 1).clamp(0, len(logs) - 2)
        low, high = logs[left], logs[left + 1]
        return left + ((at - low) / (high - low)).clamp(0, 1)

    def t_of_label(self, label: Any) -> Any:
        if not isinstance(label, Tensor):
            return self.t_of_label(torch.tensor(float(label), dtype=torch.float64)).item()
        logs = self.logs.to(device=label.device, dtype=label.dtype)
        left = label.floor().clamp(0, len(logs) - 2).long()
        return torch.lerp(logs[left], logs[left + 1], label - left).exp()


class Arctan(EDM):
    """EDM whose network is told ``2 atan(sigma) / pi`` (Stable Audio)."""

    def label(self, t: Any) -> Any:
        return t.atan() * 2 / math.pi if isinstance(t, Tensor) else math.atan(t) * 2 / math.pi

    def t_of_label(self, label: Any) -> Any:
        angle = label * (math.pi / 2)
        return angle.tan() if isinstance(label, Tensor) else math.tan(angle)


class Trig(TrigFlow):
    """iPNDM's chain: ``alpha = cos(pi t / 2)``; its network is told t."""


def spaced(kind: str, n: int, last: int, total: int, offset: int) -> np.ndarray[Any, Any]:
    """n timesteps by ``timestep_spacing``, of DDIM's kind: the lowest one is asked at."""
    checks.one_of("timestep_spacing", kind, SPACINGS)
    if kind == "linspace":
        return np.linspace(0, last - 1, n)[::-1]
    if kind == "leading":
        return np.arange(n)[::-1] * float(last // n) + offset
    return np.arange(last, 0, -total / n).round() - 1


def spaced_apart(kind: str, n: int, last: int, total: int, offset: int) -> np.ndarray[Any, Any]:
    """n timesteps by ``timestep_spacing``, of DPM-Solver's kind: one more is spaced, at which nothing is asked."""
    if kind == "trailing":
        return spaced(kind, n, last, total, offset)
    return spaced(kind, n + 1, last, total, offset)[:-1]


def distilled(n: int, total: int, original: int, strength: float) -> np.ndarray[Any, Any]:
    """n of the timesteps that a consistency model was distilled at."""
    all_of_them = np.arange(1, int(original * strength) + 1)[::-1] * (total // original) - 1
    if n > len(all_of_them):
        raise ValueError(
            f"num_inference_steps must be at most {len(all_of_them)}, the number of distilled ones, got {n}"
        )
    return all_of_them[np.floor(np.linspace(0, len(all_of_them), n, endpoint=False)).astype(int)].astype(float)


def shaped(shape: str, n: int, sigma_max: float, sigma_min: float, rho: float = RHO) -> np.ndarray[Any, Any]:
    """n levels from sigma_max to sigma_min, spaced as an option says."""
    if shape == "use_karras_sigmas":
        ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        return (ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0])) ** rho
    if shape == "use_beta_sigmas":
        try:
            from scipy.stats import beta
        except ImportError as error:
            raise ImportError("use_beta_sigmas needs SciPy: pip install scipy") from error
        return sigma_min + beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (sigma_max - sigma_min)
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n))


def label_of_sigma(sigma: Any, sigmas: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where levels lie in the chain, by log sigma: 0 for its lowest."""
    logs = np.log(sigmas)
    at = np.log(np.maximum(np.asarray(sigma, dtype=np.float64), 1e-10))
    below = at[..., None] >= logs  # not a search: a chain of zero terminal SNR need not be sorted at its end
    left = np.where(below.any(-1), len(logs) - 1 - below[..., ::-1].argmax(-1), 0).clip(max=len(logs) - 2)
    low, high = logs[left], logs[left + 1]
    weight = np.clip((low - at) / (low - high), 0, 1)
    return (1 - weight) * left + weight * (left + 1)
