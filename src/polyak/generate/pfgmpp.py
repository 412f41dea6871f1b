"""PFGM++: Poisson flow with D extra dimensions; heavy tails at small D, diffusion at D = inf.

Xu et al., PFGM++: Unlocking the Potential of Physics-Inspired Generative Models (ICML 2023, arXiv 2302.04265). Data y in R^N are
charges on r = 0 of R^(N+D); a point at distance r has the perturbation kernel (equation 6)::

    p_r(x | y)  ~  (|x - y|^2 + r^2)^(-(N + D) / 2)

a Student law with D degrees of freedom. With ``r = sigma sqrt(D)`` it tends to N(y, sigma^2 I), and along the field lines
(equation 4, with E[y | x] under these weights in the place of EDM's)::

    dx/dr = E[x - y | x] / r,   that is   dx/dsigma = (x - E[y | x]) / sigma

which is EDM's ODE. So :class:`PFGMPP` is EDM with another noise: every ODE solver, guidance and network goes with it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.prediction import edm_loss_weight
from polyak.generate.process import EDM, Generators, ProbabilityPath, check_batch, expand, standard_normal, wide
from polyak.generate.solver import SOLVER, Query, Run, Solver

__all__ = ["PFGMPP", "inject_noise", "pfgmpp_loss", "quantize_weights", "stf_target"]

_STIRLING = 100.0  # D / 2 above which log-gammas are subtracted as their series
_SIGMA = checks.Operand(checks.positive)  # a number, or one for each row
_DATA = checks.Tensor(floating=True, least_ndim=1)


@checks.arguments(
    D=checks.Number(0, ends="(]", infinite=True), N=checks.Integer(1) | None, sigma_min=checks.positive, sigma_max=checks.positive,
    clip=checks.Number(0, 0.5, "()") | None,
)  # fmt: skip
@dataclass(frozen=True)
class PFGMPP(EDM):
    """PFGM++'s process: EDM's times and ODE, ``x_t = x0 + sigma noise`` with ``noise = z sqrt(D / chi2_D)``, z ~ N(0, I).

    chi2_D is one number for a whole sample: the radius ``|x - x0|`` has heavy tails, and the direction is uniform. The noise is
    Gaussian for ``D=inf`` alone; else there is no score and no stochastic solver.

    Args:
        D: the extra dimensions, above 0; a number that need not be whole, or ``float("inf")``, which is EDM.
        N: the dimension of the data, for a check of shapes and :meth:`radius`; left out, that of what is given.
        sigma_min, sigma_max: the levels between which the network may be asked, as of EDM (r is these times sqrt(D)).
        clip: keep ``b = R^2 / (R^2 + r^2)`` of :meth:`perturb` within [clip, 1 - clip]: official code trains with 1e-3. The prior,
            as there, is not clipped. It also clamps what float16 cannot hold, with a warning that counts; else that is an error.

    Raises:
        ValueError: an argument out of range; a shape that is not N's.
    """

    D: float = 128.0
    N: int | None = None
    sigma_min: float = field(default=0.002, kw_only=True)
    sigma_max: float = field(default=80.0, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)

    @property
    def is_gaussian(self) -> bool:  # type: ignore[override]
        return math.isinf(self.D)

    @property
    def prior_std(self) -> float:
        """``sigma_max sqrt(D / (D - 2))``; ValueError where D <= 2, whose variance is infinite."""
        if self.D <= 2:
            raise ValueError(f"PFGM++ with D <= 2 has infinite variance, got D={self.D:g}")
        return self.sigma_max * (1.0 if self.is_gaussian else math.sqrt(self.D / (self.D - 2)))

    def diffusion2(self, t: Any) -> Any:
        """``g(t)^2`` of the forward SDE, for ``D=inf``; ValueError otherwise: PFGM++ has none."""
        if not self.is_gaussian:
            raise ValueError(f"PFGM++ has no forward SDE and no Gaussian score: use an ODE solver, got D={self.D:g}")
        return super().diffusion2(t)

    def perturb(
        self, x0: Tensor, t: float | Tensor, noise: Tensor | None = None, *, generator: Generators | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``x_t = x0 + sigma noise`` given ``x0``, shape (B, ...); ``(x_t, noise)``, as :meth:`Process.perturb`.

        z is drawn first, then chi2_D for each row: with the same generator the z of all D are the same.
        """
        self._check_size(x0.shape)
        if noise is not None or self.is_gaussian or not x0.is_floating_point():
            return super().perturb(x0, t, noise, generator=generator)
        check_batch(t, x0)
        z = standard_normal(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device).to(_work(x0.dtype))
        width = self._width(z, generator, self.clip)
        sigma = self.sigma(t.to(width)) if isinstance(t, Tensor) else self.sigma(t)
        x = x0.to(z.dtype) + expand(sigma * width, z) * z
        return self._held(x, x0.dtype), self._held(expand(width, z) * z, x0.dtype)

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: Generators | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the kernel of ``sigma_max`` around 0, which sampling starts from: heavy-tailed, and never clipped."""
        self._check_size(shape)
        if self.is_gaussian:
            return super().prior(shape, generator=generator, dtype=dtype, device=device)
        z = standard_normal(shape, generator=generator, dtype=dtype, device=device)
        dtype, z = z.dtype, z.to(_work(z.dtype))
        return self._held(expand(self.sigma_max * self._width(z, generator), z) * z, dtype)

    @checks.arguments(sigma=_SIGMA, n=checks.Integer(0), generator=checks.generator | None)
    def radius(self, sigma: float | Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n radii ``R = |x - y|`` of the kernel at sigma (a number, or one for each): (n,), float64.

        ``R / r`` is the root of ``b / (1 - b)``, b ~ Beta(N/2, D/2); ``E R^2 = N sigma^2 D / (D - 2)`` for D > 2.
        """
        if self.N is None:
            raise ValueError("radius needs the dimension of the data: give PFGMPP(N=...)")
        device = torch.device("cpu") if generator is None else generator.device
        squared = _chi2(self.N, n, generator, device)
        if not self.is_gaussian:
            squared = self.D * _odds(squared, _chi2(self.D, n, generator, device), self.clip)
        return _level(sigma, squared) * squared.sqrt()

    @checks.arguments(x=_DATA, y=_DATA, sigma=_SIGMA)
    def log_kernel(self, x: Tensor, y: Tensor, sigma: float | Tensor) -> Tensor:
        """``log p_r(x | y)``, normalised over x: x and y of shape (B, ...), sigma a number or (B,); (B,), float64.

        One row of x or of y goes with all of the other.
        """
        if x.shape[1:] != y.shape[1:] or (len(x) != len(y) and 1 not in (len(x), len(y))):
            raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
        self._check_size(x.shape)
        squared = _rows(x.to(wide(x.device)) - y.to(wide(x.device))).square().sum(1)
        n, level = math.prod(x.shape[1:]), _level(sigma, squared)
        return _log_ratio(self.D, n) - n / 2 * (2 * math.pi * level**2).log() + self._exponent(squared, level, n)

    @checks.arguments(x=_DATA, data=_DATA, sigma=_SIGMA)
    def posterior_weights(self, x: Tensor, data: Tensor, sigma: float | Tensor) -> Tensor:
        """The probability of each data point given x: x (B, ...), data (n, ...), sigma a number or (B,); (B, n), float64.

        ``~ (|x - y|^2 + r^2)^(-(N + D) / 2)``, in logarithms. Memory O(B n), time O(B n N).
        """
        _check_points("data", data, "x", x)
        self._check_size(x.shape)
        rows, points = (_rows(part.to(wide(x.device))) for part in (x, data))
        squared = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        level = _level(sigma, squared[:, 0])
        return self._exponent(squared, level[:, None] if level.ndim else level, rows.shape[1]).softmax(1)

    def _exponent(self, squared: Tensor, sigma: Tensor, n: int) -> Tensor:
        if self.is_gaussian:
            return -squared / (2 * sigma**2)
        return -(n + self.D) / 2 * torch.log1p(squared / (self.D * sigma**2))

    def _check_size(self, shape: Sequence[int]) -> None:
        if self.N is not None and math.prod(shape[1:]) != self.N:
            raise ValueError(f"a sample must have N={self.N} elements, got shape {tuple(shape)}")

    def _width(self, z: Tensor, generator: Generators | None, clip: float | None = None) -> Tensor:
        """``sqrt(D / chi2_D)`` for each row of z, float64."""
        chi2 = _chi2(self.D, len(z), generator, z.device)
        if clip is None:
            return (self.D / chi2).sqrt()
        own = _rows(z).to(chi2.dtype).square().sum(1).clamp(min=torch.finfo(z.dtype).tiny)
        return (self.D * _odds(own, chi2, clip) / own).sqrt()

    def _held(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in a dtype, which may be too narrow for it: an error, or clamped and counted."""
        if dtype != torch.float16 and self.D >= 1:
            return x.to(dtype)
        most = torch.finfo(dtype).max
        beyond = int((x.abs() > most).sum())
        if not beyond:
            return x.to(dtype)
        what = f"PFGM++ with D={self.D:g}: {beyond} of {x.numel()} elements are beyond {most:g}, the largest of {dtype}"
        if self.clip is None:
            raise ValueError(f"{what}; draw in a wider dtype, or give clip= to clamp them")
        warnings.warn(f"{what}, and were clamped", RuntimeWarning, stacklevel=3)
        return x.clamp(-most, most).to(dtype)


def _rows(x: Tensor) -> Tensor:
    """(B, ...) as (B, N)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _level(sigma: float | Tensor, like: Tensor) -> Tensor:
    """sigma as a tensor of shape () or like's, above 0."""
    level = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    if level.ndim and level.shape != like.shape:
        raise ValueError(f"sigma must be a number or have shape {tuple(like.shape)}, got {tuple(level.shape)}")
    if level.device.type == "cpu" and not bool((level > 0).all()):
        raise ValueError(f"sigma must be > 0, got {sigma}")
    return level


def _chi2(degrees: float, n: int, generator: Generators | None, device: torch.device) -> Tensor:
    """n draws of chi^2 with so many degrees of freedom, in float64; a list of generators draws one each."""
    if isinstance(generator, Sequence):
        drawn = [_chi2(degrees, 1, one, device) for one in generator]
        return torch.cat(drawn) if drawn else torch.empty(0, dtype=wide(device), device=device)
    source = device if generator is None else generator.device
    shape = torch.full((n,), degrees / 2, dtype=wide(source), device=source)
    return 2 * torch._standard_gamma(shape, generator=generator).to(device)


def _check_points(name: str, points: Tensor, other: str, x: Tensor) -> None:
    if not len(points) or points.shape[1:] != x.shape[1:]:
        shapes = f"{tuple(points.shape)} for {other} of shape {tuple(x.shape)}"
        raise ValueError(f"{name} must hold at least one sample of {other}'s shape, got {shapes}")


def _odds(own: Tensor, extra: Tensor, clip: float | None) -> Tensor:
    """``R^2 / r^2 = b / (1 - b)`` with ``b = own / (own + extra)``."""
    odds = own / extra
    return odds if clip is None else odds.clamp(clip / (1 - clip), (1 - clip) / clip)


def _log_ratio(D: float, n: int) -> float:
    """``log Gamma((n + D) / 2) - log Gamma(D / 2) - n/2 log(D / 2)``, which tends to 0."""
    if math.isinf(D):
        return 0.0
    a, h = D / 2, n / 2
    if a <= _STIRLING:
        return math.lgamma(a + h) - math.lgamma(a) - h * math.log(a)
    rest = sum(c * ((a + h) ** -k - a**-k) for c, k in ((1 / 12, 1), (-1 / 360, 3), (1 / 1260, 5)))
    return (a + h - 0.5) * math.log1p(h / a) - h + rest


@checks.arguments(
    denoiser=MODEL, y=_DATA, process=checks.Instance(PFGMPP, words="a PFGMPP"),
    P_mean=checks.Number(-30, 30), P_std=checks.Number(0, 8), sigma_data=checks.Number(1e-6, 1e6) | None,
    generator=checks.generators | None, reference=_DATA | None,
)  # fmt: skip
def pfgmpp_loss(
    denoiser: Model,
    y: Tensor,
    process: PFGMPP,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    sigma_data: float | None = None,
    generator: Generators | None = None,
    *,
    reference: Tensor | None = None,
) -> Tensor:
    """EDM's training loss (arXiv 2206.00364, equation 8) under PFGM++'s noise (arXiv 2302.04265, equation 10); a scalar.

    ``ln sigma ~ N(P_mean, P_std^2)``; ``(sigma^2 + sd^2) / (sigma sd)^2 |D(x, sigma) - y|^2``, summed over a sample and averaged
    over the batch; of data in half precision in float32. Networks are told sigma, not r. With ``D=inf`` it is EDM's loss, number by
    number.

    Args:
        denoiser: a :class:`Denoiser` (usually of the dialect "edm"), or any ``(x, sigma) -> Prediction``.
        y: clean data, (B, ...).
        process: the denoiser's own.
        sigma_data: sd; left out, the denoiser's, or 0.5.
        generator: sigma is drawn from it, then the noise.
        reference: data (n, ...), y among them: the target is :func:`stf_target` of these, and not y.

    Raises:
        ValueError: another process than the denoiser's.
    """
    own: ProbabilityPath | None = getattr(denoiser, "process", None)
    if own is not None and own != process:
        raise ValueError(f"process must be the denoiser's own, {own!r}, got {process!r}")
    if reference is not None:
        _check_points("reference", reference, "y", y)
    sd = getattr(denoiser, "sigma_data", 0.5) if sigma_data is None else sigma_data
    normal = standard_normal(y.shape[:1], generator=generator, dtype=_work(y.dtype), device=y.device)
    sigma = (P_std * normal + P_mean).exp()
    x, _ = process.perturb(y, sigma, generator=generator)
    target = y if reference is None else stf_target(x, reference, sigma, process)
    weight = edm_loss_weight(sigma, sd)
    gap = denoiser(x, sigma).x0 - target  # type: ignore[attr-defined, arg-type]
    error = gap.to(_work(gap.dtype)).square()
    return _rows(expand(weight, error) * error).sum(1).mean()


@checks.arguments(
    x=_DATA, reference=_DATA, sigma=_SIGMA,
    process=checks.Instance(PFGMPP, words="a PFGMPP"),
)  # fmt: skip
@torch.no_grad()
def stf_target(x: Tensor, reference: Tensor, sigma: float | Tensor, process: PFGMPP) -> Tensor:
    """The stable target field (Xu et al., arXiv 2302.00670): ``E[y | x]`` over a reference batch, x's shape and dtype.

    Less noisy a target than y, and biased unless the reference is all data. O(B n N) time.

    Args:
        x: noised data, (B, ...). reference: clean data, (n, ...). sigma: a number or (B,).
    """
    _check_points("reference", reference, "x", x)
    weights = process.posterior_weights(x, reference, sigma)
    return (weights @ _rows(reference.to(weights))).reshape(x.shape).to(x.dtype)


class _Injected(Solver):
    """A solver whose every step begins with noise that the model does not know of."""

    def __init__(self, solver: Solver, alpha: float) -> None:
        self.solver, self.alpha = solver, alpha
        for fact in ("order", "tapers", "stages", "needs_gaussian", "history", "grid", "no_corrector", "reaches_zero"):
            setattr(self, fact, getattr(solver, fact))
        self.stochastic = solver.stochastic or alpha > 0

    def __repr__(self) -> str:
        return f"inject_noise({self.solver!r}, alpha={self.alpha:g})"

    def times(self, process: ProbabilityPath, **how: Any) -> Tensor:
        return self.solver.times(process, **how)

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: ProbabilityPath,
        *,
        generator: Generators | None = None,
        memory: Any = None,
    ) -> Run:
        known = {} if memory is None else {"memory": memory}
        inner, reply = self.solver.run(x, times, process, generator=generator, **known), None
        while True:
            try:
                event = inner.send(reply)
            except StopIteration as stop:
                return stop.value
            if self.alpha and isinstance(event, Query) and event.first:
                x = event.x
                z = standard_normal(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                level = expand(process.sigma(event.t), x)  # type: ignore[attr-defined]
                event = Query(x + self.alpha * level * z, event.t, True)  # the solver goes on from the prediction's x
            reply = yield event


@checks.arguments(solver=SOLVER, alpha=checks.non_negative)
def inject_noise(solver: Solver, alpha: float) -> Solver:
    """The paper's first test of robustness (section 6): before every step ``x += alpha sigma N(0, I)``; sigma stays what it was.

    Raises:
        ValueError: an adaptive solver, whose steps may be repeated.
    """
    if solver.adaptive:
        raise ValueError(f"solver must have steps that are known beforehand, got the adaptive {solver!r}")
    return _Injected(solver, alpha)


@checks.arguments(module=checks.module, bits=checks.Integer(1, 16))
@torch.no_grad()
def quantize_weights(module: nn.Module, bits: int) -> nn.Module:
    """The paper's last test of robustness (section 6): a copy whose weights are rounded to ``2^bits`` levels each.

    The levels of a tensor are equally spaced from its least to its largest value. Weights are parameters of two and more
    dimensions; biases and the scales of norms stay.
    """
    made = copy.deepcopy(module)
    for weight in made.parameters():
        if weight.ndim < 2 or not weight.is_floating_point() or not weight.numel():
            continue
        w = weight.to(_work(weight.dtype))
        low = w.min()
        step = (w.max() - low) / (2**bits - 1)
        weight.copy_(torch.where(step > 0, low + step * ((w - low) / step).round(), w))
    return made
