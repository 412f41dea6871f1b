"""Precision-weighted guidance as the guider of a modular pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers.guiding import Guider
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler
from polyak.generate.cogdpm.guidance import MISSING, PrecisionGuidance


class PrecisionGuider(Guider):
    """:class:`polyak.generate.PrecisionGuidance` as the guider of a modular pipeline.

        pipe.update_components(scheduler=PolyakScheduler.from_config(pipe.scheduler.config, solver=DPMSolverMultistep()))
        guider = PrecisionGuider(2.0, members=8, scheduler=pipe.scheduler)  # eight images of each prompt are one forecast
        pipe.update_components(guider=guider)
        pipe(...)
        guider.precision

    Args:
        guidance_scale: 1 + w, as classifier-free guidance counts it; 1 is the conditional output, and makes no map.
        scheduler: the pipeline's, a PolyakScheduler, which knows the time and the process.
        window, pool, quantile, clip, smooth, precision_start, members: as of PrecisionGuidance, with its ``start`` in steps.
        start, stop, enabled: the share of steps that guide; the map is of these.

    Raises:
        ValueError: no PolyakScheduler.
    """

    missing = f"pred_uncond is missing: {MISSING}; use guidance_scale=1 for none"

    @register_to_config
    @checks.arguments(
        guidance_scale=checks.Number(1, 1e30), scheduler=checks.Instance(PolyakScheduler, words="a PolyakScheduler") | None,
        window=checks.Integer(2) | None, pool=checks.Choice("ensemble", "member"), quantile=checks.fraction,
        clip=checks.Each(checks.non_negative, count=2), smooth=checks.Number(0, 1000), precision_start=checks.Integer(0),
        members=checks.Integer(1) | None, start=checks.Number(0, 1, "[)"), stop=checks.fraction, enabled=checks.flag,
    )  # fmt: skip
    def __init__(
        self,
        guidance_scale: float = 2.0,
        scheduler: PolyakScheduler | None = None,
        window: int | None = None,
        pool: str = "ensemble",
        quantile: float = 1.0,
        clip: Sequence[float] = (0.0, 1.0),
        smooth: float = 0.0,
        precision_start: int = 1,
        members: int | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if scheduler is None:
            raise ValueError("scheduler is needed: pipe.scheduler, a PolyakScheduler, which knows time and process")
        low, high = clip
        guidance = PrecisionGuidance(
            guidance_scale - 1, window, pool, quantile, (low, high), smooth, precision_start, members
        )
        self._hold(guidance, scheduler)

    @property
    def uncertainty(self) -> Tensor | None:
        """U of the last run, of the latents' shape; None before the first."""
        return None if self._state is None else self._state.uncertainty

    @property
    def precision(self) -> Tensor | None:
        """``1 / (U + 1e-6)`` of the last run."""
        return None if self._state is None else self._state.precision
