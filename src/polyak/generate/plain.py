"""The fast sampling loop: for linear solvers, where nothing guides, corrects, steers or watches the run.

All weights and labels are known before the first evaluation: a step is the network and one combination, and nothing else. What
it computes is what the coroutine computes, with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyak.generate.linear import LinearSolver, Stage, apply, folded
from polyak.generate.prediction import Denoiser, Prediction, weights_at
from polyak.generate.process import Generators, Moment, ProbabilityPath


def run_table(
    solver: LinearSolver,
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    process: ProbabilityPath,
    *,
    dtype: torch.dtype,
    generator: Generators | None,
    check: Callable[[Tensor, int, float], None] | None,
) -> tuple[Tensor, list[Stage]]:
    """The final state, and the stages that led to it.

    Args:
        dtype: what the network is given x in.
        check: looks at every output: ``(output, evaluation, t)``.
    """
    kind, sigma_data, model = denoiser.prediction, denoiser.sigma_data, denoiser.model
    stages = solver.table(times, process, kind)
    steps = [folded(s, lambda view, t=s.t: weights_at(kind, view, process, t, sigma_data)) for s in stages]
    asked = [stage.t for stage in stages if isinstance(stage.t, Moment)]
    if len(asked) < len(stages) or not all(t.of is asked[0].of for t in asked):
        asked = list(process.moments([stage.t for stage in stages]))
    labels = denoiser.labels(asked, x)
    casts, scales = x.dtype != dtype, kind == "edm"
    values, start, shape = (), x, x.shape
    for i, (stage, step, label) in enumerate(zip(stages, steps, labels, strict=True)):
        fed = x.to(dtype) if casts else x
        output = model(denoiser.scaled(fed, stage.t) if scales else fed, label)
        if not isinstance(output, Tensor) or output.shape != shape:
            Prediction(output, x, stage.t, process, kind)  # refuses it
        if check is not None:
            check(output, i + 1, stage.t)
        if stage.first:
            start = x
        made, values = apply(step, start, x, output, values, generator, mean=False)
        x = made.next
        denoiser.nfe += 1
        denoiser.evaluations += 1
    return x, stages
