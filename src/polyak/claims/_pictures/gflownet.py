"""GFlowNets' picture: a grid's rewards, what a forward-looking GFlowNet builds, and what it builds if ends are left open."""

from __future__ import annotations

from polyak.lab.pictures import INK, SERIES, described, name, panels

STEPS, HEIGHT = 60, 8


def picture():
    """Exact laws of the part's policies after a short training, beside R / Z, on one scale of shades."""
    import torch

    from polyak.particles.gflownet import FlowNet, GFlowNet, HyperGrid, exact_terminal_law

    env = HyperGrid(2, HEIGHT)
    laws = []
    for parity in (None, "official"):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            net = FlowNet(env, 64)
        generator = torch.Generator().manual_seed(0)
        gfn = GFlowNet(env, net, "fl_db", eps=0.2, lr=2e-2, batch=32, parity=parity, generator=generator)
        gfn.fit(STEPS)
        laws.append(exact_terminal_law(env, gfn.policy))
    points = laws[0].states
    truth = env.log_reward(points).double().softmax(0)
    shown = [("Asked for: R / Z", truth), ("Forward-looking", laws[0].probs), ("Ends left open", laws[1].probs)]
    figure, axes = panels(3, titles=[title for title, _ in shown], height=205, square=True)
    highest = truth.max().item() * 1.25
    for one, (_, p) in zip(axes, shown, strict=True):
        shades = (p / highest).clamp(0, 1).numpy()
        one.scatter(points[:, 0], points[:, 1], s=110, marker="s", color=SERIES[0], alpha=shades, linewidths=0)
        one.grid(visible=False)
        one.set(xticks=(0, HEIGHT - 1), yticks=(0, HEIGHT - 1), xlim=(-0.6, HEIGHT - 0.4), ylim=(-0.6, HEIGHT - 0.4))
        tv = 0.5 * (p - truth).abs().sum().item()
        one.set_xlabel("" if p is truth else f"{100 * tv:.0f} % misplaced")
    axes[0].set_xlabel("points of a grid")
    name(axes[0], 0.5, 0, "start", INK, shift=(6, 0))
    return described(
        figure,
        "Probabilities of the points of a grid. The reward has four modes near the corners. After sixty steps of training a "
        "forward-looking GFlowNet has found the four modes, with a part of the mass misplaced. With the network's own flow at "
        "terminal states, as in the official code, half of the mass is misplaced, and most is near the start.",
    )
