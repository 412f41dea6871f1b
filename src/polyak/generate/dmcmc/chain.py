"""Denoising Langevin Gibbs: chains in the product of data and noise level, and the samples that are made from their states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vjp

from polyak.core import checks
from polyak.generate.dmcmc.integrators import Integrator, KarrasHeun
from polyak.generate.dmcmc.levels import check_levels, check_logits, draw, noise_levels, uniform
from polyak.generate.dmcmc.scaled import PROCESS, Scaled, check_range, checked, working
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.fields import signs
from polyak.generate.process import Generators, Process, expand, standard_normal, wide

_COUNT, _LEVEL = checks.Integer(1, 10**9), checks.positive
_ROUNDS = 2  # of the fixed point that tells sigma without a classifier
_FAR = 5.0  # times sqrt(d) sigma_max: there no sample of any level is
_SHAPE = checks.Each(checks.Integer(1, 10**9), least=2, words="a shape (chains, ...)")
_PLAN = checks.Each(checks.Each(checks.anything, count=2, words="a pair (steps, eta)"))
_KEYS = ("x", "sigma", "nfe", "warmup_nfe", "emitted", "generator")


class DenoisingLangevinGibbs:
    """Samples of a diffusion model at a few evaluations each, from Markov chains in (x, sigma).

    Each row of a batch is a chain of its own. Between two samples it takes ``n_skip`` Langevin steps, each with the score at its
    own noise level, which is then told anew. From the state of the smallest level the sample is integrated; the chain itself goes
    on from where it was. The state x is in the scaled variable ``x_t / alpha`` and sigma is ``sigma / alpha``: models of every
    Gaussian process can be sampled, and a classifier is trained on data + sigma noise.

    Args:
        denoiser: a :class:`Denoiser`, or any ``(x, t) -> Prediction``.
        process: its process, Gaussian.
        noise_posterior: a :class:`NoiseClassifier`, a :class:`NoisePosterior`, or any function ``x -> logits (B, n)`` with
            ``levels`` (n,), the largest first. May be None for ``sigma_update="denoiser"``.
        eta: of the Langevin step ``x + eta/2 score + sqrt(eta) noise``, in units of the data squared; it is not scaled by sigma.
        n_skip: Langevin steps between two samples of a chain.
        sigma_update: "argmax", the most probable level (the paper's results); "sample", one drawn from the posterior, which is the
            Gibbs step; "denoiser", without a classifier: the level that makes what the denoiser removes as large as it should be,
            ``d sigma^2 = |x - D|^2 + sigma^2 div D`` (its expectation holds for the exact D, and its solution is the likeliest
            sigma). This takes two further evaluations a step, each with one product with the Jacobian.
        integrator: from a state and its level to a sample.
        select: the state that a sample is made from: "min", the one of the smallest level since the last sample, the state then
            included (official); "fresh", the same without it, so that no state is used twice; "last", the last one.
        tweedie: a level at which each sample takes a last step ``x + tweedie^2 score(x, tweedie)`` (one evaluation more). Official
            code has 1e-2 for CIFAR-10, 1e-3 for CelebA-HQ; an integrator that ends at 0 leaves it nothing to remove.
        metropolis: accept or refuse each Langevin step by its exact probability, so that any eta leaves p(x | sigma) as it is. The
            denoiser must have ``log_prob(x, t)``; two evaluations a step in the place of one.

    Attributes:
        x, sigma: the chains' states (B, ...) and levels (B,); None before :meth:`warmup`.
        warmup_nfe: evaluations of each chain's start. nfe: those since. emitted: samples of each chain.
        classified: how often each chain asked for its noise level.

    Raises:
        ValueError: a process without a score; levels beyond the model's. While it runs: a posterior that returns NaN, chains that
            go astray (naming eta and sigma), predictions that are not finite. The chains are then as they were before that sample.

    Example:
        >>> chains = DenoisingLangevinGibbs(denoiser, denoiser.process, classifier, integrator=KarrasHeun(3))
        >>> chains.warmup((200, 3, 32, 32), torch.Generator().manual_seed(0))
        >>> x = chains.sample(1000)
    """

    @checks.arguments(
        denoiser=MODEL, process=PROCESS, noise_posterior=checks.Like("a noise posterior, with levels", "levels", "__call__") | None,
        eta=_LEVEL, n_skip=_COUNT, sigma_update=checks.Choice("argmax", "sample", "denoiser"),
        integrator=checks.Instance(Integrator, words="an Integrator (an instance, not the class)"),
        select=checks.Choice("min", "fresh", "last"), tweedie=_LEVEL | None, metropolis=checks.flag,
    )  # fmt: skip
    def __init__(
        self,
        denoiser: Model,
        process: Process,
        noise_posterior: Any = None,
        eta: float = 0.5,
        n_skip: int = 4,
        sigma_update: Literal["argmax", "sample", "denoiser"] = "argmax",
        integrator: Integrator = KarrasHeun(3),  # noqa: B008 (frozen)
        select: Literal["min", "fresh", "last"] = "min",
        *,
        tweedie: float | None = None,
        metropolis: bool = False,
    ) -> None:
        self.denoiser, self.process = denoiser, checked(denoiser, process)
        self.noise_posterior, self.sigma_update = noise_posterior, sigma_update
        self.eta, self.n_skip, self.integrator = eta, n_skip, integrator
        self.select, self.tweedie, self.metropolis = select, tweedie, metropolis
        if noise_posterior is None:
            if sigma_update != "denoiser":
                raise ValueError(f"noise_posterior is needed for sigma_update={sigma_update!r}, got None")
            self.levels = noise_levels(*(process.sigma_hat(t) for t in (process.t_min, process.t_max)))
        else:
            given = noise_posterior.levels
            if not isinstance(given, Tensor):
                raise TypeError(f"noise_posterior.levels must be a tensor, got {checks.shown(given)}")
            self.levels = check_levels("noise_posterior.levels", given.detach().cpu().to(torch.float64))
            check_range("noise_posterior.levels", self.levels[-1].item(), self.levels[0].item(), process)
        if tweedie is not None:
            check_range("tweedie", tweedie, tweedie, process)
        if metropolis and not callable(getattr(denoiser, "log_prob", None)):
            raise ValueError(f"metropolis needs a denoiser with log_prob(x, t), as ExactDenoiser; got {denoiser!r}")
        self.x: Tensor | None = None
        self.sigma: Tensor | None = None
        self.generator: Generators | None = None
        self.warmup_nfe = self.nfe = self.emitted = self.classified = 0
        self._dtype = torch.float32

    def nfe_per_sample(self, *, with_warmup: bool = False) -> float:
        """Evaluations for each sample so far, of the integrator and of the chain; ``with_warmup``: and of its start."""
        if not self.emitted:
            raise ValueError("no sample was made yet: call sample(n) first")
        return (self.nfe + (self.warmup_nfe if with_warmup else 0)) / self.emitted

    # --- beginning

    @checks.arguments(
        batch=_SHAPE | checks.Tensor(floating=True, least_ndim=2), generator=checks.generators | None, steps=_COUNT, noise=_LEVEL,
        burn_in=_PLAN, dtype=checks.dtype | None, device=checks.device | None,
    )  # fmt: skip
    @torch.no_grad()
    def warmup(
        self,
        batch: Sequence[int] | Tensor,
        generator: Generators | None = None,
        *,
        steps: int = 19,
        noise: float = 0.5,
        burn_in: Sequence[tuple[int, float | None]] = ((10, 0.5), (10, None)),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Begin the chains: integrate noise of the largest level, add ``noise``, tell sigma, and take some Langevin steps.

        Args:
            batch: a shape (chains, ...); or the noise itself, N(0, sigma_max^2 I), as a tensor.
            generator: all randomness comes from it, that of the samples, too. On the chains' device. A list holds one for each
                chain, which then does not depend on its batch.
            steps: of Heun's method with churn, ``2 steps - 1`` evaluations (official N = 20 makes 19 steps).
            noise: the standard deviation of what is added to these samples.
            burn_in: pairs of a number of Langevin steps and their eta, None for the chains' own; ((50, 1.6), (20, None)) in the
                paper's runs on CelebA-HQ.
            dtype, device: of a shape's chains.

        Raises:
            ValueError: as for the class; a generator on another device.
        """
        plan = [
            (checks.integer("burn_in", n, least=0), self.eta if eta is None else _LEVEL("burn_in", eta))
            for n, eta in burn_in
        ]
        top = self.levels[0].item()
        if isinstance(batch, Tensor):
            if dtype is not None or device is not None:
                raise ValueError("dtype and device follow the batch; give them with a shape only")
            start = batch
        else:
            one = generator[0] if isinstance(generator, Sequence) and len(generator) else generator
            place = device if device is not None else one.device if isinstance(one, torch.Generator) else None
            start = top * standard_normal(batch, generator=generator, dtype=dtype, device=place)
        if not len(start):
            raise ValueError("batch must hold at least one chain, got 0")
        for one in generator if isinstance(generator, Sequence) else [generator]:
            if one is not None and one.device.type != start.device.type:
                raise ValueError(f"generator must be on the chains' device {start.device}, got {one.device}")
        scaled = Scaled(self.denoiser, self.process, start.dtype)
        y = working(start)
        level = torch.full((len(y),), top, dtype=wide(y.device), device=y.device)
        y = KarrasHeun(steps, churn=80.0)(scaled, y, level, generator)
        y = y + noise * standard_normal(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        watch, count = _Watch(self, y), 1
        sigma = self._told(scaled, y, torch.full_like(level, noise), generator, watch)
        for n, eta in plan:
            for _ in range(n):
                y, sigma = self._step(scaled, y, sigma, eta, generator, watch)
                count += 1
        watch.look()
        self.x, self.sigma, self.generator, self._dtype = y, sigma, generator, start.dtype
        self.warmup_nfe, self.nfe, self.emitted, self.classified = scaled.nfe, 0, 0, count

    # --- running

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of samples, one from each chain, (B, ...), without end."""
        self._ready()
        return self._batches()

    def _batches(self) -> Iterator[Tensor]:
        while True:
            yield self._emit()

    @checks.arguments(n=checks.Integer(0, 10**9), generator=checks.generators | None)
    def sample(self, n: int, generator: Generators | None = None) -> Tensor:
        """n samples, (n, ...): the chains' first ones, then their second ones, and so on; what the last batch has too many is lost.

        Args:
            generator: from now on in the place of the one that the warm-up was given.
        """
        x, _ = self._ready()
        if generator is not None:
            self.generator = generator
        made = [self._emit() for _ in range(-(-n // len(x)))]
        return torch.cat(made)[:n] if made else x.new_empty(0, *x.shape[1:], dtype=self._dtype)

    def _ready(self) -> tuple[Tensor, Tensor]:
        if self.x is None or self.sigma is None:
            raise ValueError("the chains have not begun: call warmup(batch) or load_state_dict(state) first")
        return self.x, self.sigma

    @torch.no_grad()
    def _emit(self) -> Tensor:
        y, sigma = self._ready()
        generator, scaled, watch = self.generator, Scaled(self.denoiser, self.process, self._dtype), _Watch(self, y)
        best, least = y, sigma
        for i in range(self.n_skip):
            y, sigma = self._step(scaled, y, sigma, self.eta, generator, watch)
            if self.select == "last" or (self.select == "fresh" and i == 0):
                best, least = y, sigma
            else:
                less = sigma < least
                best, least = torch.where(_as(less, y), y, best), torch.where(less, sigma, least)
        watch.look()
        made = self.integrator(scaled, best, least, generator)
        if self.tweedie is not None:
            level = torch.full_like(least, self.tweedie)
            made = made - self.tweedie * scaled.eps(made, level)
        self.x, self.sigma = y, sigma
        self.nfe, self.emitted, self.classified = (
            self.nfe + scaled.nfe, self.emitted + 1, self.classified + self.n_skip,
        )  # fmt: skip
        return made.to(self._dtype)

    def _step(
        self, scaled: Scaled, y: Tensor, sigma: Tensor, eta: float, generator: Generators | None, watch: _Watch
    ) -> tuple[Tensor, Tensor]:
        """One Langevin step on p(x | sigma), and a level for what it made."""
        slope = scaled.eps(y, sigma) / expand(-sigma, y)
        z = standard_normal(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        new = y + eta / 2 * slope + math.sqrt(eta) * z
        if self.metropolis:
            new = torch.where(_as(self._accepts(scaled, y, slope, z, new, sigma, eta, generator), y), new, y)
        watch.see(new, sigma, eta)
        return new, self._told(scaled, new, sigma, generator, watch)

    def _accepts(
        self,
        scaled: Scaled,
        y: Tensor,
        slope: Tensor,
        z: Tensor,
        new: Tensor,
        sigma: Tensor,
        eta: float,
        generator: Any,
    ) -> Tensor:
        """(B,), by Metropolis and Hastings: MALA's probability."""
        t = scaled.time(sigma)
        alpha = expand(self.process.alpha(t), y)
        there = scaled.eps(new, sigma) / expand(-sigma, y)
        density: Callable[[Tensor, Tensor], Tensor] = self.denoiser.log_prob  # type: ignore[union-attr]
        back = (y - new - eta / 2 * there).flatten(1).square().sum(1) / eta
        gain = density(alpha * new, t) - density(alpha * y, t) - (back - z.flatten(1).square().sum(1)) / 2
        return uniform(len(y), generator, y.device).log() < gain

    def _told(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None, watch: _Watch) -> Tensor:
        """The level of y, (B,); sigma is a guess."""
        if self.sigma_update == "denoiser":
            return self._fixed_point(scaled, y, sigma, generator)
        levels = self.levels.to(sigma)
        logits = check_logits(self.noise_posterior(y.to(self._input_of(y))), len(y), len(levels))
        watch.hear(logits)
        return levels[logits.argmax(1) if self.sigma_update == "argmax" else draw(logits, generator)]

    def _input_of(self, y: Tensor) -> torch.dtype:
        """What a network of other precision is given."""
        if isinstance(self.noise_posterior, torch.nn.Module):
            return next((p.dtype for p in self.noise_posterior.parameters()), y.dtype)
        return y.dtype

    def _fixed_point(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None) -> Tensor:
        low, high, d = self.levels[-1].item(), self.levels[0].item(), math.prod(y.shape[1:])
        for _ in range(_ROUNDS):
            # D = y - sigma eps: |y - D|^2 = sigma^2 |eps|^2 and d - div D = sigma div eps.
            # One direction, and no vmap, which the channels-last kernels of UNets do not take.
            eps, back, *_ = vjp(lambda y, s=sigma: scaled.eps(y, s), y)
            v = signs(y, 1, generator)[0]
            divergence = (v * back(v)[0]).flatten(1).sum(1)
            removed = sigma.square() * eps.flatten(1).to(sigma).square().sum(1)
            # An estimate, of one direction, may be anything; of all d dimensions at least a hundredth is noise.
            freedom = (sigma * divergence.to(sigma)).clamp(d / 100, 2 * d)
            sigma = (removed / freedom).sqrt().clamp(low, high)
        return sigma

    # --- saving

    def state_dict(self) -> dict[str, Any]:
        """The chains, and their generator's state: what :meth:`load_state_dict` goes on from, sample by sample the same."""
        x, sigma = self._ready()
        g = self.generator
        kept = [one.get_state() for one in g] if isinstance(g, Sequence) else None if g is None else g.get_state()
        numbers = {name: getattr(self, name) for name in ("nfe", "warmup_nfe", "emitted", "classified")}
        return {"x": x.clone(), "sigma": sigma.clone(), "generator": kept, "dtype": self._dtype, **numbers}

    @checks.arguments(state=checks.state_dict)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the chains of a :meth:`state_dict`; in the place of :meth:`warmup`.

        Raises:
            ValueError: a state without what belongs to one, or with levels out of the table's range.
        """
        if lacking := [name for name in (*_KEYS, "classified", "dtype") if name not in state]:
            raise ValueError(f"state must be a state_dict of DenoisingLangevinGibbs, it lacks {', '.join(lacking)}")
        x, sigma = state["x"], state["sigma"]
        if not (isinstance(x, Tensor) and isinstance(sigma, Tensor) and sigma.shape == x.shape[:1]):
            raise ValueError("state must hold tensors x (B, ...) and sigma (B,)")
        low, high = self.levels[-1].item(), self.levels[0].item()
        inside = (sigma >= low * (1 - 1e-9)) & (sigma <= high * (1 + 1e-9))
        if not bool(inside.all()):
            raise ValueError(
                f"state must have levels in [{low:g}, {high:g}], got {checks.shown(sigma[~inside][0].item())}"
            )

        def restored(kept: Tensor) -> torch.Generator:
            made = torch.Generator(x.device)
            made.set_state(kept.cpu())  # where torch.load put it elsewhere
            return made

        kept = state["generator"]
        self.generator = (
            None if kept is None else restored(kept) if isinstance(kept, Tensor) else [restored(k) for k in kept]
        )
        self.x, self.sigma, self._dtype = x.clone(), sigma.clone(), state["dtype"]
        for name in ("nfe", "warmup_nfe", "emitted", "classified"):
            setattr(self, name, int(state[name]))


class _Watch:
    """Notes what went wrong on the way, and says so when it is asked: on the CPU at once, elsewhere once for a sample."""

    def __init__(self, chains: DenoisingLangevinGibbs, y: Tensor) -> None:
        self.at_once = y.device.type == "cpu"
        self.most = _FAR * math.sqrt(math.prod(y.shape[1:])) * chains.levels[0].item()
        self.farthest: Tensor | None = None  # of all chains and steps: its length, its sigma, and eta
        self.deaf: Tensor | None = None

    def see(self, y: Tensor, sigma: Tensor, eta: float) -> None:
        length = y.flatten(1).norm(dim=1).to(sigma)
        length, row = length.nan_to_num(math.inf).max(0)
        now = torch.stack([length, sigma[row], torch.full_like(length, eta)])
        self.farthest = now if self.farthest is None else torch.where(now[0] > self.farthest[0], now, self.farthest)
        if self.at_once:
            self.look()

    def hear(self, logits: Tensor) -> None:
        nan = logits.isnan().any()
        self.deaf = nan if self.deaf is None else self.deaf | nan
        if self.at_once:
            self.look()

    def look(self) -> None:
        if self.deaf is not None and bool(self.deaf):
            raise ValueError("noise_posterior returned NaN")
        if self.farthest is None:
            return
        length, sigma, eta = self.farthest.tolist()
        if not length <= self.most:
            raise ValueError(
                f"the chains went astray: |x| = {length:.3g} is beyond 5 sqrt(d) sigma_max = {self.most:.3g} after a step with "
                f"eta={eta:g} at sigma={sigma:.4g}; take a smaller eta, or a posterior that tells sigma better"
            )


def _as(rows: Tensor, y: Tensor) -> Tensor:
    """(B,) made to choose between states (B, ...)."""
    return rows.reshape(rows.shape + (1,) * (y.ndim - 1))
