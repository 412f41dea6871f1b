"""The picture of marginalization models: log p of every subset, by one call, as training on an energy goes on."""

from __future__ import annotations

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

STAGES, SIDE, SHOWN = (0, 30, 160), 3, 64


def picture():
    """A small Ising model: what the network says of random subsets, over the sum over all states, after 0, 30 and 160 steps."""
    import torch

    from polyak.claims.generate._marginals import spins
    from polyak.core.exact import Ising
    from polyak.generate.marginalization import MarginalizationModel, MLPDual, PersistentChain, energy_loss

    law, length = Ising(SIDE, 0.2, 0.1), SIDE**2
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = MarginalizationModel(MLPDual(2, length, hidden=64, layers=1), 2, length)
    chain = PersistentChain(128, length, 2, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STAGES[-1])
    rank = torch.rand(SHOWN, length, generator=generator).argsort(1)
    drawn = (law.sample(SHOWN, generator=generator).long() + 3) // 2
    x = torch.where(rank <= torch.randint(length, (SHOWN, 1), generator=generator), drawn, 0)
    exact, size = law.log_marginal(spins(x)), (x != 0).sum(1)
    titles = [f"{n} steps" if n else "before training" for n in STAGES]
    figure, axes = panels(3, titles=titles, height=235, square=True, share=True)
    step = 0
    for one, stop in zip(axes, STAGES, strict=True):
        while step < stop:
            chain.refresh(model, 2, generator=generator)
            loss = energy_loss(
                model, lambda x: law.log_density(spins(x)).float(), chain, alpha=0.5, generator=generator
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
        with torch.no_grad():
            said = model.log_marginal(x)
        one.plot([-10, 0], [-10, 0], color=INK, linewidth=0.8, alpha=0.6)
        for few, color in ((True, SERIES[0]), (False, SERIES[1])):
            which = (size <= 4) == few
            one.plot(exact[which], said[which], linestyle="", marker="o", markersize=3.5, color=color, alpha=0.7)
        one.set_xlabel("exact log p")
        one.set(xlim=(-9.5, 1.0), ylim=(-9.5, 1.0), xticks=(-8, -4, 0), yticks=(-8, -4, 0))
    axes[0].set_ylabel("log p in one call")
    name(axes[0], -9.2, -7.6, "1 to 4 spins known", SERIES[0], shift=(0, 0))
    name(axes[0], -9.2, -8.8, "5 to 9 spins known", SERIES[1], shift=(0, 0))
    name(axes[2], -9.2, 0.2, "line: exact", MUTED, shift=(0, 0))
    return described(
        figure,
        "log p of random subsets of the nine spins of an Ising model, by one call of the network over the exact sum over all "
        "states. Before training all are near 0. After 30 steps on the energy they are on their way to the line of equality, "
        "and after 160 most are on it.",
    )
