"""Teachers: weights that follow other weights, such as averages and combinations of a model's checkpoints.

>>> from polyak.teachers import LCSC, sample_metric
>>> search = LCSC("checkpoints/", model=model, objective=sample_metric(sampler, metric, n=2000, seed=0))
>>> result = search.run()
>>> search.apply_(model, result.coefficients)
"""

from polyak.teachers.lcsc import (
    LCSC,
    CheckpointBank,
    CheckpointSaver,
    Result,
    combine,
    ema_coefficients,
    landscape,
    metric_to,
    sample_metric,
)

__all__ = [
    "LCSC",
    "CheckpointBank",
    "CheckpointSaver",
    "Result",
    "combine",
    "ema_coefficients",
    "landscape",
    "metric_to",
    "sample_metric",
]
