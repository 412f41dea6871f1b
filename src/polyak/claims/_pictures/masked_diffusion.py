"""Masked diffusion's picture: the error of samplers by network calls, and what rounded noise does to rare tokens."""

from __future__ import annotations

from polyak.lab.pictures import INK, MUTED, SERIES, described, log, name, panels

LENGTH, CALLS, DRAWN = 4, (1, 2, 3, 4), 6000
TOKENS, STEPS = 50_257, (100, 1000, 10_000)


def picture():
    """Errors of both samplers on a small chain, and laws of single precision."""
    import torch

    from polyak.claims.generate import _masked as m
    from polyak.core.exact import MarkovChain
    from polyak.generate.discrete import rounded_gumbel_law
    from polyak.generate.masked_diffusion import FirstHitting, MaskedAncestral
    from polyak.generate.sampling import sample

    law = MarkovChain([0.5, 0.3, 0.2], [[0.8, 0.15, 0.05], [0.1, 0.75, 0.15], [0.1, 0.2, 0.7]])
    denoiser, truth = m.exact(law), law.law(LENGTH).flatten()
    place = 3 ** torch.arange(LENGTH - 1, -1, -1)

    def error(solver, n: int = DRAWN) -> float:
        x = sample(denoiser, (n, LENGTH), solver=solver, generator=torch.Generator().manual_seed(3))
        got = (x * place).sum(1).bincount(minlength=len(truth)) / n
        return (got - truth).abs().sum().item() / 2

    titles = (f"Error of samples, {LENGTH} tokens", "Tokens in single precision")
    figure, (errors, laws) = panels(2, titles=titles, height=235)
    ancestral = [error(MaskedAncestral(calls, cache=False)) for calls in CALLS]
    first = [error(FirstHitting(steps=calls)) for calls in CALLS]
    errors.plot(CALLS, ancestral, color=SERIES[1], marker="o", markersize=4, linestyle=(0, (3, 1)))
    errors.plot(CALLS, first, color=SERIES[0], marker="o", markersize=4)
    name(errors, CALLS[2], ancestral[2], "ancestral", SERIES[1], shift=(0, 8))
    name(errors, CALLS[1], first[1], "first hitting", SERIES[0], shift=(-1, -30))
    exact = law.sample(LENGTH, DRAWN, generator=torch.Generator().manual_seed(4))
    noise = ((exact * place).sum(1).bincount(minlength=len(truth)) / DRAWN - truth).abs().sum().item() / 2
    errors.axhline(noise, color=MUTED, linewidth=0.8)
    name(errors, 1, noise, "noise of exact draws", MUTED, shift=(0, 3))
    errors.set(xlabel="network calls", ylabel="total variation", xticks=CALLS, ylim=(0, None))
    p = m.zipf(TOKENS)
    rank = torch.logspace(0, 4.7, 60).long().unique() - 1
    laws.plot(rank + 1, p[rank], color=INK, linewidth=1.6)
    name(laws, 2, p[1].item(), "exact", INK, shift=(6, 4))
    for steps, color in zip(STEPS, SERIES, strict=False):
        drawn = rounded_gumbel_law(p, reveal=1 / steps)
        drawn = drawn / drawn.sum()
        shown = drawn[rank] > 1e-9
        laws.plot((rank + 1)[shown], drawn[rank][shown], color=color, linewidth=1.4)
        at = int(shown.sum()) - 1
        shift = {100: (-18, -14), 1000: (-38, 1), 10_000: (-56, 0)}[steps]
        name(laws, (rank + 1)[at].item(), drawn[rank][at].item(), f"1/{steps}", color, shift=shift)
    log(laws, x=True, y=True)
    laws.set(xlabel="rank of the token", ylabel="probability")
    return described(
        figure,
        "Left: the distance of samples of four tokens from their exact law by network calls. First hitting with four calls is at "
        "the noise of exact draws, ancestral sampling is not. Right: tokens of a vocabulary of 50257 in proportion to one over "
        "rank, drawn in single precision together with the mask. The smaller the probability of a reveal, from 1/100 to "
        "1/10000, the earlier the tail vanishes.",
    )
