"""polyak's solvers as schedulers of diffusers, and its guidance in its pipelines.

    pipe = DiffusionPipeline.from_pretrained(...)
    solver = DPMSolver(order=2, form="data", method="multistep")
    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=solver)
    guide(pipe, APG(scale=12, norm_threshold=15, momentum=-0.5))

:class:`PolyakScheduler` answers a solver's questions with what the pipeline's model says: the same coroutine that
:func:`polyak.generate.sampling.sample` runs, hence the same numbers. :func:`guide` lets a guidance take the place of the one inside
a pipeline, :func:`fk_callback` steers one by a reward. :class:`APGGuider` and :class:`PrecisionGuider` are for pipelines that have
a place for one.
"""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("polyak.generate.adapters.diffusers needs diffusers: pip install 'polyak[diffusers]'") from error

from polyak.generate.adapters.diffusers.flow_sde import FlowSDEScheduler
from polyak.generate.adapters.diffusers.ghvb import GHVBScheduler, HeavyBallScheduler
from polyak.generate.adapters.diffusers.guiding import APGGuider, Guided, guide
from polyak.generate.adapters.diffusers.precision import PrecisionGuider
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler, PolyakSchedulerOutput, as_diffusers
from polyak.generate.adapters.diffusers.steering import FKCallback, fk_callback

__all__ = [
    "APGGuider",
    "FKCallback",
    "FlowSDEScheduler",
    "GHVBScheduler",
    "Guided",
    "HeavyBallScheduler",
    "PolyakScheduler",
    "PolyakSchedulerOutput",
    "PrecisionGuider",
    "as_diffusers",
    "fk_callback",
    "guide",
]
