"""The picture of rollover budget forcing: candidates that differ, rewards as calls are spent, and where the calls go."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

SYSTEMS, SEED, NFE = 8, 7, 500


def picture():
    """On the straight flow of 16 coordinates: spread of candidates by step, reward by calls, and the steps of two chains."""
    import torch

    from polyak.claims.generate import _flows
    from polyak.generate import SVDD, VP, BestOfN, Flow, FlowSDE, RolloverBudget, convert

    flow, vp = Flow(), VP()
    models: dict[str, tuple[Any, Any]] = {
        "linear": (flow, _flows.straight),
        "VP": (vp, convert(_flows.straight, flow, vp)),
    }

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(SEED)

    titles = ("Spread of candidates", "Reward found", "Steps, two chains")
    figure, (spread, reward, where) = panels(3, titles=titles, height=225)
    looks = {"linear": (SERIES[1], (0, (3, 1))), "VP": (SERIES[0], "-")}
    for label, (process, model) in models.items():
        color, dash = looks[label]
        solver = FlowSDE()
        times = process.check_times(solver.times(process, steps=10))
        x, apart = process.prior((1, _flows.DIM), generator=rng(), dtype=torch.float64), []
        for t, stage in zip(times[1:-1], solver.table(times, process), strict=False):
            u = model(x, torch.full((1,), float(stage.t), dtype=torch.float64))
            mean = stage.base * x + stage.value * u
            many = mean + stage.std * torch.randn(64, _flows.DIM, generator=rng(), dtype=torch.float64)
            said = model(many, torch.full((64,), t, dtype=torch.float64))
            alpha, sigma, d_alpha, d_sigma = (
                f(t) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma)
            )
            data = (d_sigma * many - sigma * said) / (alpha * d_sigma - d_alpha * sigma)
            apart.append(data.std(0).mean().item())
            x = many[:1]
        spread.plot(range(1, 10), apart, color=color, linestyle=dash, linewidth=2, marker="o", markersize=4)
        name(spread, *((1, apart[0]) if label == "linear" else (5, apart[4])), label, color, shift=(8, 4))
        search = RolloverBudget(_flows.counting, NFE, generator=rng())
        trace = search.sample(model, process, (_flows.DIM,), SYSTEMS, dtype=torch.float64).trace
        reward.plot(trace.nfe, trace.best.amax(1).mean(0), color=color, linestyle=dash, linewidth=2)
        name(reward, *((230, 0.18) if label == "VP" else (265, -0.85)), f"RBF, {label}", color)
        if label == "VP":
            for chain, ink in ((0, color), (1, INK)):
                where.plot(
                    trace.nfe, trace.step[0, chain] + 0.06 * chain, color=ink, linewidth=1.6, drawstyle="steps-post"
                )
    others = SVDD(_flows.counting, NFE, candidates=27, generator=rng()), BestOfN(_flows.counting, NFE, generator=rng())
    svdd, bon = (other.sample(_flows.straight, flow, (_flows.DIM,), SYSTEMS) for other in others)
    reward.plot(svdd.trace.nfe, svdd.trace.best.amax(1).mean(0), color=SERIES[2], linewidth=1.6, linestyle=":")
    name(reward, 175, -1.4, "SVDD, linear", SERIES[2])
    reward.plot(NFE, bon.reward.mean(), marker="o", markersize=5, color=MUTED)
    name(reward, NFE, bon.reward.mean().item(), "best of 50", MUTED, shift=(-6, 8))
    spread.set(xlabel="step", ylabel="deviation of predicted data", ylim=(0, None), xticks=range(1, 10, 2))
    reward.set(xlabel="network calls", ylim=(None, 0.35))
    where.set(xlabel="network calls", ylabel="step", yticks=range(0, 9, 2))
    return described(
        figure,
        "In the VP interpolant the candidates of a step differ in their predicted data at nearly all steps, in the linear one they "
        "hardly do at the later ones. Rollover budget forcing in VP comes nearest to the counts that are asked for. Its two chains "
        "stay at some steps for long, and pass others at once.",
    )
