"""Weighted particles: log-weights, resampling, gathering and genealogies, for any number of independent systems at once.

Log-weights have shape ``(*batch, N)``: every leading dimension is an independent system, particles are last. States have shape
``(*batch, N, *event)``, or are a pytree of such tensors. Weights and their sums are float64 whatever the states are.

    cloud = Cloud.uniform(x, (systems, N))
    cloud = cloud.reweight(log_g)
    cloud, ancestors, did = cloud.maybe_resample(0.5, generator=generator)

Nothing here waits for a GPU: adaptive resampling has no branch, and log-weights are looked at (NaN, collapse) on the CPU, or where
``check=True`` asks for it.
"""

from polyak.core.particles.ancestry import counts, gather
from polyak.core.particles.cloud import Cloud
from polyak.core.particles.conditional import resample_conditional
from polyak.core.particles.genealogy import Genealogy
from polyak.core.particles.resampling import SCHEMES, resample
from polyak.core.particles.weights import cess, ess, normalize

__all__ = [
    "SCHEMES",
    "Cloud",
    "Genealogy",
    "cess",
    "counts",
    "ess",
    "gather",
    "normalize",
    "resample",
    "resample_conditional",
]
