"""The fast sampling loop: for linear solvers, where nothing corrects, steers or watches the run.

All weights and labels are known before the first evaluation: a step is the network and one combination, and nothing else; with
guidance two networks, and what it makes of them. What it computes is what the coroutine computes, with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.generate.guidance import OnOutputs
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
    guidance: OnOutputs | None = None,
    state: Any = None,
) -> tuple[Tensor, list[Stage]]:
    """The final state, and the stages that led to it.

    Args:
        dtype: what the network is given x in.
        check: looks at every output: ``(output, evaluation, t)``.
        guidance, state: how the two outputs are combined, where the denoiser has both; and what that remembers.
    """
    said, sigma_data = denoiser.prediction, denoiser.sigma_data
    kind = said if guidance is None else guidance.kind
    networks: list[Any] = [denoiser.model] if guidance is None else [denoiser.model, denoiser.unconditional]
    stages = solver.table(times, process, kind)
    steps = [folded(s, lambda view, t=s.t: weights_at(kind, view, process, t, sigma_data)) for s in stages]
    asked = [stage.t for stage in stages if isinstance(stage.t, Moment)]
    if len(asked) < len(stages) or not all(t.of is asked[0].of for t in asked):
        asked = list(process.moments([stage.t for stage in stages]))
    labels = [denoiser.labels(asked, x) for _ in networks]
    told = denoiser._told
    of_data = [(0.0, 1.0)] * len(stages)
    if guidance is not None and guidance.reads_data:
        of_data = [weights_at(said, "x0", process, stage.t, sigma_data) for stage in stages]
    casts, scales = x.dtype != dtype, said == "edm"
    values, start, shape = (), x, x.shape
    for i, (stage, step) in enumerate(zip(stages, steps, strict=True)):
        fed = x.to(dtype) if casts else x
        outputs = []
        for network, its in zip(networks, labels, strict=True):
            label = its[i]
            if told is not None and told.touched():  # a network wrote over what it was told
                label = denoiser.labels([asked[i]], x)[0]
            output = network(denoiser.scaled(fed, stage.t) if scales else fed, label)
            if not isinstance(output, Tensor) or output.shape != shape:
                Prediction(output, x, stage.t, process, said)  # refuses it
            outputs.append(output)
        if check is not None:
            for output in outputs:
                check(output, i + 1, stage.t)
        output = outputs[0]
        if guidance is not None:
            output = guidance.combine(output, outputs[1], x, of_data[i], state, stage.first)
        if stage.first:
            start = x
        made, values = apply(step, start, x, output, values, generator, mean=False)
        x = made.next
        denoiser.nfe += 1
        denoiser.evaluations += len(networks)
    return x, stages
