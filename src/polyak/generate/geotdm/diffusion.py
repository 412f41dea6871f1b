"""The diffusion of trajectories: its loss, its reference trajectory, and samples; with frames that are given, or without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.geotdm.graphs import (
    Frames,
    Graph,
    Inputs,
    finite,
    frames_of,
    graph_of,
    pick,
    repeated,
    trajectory,
)
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.prediction import Denoiser
from polyak.generate.process import Discrete, ProbabilityPath, standard_normal, wide
from polyak.generate.sampling import sample
from polyak.generate.solver import SOLVER, Solver, Step

REFERENCES = ("learned", "last", "com", None)
_BETA_MAX = 0.999


@dataclass(frozen=True, repr=False)
class _Ancestral(LinearSolver):
    """DDPM (arXiv 2006.11239, algorithm 2) with the larger variance, beta; no noise in a step that ends on clean data."""

    stochastic: ClassVar[bool] = True
    needs_gaussian: ClassVar[bool] = True

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        at = process.moments(times)
        stages = []
        for i, (s, t) in enumerate(pairwise(at)):
            ratio = math.exp(at.log_alpha[i] - at.log_alpha[i + 1])
            beta = -math.expm1(2 * (at.log_alpha[i] - at.log_alpha[i + 1]))
            std = math.sqrt(beta) if at.sigma[i + 1] else 0.0
            stages.append(Stage(s, t, "eps", 1 / ratio, -beta / (ratio * at.sigma[i]), std=std))
        return stages


class GeometricTrajectoryDiffusion(nn.Module):
    """A DDPM over whole trajectories, predicting the noise, for an equivariant network (see :mod:`polyak.generate.geotdm`).

    Args:
        net: a module such as :class:`EGTN`: ``net(x, tau, h, edge_index, edge_attr, batch, cond_mask) -> eps``; with
            ``reference="learned"`` also ``net.reference(x_given, h, edge_index, edge_attr, batch, cond_mask) -> x_r``.
        steps: S, of the chain. Its betas are linear from 1e-4 to 0.02, times 1000 / S, and at most 0.999.
        reference: what the prior N(x_r, I) of generated frames is centred at: what the network makes of the frames that are
            given ("learned"), the last of them ("last"), or their mean over points and frames ("com"). None: no frames are given,
            and what is generated has the mean 0 over points and frames.

    Attributes:
        betas, alphas_bar: float64 [S], of the steps tau = 0 .. S - 1.
        process: the same chain, as the room's solvers take it: step tau is at t = (tau + 1) / S.

    Example:
        >>> model = GeometricTrajectoryDiffusion(EGTN(1, 1, future=20), steps=100)
        >>> optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        >>> model.loss(x, h, edge_attr=edges, cond_mask=torch.arange(30) < 10).backward()
    """

    @checks.arguments(net=checks.module, steps=checks.Integer(2, 1_000_000), reference=checks.Choice(*REFERENCES))
    def __init__(self, net: nn.Module, steps: int = 1000, reference: str | None = "learned") -> None:
        super().__init__()
        if reference == "learned" and not callable(getattr(net, "reference", None)):
            raise TypeError(f"net must have a method reference(...) with reference='learned', got {type(net).__name__}")
        self.net, self.steps, self.reference = net, steps, reference
        ramp = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        self.betas = (ramp * (1000 / steps)).clamp(max=_BETA_MAX)
        self.process = Discrete(self.betas, lam_min=-math.inf)
        self.alphas_bar = (1 - self.betas).cumprod(0)

    def loss(
        self,
        x: Tensor,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        cond_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``|eps - net|^2``: the mean over a graph's coordinates, frames and points, and then over graphs; a scalar.

        Its gradients go through the reference trajectory, too.

        Args:
            x: trajectories with all their frames, [B, N, 3, T] or [M, 3, T].
            h, edge_index, edge_attr, batch: the graphs.
            cond_mask: bool [T], True at the frames that are given; left out, all but the last ``net.future``.
            generator: of steps, one for each graph, and noise, on x's device.

        Raises:
            ValueError: what does not fit, or is not finite (looked for on the CPU).
        """
        inputs = Inputs(h, edge_index, edge_attr, batch)
        graph, frames, mask = self._look(x, inputs, cond_mask)
        tau = torch.randint(self.steps, (graph.count,), generator=generator, device=x.device)
        start, x0, x_r = self._parts(x, inputs, graph, frames, mask)
        noise = torch.randn(x0.shape, dtype=x.dtype, device=x.device, generator=generator)
        if frames is None:
            noise = _centred(noise, graph)
        t = (tau + 1).to(wide(x.device)) / self.steps
        z, _ = self.process.perturb(x0, graph.rows(t), noise)
        eps = self._noise(z, tau, start, x_r, inputs, graph, frames, mask)
        return graph.average((eps - noise).square().mean((-2, -1)))

    def prior(
        self,
        x_given: Tensor,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        cond_mask: Tensor | None = None,
    ) -> Tensor:
        """The reference trajectory x_r, [..., 3, T_f], that generated frames are drawn around; with gradients.

        Args:
            x_given: the frames that are given, [..., 3, T_c].
            cond_mask: which they are among all; left out, the first, before ``net.future`` others.

        Raises:
            ValueError: no reference, or a network's reference of another number of frames than are to be generated.
        """
        if self.reference is None:
            raise ValueError("reference must not be None where frames are given: there is no prior around them")
        inputs = Inputs(h, edge_index, edge_attr, batch)
        graph, frames, mask = self._conditions(inputs, x_given, cond_mask)
        assert frames is not None
        return self._prior(x_given, inputs, graph, frames, mask)

    def denoiser(
        self,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        x_given: Tensor | None = None,
        cond_mask: Tensor | None = None,
    ) -> Denoiser:
        """The denoiser of ``x - x_r`` in the frames that are generated, as :func:`polyak.generate.sample` takes it.

        The reference is made once, here; add :meth:`prior` to what is sampled. The network's tau is floating point: solvers ask
        between the steps of the chain, too. Rows of the state are graphs, or points where graphs differ in size. Arguments as for
        :meth:`sample`.
        """
        inputs = Inputs(h, edge_index, edge_attr, batch)
        graph, frames, mask = self._conditions(inputs, x_given, cond_mask)
        x_r = None if x_given is None or frames is None else self._prior(x_given, inputs, graph, frames, mask)
        return self._denoiser(inputs, graph, frames, mask, x_given, x_r, whole=False)

    @checks.arguments(
        h=checks.tensor, num_frames=checks.Integer(1) | None, num_samples=checks.Integer(1), solver=SOLVER | None,
        steps=checks.Integer(1, 1_000_000) | None, generator=checks.generator | None,
    )  # fmt: skip
    @torch.no_grad()
    def sample(
        self,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        x_given: Tensor | None = None,
        cond_mask: Tensor | None = None,
        num_frames: int | None = None,
        *,
        num_samples: int = 1,
        solver: Solver | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the frames that are not given: [K, ..., 3, T_f].

        Args:
            h, edge_index, edge_attr, batch: the graphs.
            x_given: the frames that are given, [B, N, 3, T_c] or [M, 3, T_c]; None with ``reference=None``.
            cond_mask: bool [T], which frames these are; left out, the first.
            num_frames: how many to draw, where no mask says it; of conditional ones by default ``net.future``.
            num_samples: K, for each graph, drawn as one batch.
            solver: one of the room's, which may ask at a tau between the chain's steps; None is ancestral sampling with variance
                beta, as in the paper.
            steps: of the solver, down to clean data if it can; by default all S of the chain.
            generator: of all noise, on h's device.

        Raises:
            ValueError: what does not fit, or is not finite.
        """
        inputs = Inputs(h, edge_index, edge_attr, batch)
        graph, frames, mask = self._conditions(inputs, x_given, cond_mask, num_frames)
        if frames is None:
            if num_frames is None:
                raise ValueError("num_frames must say how many frames to draw with reference=None, got None")
            size, like, x_r = num_frames, h if h.is_floating_point() else h.to(torch.get_default_dtype()), None
        else:
            assert x_given is not None
            size, like, x_r = len(frames.future), x_given, self._prior(x_given, inputs, graph, frames, mask)
            x_r = _repeat(x_r, num_samples)
            x_given = _repeat(x_given, num_samples)
        inputs = repeated(inputs, graph, num_samples)
        graph = graph_of(inputs)
        z = standard_normal((*inputs.h.shape[:-1], 3, size), generator=generator, dtype=like.dtype, device=like.device)
        z = z if frames is not None else _centred(z, graph)
        chosen = _Ancestral() if solver is None else solver
        if chosen.reaches_zero:
            times = self.process.grid(self.steps if steps is None else steps, chosen.grid, end=0)
        else:
            times = chosen.times(self.process, steps=self.steps if steps is None else steps)
        whole = solver is None and steps in (None, self.steps)
        denoiser = self._denoiser(inputs, graph, frames, mask, x_given, x_r, whole)
        made = _run(denoiser, z, chosen, times, graph, x_r, generator)
        return made.reshape(num_samples, len(h), *made.shape[1:])

    @checks.arguments(x=checks.floating, step=checks.Integer(1), generator=checks.generator | None)
    @torch.no_grad()
    def refine(
        self,
        x: Tensor,
        step: int,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        cond_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Add noise to a trajectory, as much as after ``step`` steps of the chain, and take it off by as many: [..., 3, T_f].

        The paper's optimization. Without given frames the trajectory's mean over points and frames stays.

        Args:
            x: a trajectory with all frames, [..., 3, T]; those that are given stay.
            step: from 1, which changes little, to S, which is a new sample.
            h, edge_index, edge_attr, batch, cond_mask: as for :meth:`loss`.
            generator: of the noise, on x's device.
        """
        if step > self.steps:
            raise ValueError(f"step must be at most the {self.steps} steps of the chain, got {step}")
        inputs = Inputs(h, edge_index, edge_attr, batch)
        graph, frames, mask = self._look(x, inputs, cond_mask)
        start, x0, x_r = self._parts(x, inputs, graph, frames, mask)
        noise = torch.randn(x0.shape, dtype=x.dtype, device=x.device, generator=generator)
        if frames is None:
            noise, x_r = _centred(noise, graph), x - x0
        z, _ = self.process.perturb(x0, step / self.steps, noise)
        times = self.process.grid(step, "time", start=step / self.steps, end=0)
        denoiser = self._denoiser(inputs, graph, frames, mask, start, x_r, whole=True)
        return _run(denoiser, z, _Ancestral(), times, graph, x_r, generator, centred=frames is None)

    def _look(self, x: Tensor, inputs: Inputs, cond_mask: Any) -> tuple[Graph, Frames | None, Tensor | None]:
        graph = graph_of(inputs, trajectory("x", x).shape[:-2])
        finite("x", x)
        if self.reference is None:
            _unconditional("cond_mask", cond_mask)
            return graph, None, None
        if cond_mask is None:
            cond_mask = self._first(x.shape[-1] - self._future(), self._future())
        return graph, frames_of(cond_mask, x.shape[-1]), cond_mask.cpu()

    def _conditions(
        self, inputs: Inputs, x_given: Any, cond_mask: Any, num_frames: int | None = None
    ) -> tuple[Graph, Frames | None, Tensor | None]:
        if self.reference is None:
            _unconditional("cond_mask", cond_mask)
            _unconditional("x_given", x_given)
            return graph_of(inputs), None, None
        graph = graph_of(inputs, trajectory("x_given", x_given).shape[:-2], "x_given")
        finite("x_given", x_given)
        given = x_given.shape[-1]
        if cond_mask is None:
            cond_mask = self._first(given, self._future() if num_frames is None else num_frames)
        frames = frames_of(cond_mask)
        if len(frames.given) != given:
            raise ValueError(f"cond_mask must be True at the {given} frames of x_given, got {len(frames.given)}")
        if num_frames not in (None, len(frames.future)):
            raise ValueError(f"num_frames must be the {len(frames.future)} frames that are not given, got {num_frames}")
        return graph, frames, cond_mask.cpu()  # on the CPU, where no device is waited for to read it

    def _future(self) -> int:
        return getattr(self.net, "future", 0)

    @staticmethod
    def _first(given: int, future: int) -> Tensor:
        """The mask where none is given."""
        if given < 1 or future < 1:
            raise ValueError(f"cond_mask must say which frames are given: {given} before net.future={future} cannot be")
        return torch.arange(given + future) < given

    def _parts(
        self, x: Tensor, inputs: Inputs, graph: Graph, frames: Frames | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The frames that are given, what noise is added to, and the reference that was taken off it."""
        if frames is None:
            return None, _centred(x, graph), None
        x_given = pick(x, frames.given)
        x_r = self._prior(x_given, inputs, graph, frames, mask)
        return x_given, pick(x, frames.future) - x_r, x_r

    def _prior(self, x_given: Tensor, inputs: Inputs, graph: Graph, frames: Frames, mask: Tensor | None) -> Tensor:
        shape = (*x_given.shape[:-1], len(frames.future))
        if self.reference == "last":
            return x_given[..., -1:].expand(shape)
        if self.reference == "com":
            return graph.centre(x_given.mean(-1, keepdim=True)).expand(shape)
        x_r = self.net.reference(x_given, *inputs, mask)  # type: ignore[operator]
        if x_r.shape != shape:
            raise ValueError(
                f"cond_mask must leave the {x_r.shape[-1]} frames of net.reference (its future), got {shape[-1]}"
            )
        return x_r

    def _noise(
        self, z: Tensor, tau: Tensor, x_given: Tensor | None, x_r: Tensor | None, inputs: Inputs, graph: Graph,
        frames: Frames | None, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The network's noise in z, which is ``x - x_r`` with noise."""
        if frames is None:
            return _centred(self.net(_centred(z, graph), tau, *inputs, None), graph)
        assert x_given is not None and x_r is not None  # noqa: PT018
        return self.net(frames.join(x_given, z + x_r), tau, *inputs, mask)

    def _denoiser(
        self, inputs: Inputs, graph: Graph, frames: Frames | None, mask: Tensor | None, x_given: Tensor | None,
        x_r: Tensor | None, whole: bool,
    ) -> Denoiser:  # fmt: skip
        def network(z: Tensor, label: Tensor) -> Tensor:
            tau = graph.of_graphs(label)
            return self._noise(z, tau.round().long() if whole else tau, x_given, x_r, inputs, graph, frames, mask)

        return Denoiser(network, self.process)


def _run(
    denoiser: Denoiser, z: Tensor, solver: Solver, times: Tensor, graph: Graph, x_r: Tensor | None,
    generator: torch.Generator | None, centred: bool | None = None,
) -> Tensor:  # fmt: skip
    """A sample of x from one of z at the first time."""

    def centre(step: Step) -> None:
        step.x = _centred(step.x, graph)  # a solver's noise is not

    stays = x_r is None if centred is None else centred
    x = sample(denoiser, z, solver=solver, grid=times, generator=generator, callback=centre if stays else None)
    return x if x_r is None else x + x_r


def _centred(x: Tensor, graph: Graph) -> Tensor:
    """x less its mean over a graph's points and frames."""
    return x - graph.centre(x.mean(-1, keepdim=True))


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *[1] * (x.ndim - 1))


def _unconditional(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(
            f"{name} must be None with reference=None, which generates all frames, got {checks.shown(value)}"
        )
