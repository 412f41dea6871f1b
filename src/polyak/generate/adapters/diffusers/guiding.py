"""A guidance of polyak in a pipeline: in place of the one inside it, or as the guider of a modular pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler
from polyak.generate.apg import APG, MOMENTUM, SCALE
from polyak.generate.evaluate import GUIDANCE, HALF
from polyak.generate.guidance import Guidance

NETWORKS = ("unet", "transformer", "transformer_2")
_PIPE = checks.Like("a pipeline (it has a scheduler)", "scheduler")


class Guided:
    """What :func:`guide` did to a pipeline; :meth:`remove` undoes it, as does leaving a ``with`` block."""

    @checks.arguments(pipe=_PIPE, guidance=GUIDANCE, networks=checks.Each(checks.module))
    def __init__(self, pipe: Any, guidance: Guidance, networks: Sequence[torch.nn.Module]) -> None:
        self.pipe, self.guidance = pipe, guidance
        self._handles = [network.register_forward_hook(self._heard) for network in networks]

    def _heard(self, network: Any, args: Any, output: Any) -> None:
        self._scheduler().hear(output if isinstance(output, Tensor) else output[0], self.guidance)

    def _scheduler(self) -> PolyakScheduler:
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, PolyakScheduler):
            raise ValueError(
                f"{self.guidance!r} needs a PolyakScheduler, got {type(scheduler).__name__}: pipe.scheduler = "
                "PolyakScheduler.from_config(pipe.scheduler.config, solver=...)"
            )
        return scheduler

    def remove(self) -> None:
        """The pipeline guides as it did before."""
        for handle in self._handles:
            handle.remove()
        if isinstance(self.pipe.scheduler, PolyakScheduler):
            self.pipe.scheduler.deafen()

    def __enter__(self) -> Guided:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


@checks.arguments(
    pipe=checks.Like("a pipeline (it has a scheduler)", "scheduler"),
    guidance=GUIDANCE,
    networks=checks.Each(checks.text, least=1),
)
def guide(pipe: Any, guidance: Guidance, *, networks: Sequence[str] = NETWORKS) -> Guided:
    """Let a guidance combine a pipeline's two predictions, in place of the classifier-free guidance inside it.

        pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=DPMSolverMultistep())
        guide(pipe, APG(scale=12, norm_threshold=15, momentum=-0.5))

    Nothing of the pipeline is changed: a hook hears what its network says, and the scheduler guides by that, knowing the state,
    its time and the process. The pipeline's own ``guidance_scale`` has to be above 1, for it to ask for both predictions, and its
    value has no further effect.

    Args:
        pipe: any that asks for a prediction with and one without the condition (in one batch or two calls) before it steps, and
            combines them to ``u + w (c - u)``. Its scheduler is a PolyakScheduler when it runs.
        guidance: APG, or any other.
        networks: attributes of the pipeline that may hold the network; those that it has are heard.

    Raises:
        ValueError: no such network; when the pipeline runs, another scheduler, or a pipeline that does otherwise.
    """
    found = [n for n in (getattr(pipe, name, None) for name in networks) if isinstance(n, torch.nn.Module)]
    if not found:
        raise ValueError(f"networks must name a module of the pipeline, got {', '.join(networks)}")
    return Guided(pipe, guidance, found)


class Guider(BaseGuidance):
    """What guiders of modular pipelines share: a guidance, its state, and the point and time that predictions are of.

    A pipeline tells its guider nothing but the network's outputs. Where data are guided, not outputs, the guider asks the scheduler
    for time and process, and takes the state from what the network is given.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 - diffusers' own convention
    ignore_for_config = ["scheduler"]  # noqa: RUF012
    missing = "pred_uncond is missing: guidance needs both predictions"
    otherwise = ""

    def _hold(self, guidance: Any, scheduler: PolyakScheduler | None, *, of_data: bool = True) -> None:
        self.guidance, self.scheduler, self._of_data = guidance, scheduler, of_data
        self._state: Any = None
        self._latents: Tensor | None = None
        self._seen: Tensor | None = None
        self._offset: int | None = None
        self._handle: Any = None

    def new(self, **kwargs: Any) -> Any:
        """A copy of the guider, with other options where given."""
        return self.from_config(self.config, **{"scheduler": self.scheduler, **kwargs})

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """From the configuration of such a guider, or of one of diffusers, which means here what it means there.

        Raises:
            ValueError: options that are unknown, unless ``return_unused_kwargs``.
        """
        if not isinstance(config, Mapping):
            config = cls.load_config(config)
        given = {k: v for k, v in config.items() if not k.startswith("_")} | kwargs
        known = inspect.signature(cls.__init__).parameters
        unused = {k: given.pop(k) for k in list(given) if k not in known}
        if unused and not return_unused_kwargs:
            raise ValueError(f"config has options that {cls.__name__} does not know: {', '.join(sorted(unused))}")
        made = cls(**given)
        return (made, unused) if return_unused_kwargs else made

    # --- what a pipeline calls, in this order

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """A step begins; the first one, or one before the last one, begins a run."""
        if step == 0 or self._state is None or self._step is None or step < self._step:
            self._state, self._offset = self.guidance.init(), None
        self._latents = self._seen = None
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[Any]:
        """The network's inputs with and without the condition; "latents" among them are the state, if the network sees another."""
        latents = data.get("latents")
        self._latents = latents[0] if isinstance(latents, tuple) else latents
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]  # type: ignore[arg-type]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, from a pipeline's state."""
        self._latents = getattr(data, "latents", None)
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        self.cleanup_models(denoiser)  # where the network failed the last time
        super().prepare_models(denoiser)
        if self._of_data:
            self._handle = denoiser.register_forward_pre_hook(self._sees, with_kwargs=True)

    def _sees(self, network: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self._seen = given if isinstance(given, Tensor) else None

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided output, in pred_cond's dialect and dtype.

        Raises:
            ValueError: no ``pred_uncond``; where data are guided, no state, or a scheduler that does not step with the pipeline.
        """
        if not self._guides:
            pred = pred_cond
        elif pred_uncond is None:
            raise ValueError(self.missing)
        else:
            state = self._state = self._state or self.guidance.init()
            if self._of_data:
                pred = self._as_data(pred_cond, pred_uncond, state)
            else:
                pred = self.guidance.combine(pred_cond, pred_uncond, state, update=self._asked()[2])
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _as_data(self, cond: Tensor, uncond: Tensor, state: Any) -> Tensor:
        assert self.scheduler is not None
        _, t, first, scale = self._asked()
        x = self._point(cond, scale)
        c, u = (self.scheduler.read(p.float() if p.dtype in HALF else p, x, t) for p in (cond, uncond))
        guided = self.guidance(c, u, state, update=first)
        if guided.kind == c.kind:
            return guided.output.to(cond.dtype)
        a, b = c.weights("x0")
        return torch.add(guided.output, x, alpha=-a).mul_(1 / b).to(cond.dtype)

    def _asked(self) -> tuple[int, float, bool, float]:
        if self.scheduler is None:
            return 0, 0.0, True, 1.0
        asked = self.scheduler.asks(self._timestep)
        step = self._step or 0
        if self._offset is None:
            self._offset = asked[0] - step
        if asked[0] - step != self._offset:
            raise ValueError(
                f"scheduler is at evaluation {asked[0] - self._offset} in step {step} of the pipeline: give the guider the "
                "scheduler that the pipeline has"
            )
        return asked

    def _point(self, pred: Tensor, scale: float) -> Tensor:
        """The state, as it was handed over, or as the network saw it: there it may be scaled, and other channels behind it."""
        x = self._latents
        if x is None or x.shape != pred.shape:
            x = self._seen
            if x is None or x.ndim != pred.ndim or any(m < n for m, n in zip(x.shape, pred.shape, strict=True)):
                raise ValueError(
                    "guidance of data needs the latents, and the network was not seen to be given any: hand them to "
                    f'prepare_inputs as "latents"{self.otherwise}'
                )
            for dim, size in enumerate(pred.shape):
                x = x.narrow(dim, 0, size)
            x = x / scale if scale != 1 else x
        return x.float() if x.dtype in HALF else x

    @property
    def _guides(self) -> bool:
        if not (self._enabled and self.guidance.paired):
            return False
        if self._num_inference_steps is None or self._step is None:
            return True
        first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < end

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._guides else 1


class APGGuider(Guider):
    """Adaptive projected guidance as the guider of a modular pipeline.

        pipe.update_components(scheduler=PolyakScheduler.from_config(pipe.scheduler.config, solver=DPMSolverMultistep()))
        pipe.update_components(guider=APGGuider(12, norm_threshold=15, momentum=-0.5, scheduler=pipe.scheduler))

    A pipeline tells its guider nothing but the network's outputs. With ``space="x0"`` the guider asks the scheduler for time and
    process, and takes the state from what the network is given.

    Args:
        guidance_scale, eta, norm_threshold, momentum, base, space, start, stop: as of :class:`polyak.generate.APG`.
        guidance_rescale: APG's ``rescale``.
        enabled: whether it guides.
        scheduler: the pipeline's, a PolyakScheduler; needed with ``space="x0"``.
        adaptive_projected_guidance_momentum, adaptive_projected_guidance_rescale: diffusers' names of momentum and norm_threshold.
        adaptive_projected_guidance_norm_dim: only None: norms are of whole samples.
        use_original_formulation: diffusers' name of base. False is "uncond"; True is "cond", of a scale that counts from 0: w is
            guidance_scale + 1.

    Raises:
        ValueError: ``space="x0"`` without a PolyakScheduler; an option that is given by two names.
    """

    missing = "pred_uncond is missing: APG needs both predictions; use guidance_scale=1 for none"
    otherwise = ', or use space="pred"'

    @register_to_config
    @checks.arguments(
        guidance_scale=SCALE, eta=checks.fraction, norm_threshold=checks.real, momentum=MOMENTUM | None,
        base=checks.Choice("cond", "uncond"), space=checks.Choice("x0", "pred"), guidance_rescale=checks.fraction,
        start=checks.Number(0, 1, "[)"), stop=checks.fraction, enabled=checks.flag,
        scheduler=checks.Instance(PolyakScheduler, words="a PolyakScheduler") | None,
        adaptive_projected_guidance_momentum=MOMENTUM | None, adaptive_projected_guidance_rescale=checks.real | None,
        adaptive_projected_guidance_norm_dim=checks.Choice(None), use_original_formulation=checks.optional_flag,
    )  # fmt: skip
    def __init__(
        self,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        norm_threshold: float = 0.0,
        momentum: float | None = None,
        base: str = "cond",
        space: str = "x0",
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scheduler: PolyakScheduler | None = None,
        adaptive_projected_guidance_momentum: float | None = None,
        adaptive_projected_guidance_rescale: float | None = None,
        adaptive_projected_guidance_norm_dim: None = None,
        use_original_formulation: bool | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        if space == "x0" and scheduler is None:
            raise ValueError(
                'space="x0" needs scheduler=pipe.scheduler, a PolyakScheduler, which knows the time and the process; '
                'space="pred" guides the network\'s output as it is'
            )
        given = momentum, adaptive_projected_guidance_momentum
        momentum = _one("momentum", *given, None)
        r = _one("norm_threshold", norm_threshold, adaptive_projected_guidance_rescale, 0.0)
        if use_original_formulation is not None:
            base = "cond" if use_original_formulation else "uncond"
        scale = guidance_scale + bool(use_original_formulation)
        guidance = APG(scale, eta, r, momentum, base, space, rescale=guidance_rescale)
        self._hold(guidance, scheduler, of_data=space == "x0")


def _one(name: str, value: Any, alias: Any, default: Any) -> Any:
    if alias is None:
        return value
    if value != default and value != alias:
        raise ValueError(f"{name} is given twice, as {value!r} and by diffusers' name as {alias!r}")
    return alias
