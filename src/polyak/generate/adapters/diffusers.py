"""Our solvers as diffusers schedulers.

    pipe = DiffusionPipeline.from_pretrained(...)
    solver = DPMSolver(order=2, form="data", method="multistep")
    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=solver)

:class:`PolyakScheduler` answers a solver's questions with what the pipeline's model says: the same coroutine that
:func:`polyak.generate.sampling.sample` runs, hence the same numbers.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("polyak.generate.adapters.diffusers needs diffusers: pip install 'polyak[diffusers]'") from error

import itertools

from polyak.core import checks
from polyak.generate.linear import rehearse
from polyak.generate.prediction import Prediction, check_kind, edm_input_scaling, edm_label
from polyak.generate.process import EDM, Discrete, Flow, Process, expand
from polyak.generate.sampling import HALF, DynamicThresholding
from polyak.generate.solver import Query, Run, Solver

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("linspace", "leading", "trailing")


@dataclass
class PolyakSchedulerOutput(BaseOutput):
    """What a step gives: the next point to ask the model at, and the clean data predicted at the last one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PolyakScheduler(SchedulerMixin, ConfigMixin):
    """A solver of this room in the place of a diffusers scheduler.

    Options that diffusers' schedulers know have their meaning there; those of another scheduler's configuration that are not
    listed here are kept, and have no effect. There is one timestep per evaluation: solvers of several stages ask at inner
    points, or at some twice. The model's outputs are not looked at (no NaN check), so that a step never waits for the GPU; a
    run that starts somewhere in the middle without ``set_begin_index`` does so once.

    Args:
        solver: not adaptive.
        process: left out, made from the options below: a chain of ``num_train_timesteps`` betas, or a flow.
        prediction_type: "epsilon", "sample", "v_prediction", "flow_prediction", "score" or "edm".
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the chain.
        use_flow_sigmas, flow_shift, use_dynamic_shifting: a flow, ``sigma = shift t / (1 + (shift - 1) t)``; with dynamic
            shifting, ``shift = exp(mu)`` from ``set_timesteps``.
        timestep_spacing, steps_offset: which of the chain's timesteps are used, unless ``grid`` is given.
        use_karras_sigmas, use_lu_lambdas: the same as ``grid="karras"`` and ``grid="logsnr"``.
        grid: a kind of time grid of :meth:`Process.grid`, from t_max to t_min; timesteps then need not be integers.
        final_sigmas_type: "zero": the last step ends on clean data; "sigma_min": on the lowest noise of the chain. Default:
            "zero" for solvers that can.
        thresholding, dynamic_thresholding_ratio: :class:`DynamicThresholding`; pixel models only.
        variance_type: "learned" or "learned_range": the model's output has a second half, which is ignored.
        sigma_data: for "edm".

    Raises:
        ValueError: no solver, an adaptive one, unknown options.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 - diffusers' own convention
    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        solver: Solver | dict[str, Any] | None = None,
        process: Process | dict[str, Any] | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        grid: str | None = None,
        final_sigmas_type: str | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        variance_type: str | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        if solver is None:
            raise ValueError("solver is needed: PolyakScheduler.from_config(config, solver=DPMSolver(...))")
        self.solver = _load(solver, Solver)
        if self.solver.adaptive:
            raise ValueError(f"diffusers needs the timesteps beforehand; an adaptive solver has none: {self.solver!r}")
        self.kind = check_kind("prediction_type", prediction_type)
        checks.one_of("timestep_spacing", timestep_spacing, SPACINGS)
        checks.one_of("final_sigmas_type", final_sigmas_type, (None, "zero", "sigma_min"))
        self.process: Process
        if process is not None:
            self.process = _load(process, Process)
        elif use_flow_sigmas:
            self.process = Flow(label_scale=float(num_train_timesteps))
        else:
            if trained_betas is None:
                betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule)
            else:
                betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            self.process = _chain(betas, rescale_betas_zero_snr)
        if self.solver.needs_gaussian and not self.process.is_gaussian:
            raise ValueError(f"{self.solver!r} needs Gaussian noise, which {self.process!r} has not")
        self.corrector = DynamicThresholding(dynamic_thresholding_ratio) if thresholding else None
        if self.corrector is not None and self.solver.no_corrector:
            raise ValueError(f"thresholding cannot be used: {self.solver.no_corrector}")
        saved: dict[str, Any] = {"solver": _dump(self.solver)}
        if isinstance(self.process, Discrete) and process is not None:
            betas = (1 - torch.exp(2 * torch.diff(self.process._table))).tolist()
            saved |= {"process": None, "trained_betas": betas, "num_train_timesteps": len(betas)}
        elif process is not None:
            saved["process"] = _dump(self.process)
        defaults = [k for k in self.config.get("_use_default_values", []) if k not in saved]
        self.register_to_config(**saved, _use_default_values=defaults)
        self.init_noise_sigma = self.process.prior_std
        self.num_inference_steps: int | None = None
        self._times: list[float] = []
        self._queries: list[Query] = []
        self.timesteps = self._labels([self.process.t_max, self.process.t_min], None)
        self.sigmas = torch.tensor([])
        self._reset()

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the configuration of any diffusers scheduler: ``PolyakScheduler.from_config(config, solver=...)``."""
        if isinstance(config, dict) and "shift" in config and "beta_start" not in config:  # FlowMatch*Scheduler
            config = dict(config)
            flow = {"prediction_type": "flow", "use_flow_sigmas": True, "flow_shift": config.pop("shift")}
            kwargs = {**flow, **kwargs}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # --- the plan

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a run.

        Args:
            num_inference_steps: steps (evaluations, for "fast" and "singlestep" DPM-Solvers); or
            timesteps: what the model is to be told at each step, decreasing; or
            sigmas: the noise levels of each step (``sigma / alpha``, or a flow's t before its shift), decreasing.
            device: of ``scheduler.timesteps``.
            mu: log of the shift, for flows with dynamic shifting.
        """
        if sum(v is not None for v in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        if sigmas is not None:
            times = self._ended([self._time_of_sigma(float(s), mu) for s in sigmas])
        elif timesteps is not None:
            times = self._ended([self._time_of_label(float(v)) for v in timesteps])
        else:
            n = checks.integer("num_inference_steps", num_inference_steps, least=1)
            times = self._spaced(n, mu)
        self._times = self.process.check_times(times)
        self._queries = rehearse(self.solver, self._times, self.process)
        asked = [q.t for q in self._queries]
        steps = len(self._times) - 1
        self.num_inference_steps = steps
        self.order = math.ceil(len(asked) / steps)
        self.timesteps = self._labels(asked, device)
        level = self.process.sigma if isinstance(self.process, Flow) else self.process.sigma_hat
        self.sigmas = torch.tensor([level(t) for t in [*asked, self._times[-1]]], dtype=torch.float32)
        self._reset()

    def _spaced(self, n: int, mu: float | None) -> list[float]:
        config = self.config
        kind = config["grid"] or ("karras" if config["use_karras_sigmas"] else None)
        kind = kind or ("logsnr" if config["use_lu_lambdas"] else None)
        if isinstance(self.process, Flow) and kind is None:
            lowest = 1 / config["num_train_timesteps"]
            if not config["use_dynamic_shifting"]:
                lowest = self._shifted(lowest, None)  # shifted once more below: as diffusers' pipelines do
            raw = [1 + (lowest - 1) * i / max(n - 1, 1) for i in range(n)]
            return self._ended([self._shifted(t, mu) for t in raw])
        if not isinstance(self.process, Discrete) or kind is not None:
            return self.solver.times(self.process, steps=n, grid=kind).tolist()
        last = round(self.process.t_max * self.process.n)
        if config["timestep_spacing"] == "linspace":
            raw = [(last - 1) * (n - i) / n for i in range(n)]
        elif config["timestep_spacing"] == "leading":
            raw = [float(last // (n + 1) * (n - i) + config["steps_offset"]) for i in range(n)]
        else:
            raw = [last - self.process.n / n * i - 1 for i in range(n)]
        rounded = [float(round(v)) for v in raw]
        distinct = all(a > b for a, b in itertools.pairwise(rounded))
        labels = rounded if distinct else raw  # more steps than integers: the process knows the times between
        return self._ended([(v + 1) / self.process.n for v in labels])

    def _ended(self, times: list[float]) -> list[float]:
        if times and self.process.sigma(times[-1]) == 0:
            return times
        zero = self.config["final_sigmas_type"] == "zero"
        if self.config["final_sigmas_type"] is None:
            zero = self.solver.reaches_zero
        return [*times, 0.0 if zero else self.process.t_min]

    def _shifted(self, t: float, mu: float | None) -> float:
        if self.config["use_dynamic_shifting"] and mu is None:
            raise ValueError("mu is needed: the configuration asks for dynamic shifting")
        shift = self.config["flow_shift"] if mu is None else math.exp(mu)
        return shift * t / (1 + (shift - 1) * t)

    def _time_of_sigma(self, sigma: float, mu: float | None) -> float:
        if isinstance(self.process, Flow):
            return self._shifted(sigma, mu)
        return self._snapped(self.process.t_of_lam(-math.log(sigma))) if sigma else 0.0

    def _time_of_label(self, label: float) -> float:
        return self._snapped(
            self.process.t_of_lam(-4 * label) if self.kind == "edm" else self.process.t_of_label(label)
        )

    def _snapped(self, t: float) -> float:
        """An end of the range, or a point of the chain, which single precision has missed by a little."""
        points = [self.process.t_min, self.process.t_max]
        if isinstance(self.process, Discrete):
            points.append(round(t * self.process.n) / self.process.n)
        return next((p for p in points if abs(t - p) <= 1e-6 * p), t)

    def _labels(self, times: list[float], device: str | torch.device | None) -> Tensor:
        if self.kind == "edm":
            labels = [edm_label(self.process.sigma_hat(t)) for t in times]
        else:
            labels = [self.process.label(t) for t in times]
        table = torch.tensor(labels, dtype=torch.float64)
        whole = table.round()
        if isinstance(self.process, Discrete) and bool(((table - whole).abs() < 1e-6).all()):
            return whole.to(device=device, dtype=torch.int64)
        return table.to(device=device, dtype=torch.float32)

    # --- the run

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None
        self._pending: Query | None = None
        self._returned: Tensor | None = None
        self._exact: Tensor | None = None

    @property
    def step_index(self) -> int | None:
        """How many evaluations are done, counted from the first timestep."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first timestep of the run."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (image-to-image pipelines); it must be the first evaluation of a step."""
        self._begin_index = checks.integer("begin_index", begin_index, least=0)

    def _start_index(self, timestep: Any) -> int:
        if self._begin_index is not None:
            return self._begin_index
        wanted, tolerance = float(timestep), 1e-4 if self.timesteps.is_floating_point() else 0.0
        for i, (label, query) in enumerate(zip(self.timesteps.tolist(), self._queries, strict=True)):
            if query.first and abs(label - wanted) <= tolerance * max(1.0, abs(label)):
                return i
        raise ValueError(f"timestep {wanted:g} is not the start of a step; the timesteps are {self.timesteps.tolist()}")

    def _begin(self, timestep: Any, sample: Tensor, generator: Any) -> None:
        if not self._times:
            raise ValueError("call set_timesteps before the first step")
        index = self._start_index(timestep)
        rest = [q.t for q in self._queries[index:]]
        if not rest or not self._queries[index].first:
            raise ValueError(f"begin_index must be the first evaluation of a step, got {index}")
        times = self._times[self._times.index(rest[0]) :]
        if index and [q.t for q in rehearse(self.solver, times, self.process)] != rest:
            raise ValueError(f"{self.solver!r} cannot start at timestep {index}: it would ask at other times")
        self._step_index = index
        self._run = self.solver.run(sample, times, self.process, generator=generator)
        self._pending = next(self._run)  # type: ignore[assignment]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as the model wants it: scaled for preconditioned ("edm") networks, and for eps networks under EDM."""
        if self.kind != "edm" and not isinstance(self.process, EDM):
            return sample
        index = self._start_index(timestep) if self._step_index is None else self._step_index
        t = self._queries[index].t
        sd = self.config["sigma_data"] if self.kind == "edm" else 1.0
        return sample * (edm_input_scaling(self.process.sigma_hat(t), sd) / self.process.alpha(t))

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> PolyakSchedulerOutput | tuple[Tensor]:
        """Take the model's output at the point that the last step returned; give the next point, or the result.

        Args:
            model_output: shape (B, C, ...), twice the channels with a learned variance.
            timestep: one of ``timesteps``; looked at only where the run starts without ``set_begin_index``.
            sample: the point. If it is not the tensor that the last step returned (a callback or an inpainting mask
                changed it), the solver goes on from it.
            generator: of a stochastic solver's noise; that of the first step counts.
            return_dict: give a :class:`PolyakSchedulerOutput`, else the tuple ``(prev_sample,)``.
            eta, use_clipped_model_output: what DDIM's pipelines pass; only their defaults, since both are the solver's own.

        Raises:
            ValueError: before ``set_timesteps``, after the last step, or for another ``eta``.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"eta must be 0 and use_clipped_model_output unset, got {eta} and {use_clipped_model_output}: noise is the "
                "solver's own, as in DDIM(eta=...)"
            )
        exact = self._exact if sample is self._returned and self._exact is not None else sample
        if exact.dtype in HALF:
            exact = exact.float()
        if self._run is None:
            self._begin(timestep, exact, generator)
        if self._pending is None:
            raise ValueError("the run is complete; call set_timesteps before the next one")
        assert self._run is not None
        assert self._step_index is not None
        if self.config["variance_type"] in ("learned", "learned_range"):
            model_output = model_output.chunk(2, dim=1)[0]
        prediction = Prediction(
            model_output.to(exact.dtype),
            exact,
            self._pending.t,
            self.process,
            self.kind,
            sigma_data=self.config["sigma_data"],
        )
        if self.corrector is not None:
            prediction = prediction.replace(self.corrector(prediction.x0, self._pending.t), "sample")
        try:
            event = self._run.send(prediction)
            while not isinstance(event, Query):
                event = self._run.send(None)
            self._pending, self._exact = event, event.x
        except StopIteration as stop:
            self._pending, self._exact = None, stop.value
        assert self._exact is not None
        self._step_index += 1
        self._returned = self._exact.to(sample.dtype)
        if not return_dict:
            return (self._returned,)
        return PolyakSchedulerOutput(self._returned, prediction.x0.to(sample.dtype))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x0 + sigma noise`` at the given timesteps, shape (B,) or one for all."""
        labels = timesteps.to(torch.float64)
        t = self.process.t_of_lam(-4 * labels) if self.kind == "edm" else self.process.t_of_label(labels)
        if t.ndim and len(t) != len(original_samples):
            t = t.expand(len(original_samples))
        return expand(self.process.alpha(t), original_samples) * original_samples + (
            expand(self.process.sigma(t), noise) * noise
        )


def as_diffusers(solver: Solver, process: Process, prediction_type: str = "epsilon", **options: Any) -> PolyakScheduler:
    """A diffusers scheduler for a solver and a process; ``options`` are those of :class:`PolyakScheduler`."""
    return PolyakScheduler(solver=solver, process=process, prediction_type=prediction_type, **options)


def _betas(n: int, start: float, end: float, schedule: str) -> Tensor:
    checks.integer("num_train_timesteps", n, least=2)
    checks.one_of("beta_schedule", schedule, BETAS)
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    angle = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2
    alpha_bar = torch.cos(angle) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _chain(betas: Tensor, zero_snr: bool) -> Discrete:
    """All points are kept, as diffusers keeps them, whatever their lam."""
    alphas = torch.cumprod(1 - betas, 0)
    if zero_snr:  # Lin et al., arXiv 2305.08891, algorithm 1; the last one is not quite 0, as in diffusers
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas[-1] = 2.0**-24
    return Discrete(alphas_cumprod=alphas, lam_min=-math.inf)


def _dump(part: Any) -> dict[str, Any]:
    """A solver or process as what JSON can hold: its class, and its fields."""
    home, _, module = type(part).__module__.partition("polyak.generate.")
    if home or not module:
        raise ValueError(f"only parts of polyak.generate can be saved, got {part!r}")
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else {}
    return {"part": f"{module.split('.')[0]}:{type(part).__name__}", **fields}


def _load(given: Any, kind: type) -> Any:
    """A solver or process from itself or from what :func:`_dump` made of it; nothing outside this room is ever loaded."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, dict) or "part" not in given:
        raise ValueError(f"{kind.__name__.lower()} must be a {kind.__name__}, got {given!r}")
    module, _, name = given["part"].partition(":")
    found = getattr(importlib.import_module(f"polyak.generate.{module}"), name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"no {kind.__name__} is called {given['part']!r}")
    return found(**{k: v for k, v in given.items() if k != "part"})
