"""PaRIS particle Gibbs' claim: at an equal budget its bias is far below that of PaRIS, and what is learned by it is nearer."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import paris as pictures
from polyak.lab.claim import Arm, Claim, Measurement, Metric, Paper, Scale, Task, Trial, measure
from polyak.lab.criteria import Ask


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm on one of the tasks, by their names."""
    yield from {"exact": _exact, "paths": _paths, "smoothing": _smoothing, "learning": _learning, "returns": _returns}[
        t.task
    ](t)


def _exact(t: Trial) -> Iterator[Measurement]:
    import math

    import torch

    from polyak.claims.particles import _state_spaces as s
    from polyak.particles.paris import PaRIS

    model, draw = s.linear(), torch.Generator().manual_seed(t.seed)
    _, y = model.simulate(t["long"], generator=draw)
    m = math.inf if t["draws"] == 0 else t["draws"]
    smoother = PaRIS(model, s.product, t["n"], m, generator=draw)
    clouds = s.run(smoother, y[: t["steps"]])
    reference = s.forward_backward(model, clouds, s.product)
    error = abs(smoother.estimate() / reference - 1).item()
    counter = PaRIS(model, s.tenth, t["n"], m, generator=draw)
    s.run(counter, y[: t["steps"]])
    held = s.bytes_held(counter)
    constant = (counter.tau / (0.1 * (t["steps"] - 1)) - 1).abs().max().item()
    for y_t in y[t["steps"] :]:
        counter.update(y_t)
    carried, passed = s.two_scores(t.seed, t["steps"])
    score = ((carried - passed).abs().max() / carried.abs().max()).item()
    yield measure(ffbsm=error, constant=constant, score=score, growth=s.bytes_held(counter) / held)


def _paths(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims.particles import _state_spaces as s
    from polyak.particles.paris import ParisParticleGibbs, particle_gibbs

    chain, y = s.small_chain(t.seed)
    draw = torch.Generator().manual_seed(t.seed)
    exact = chain.hmm.smooth(y).pairs[:, 1, 1].sum()
    start = s.drawn_paths(chain, y, t["chains"], draw)
    many = y.expand(t["chains"], *y.shape)
    if t.arm == "invariant":
        made = ParisParticleGibbs(chain, s.product, 2, sweeps=1, burn_in=0, generator=draw).run(many, start)
        path, estimate = made.path, made.estimate.mean()
    else:  # a sweep that is given no path: what a sweep of the chain starts from
        path = particle_gibbs(chain, many, "backward", n=2, sweeps=1, path=start.flip(1), generator=draw)[0]
        estimate = s.run_alone(chain, many, draw)
    found, p = s.histogram(chain, y, path)
    tv = 0.5 * (found / t["chains"] - p).abs().sum()
    yield measure(tv=tv.item(), off=abs(estimate / exact - 1).item())


def _smoothing(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims.particles import _state_spaces as s
    from polyak.particles.paris import PaRIS, ParisParticleGibbs

    model, draw = s.linear(), torch.Generator().manual_seed(t.seed)
    _, y = model.simulate(t["steps"], (t["series"],), generator=draw)
    exact = s.kalman().smooth(y[..., None]).cross_moments.sum((-3, -2, -1))
    count = t["replicates"]
    if t["sweeps"] == 0:  # independent runs, `runs` of which are averaged
        many = y.repeat_interleave(count * t["runs"], 0)
        smoother = PaRIS(model, s.product, t["n"], backward=t["backward"], generator=draw)
        s.run(smoother, many)
        made = smoother.estimate().view(t["series"], count, t["runs"]).mean(-1)
    else:
        chain = ParisParticleGibbs(
            model,
            s.product,
            t["n"],
            sweeps=t["sweeps"],
            burn_in=t["sweeps"] // 4,
            backward=t["backward"],
            generator=draw,
        )
        made = chain.run(y.repeat_interleave(count, 0)).estimate.view(t["series"], count)
    error = made - exact[:, None]
    yield measure(bias=error.mean(1).square().mean().sqrt().item(), rmse=error.square().mean().sqrt().item())


def _learning(t: Trial) -> Iterator[Measurement]:
    import math

    from polyak.claims.particles import _state_spaces as s

    y, best = s.most_likely(t.seed, t["steps"], t["series"])
    model = s.linear(0.5)
    names = ("A", "raw_Q", "raw_R")
    theta = s.learned(model, names, y, t.seed, **_options(t)).tolist()
    yield measure(distance=math.dist(theta, best), distance_a=abs(theta[0] - best[0]))


def _returns(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims.particles import _state_spaces as s
    from polyak.particles.paris import PaRIS, StochasticVolatility

    y = s.returns(t["steps"])
    model = StochasticVolatility(0.9, 0.3, 2.0, dtype=s.DOUBLE)
    names = ("raw_phi", "log_sigma", "log_beta")
    theta = s.learned(model, names, y, t.seed, **_options(t))
    with torch.no_grad():
        for name, value in zip(names, theta, strict=True):
            getattr(model, name).copy_(value)
        draw = torch.Generator().manual_seed(t.seed)
        large = PaRIS(model, s.product, t["large"], backward="ancestor", generator=draw)
        log_z = s.run(large, y)[-1].log_z.item()
        values = dict(phi=model.phi.item(), sigma=model.sigma.item(), beta=model.beta.item())
    yield Measurement({"log_likelihood": log_z, **values})


def _options(t: Trial):
    return {name: t[name] for name in ("n", "sweeps", "iterations", "lr", "chains")} | {"arm": t["how"]}


ONE = {"sweeps": 0, "backward": "dense"}
CHAIN = {"backward": "dense"}
SMOOTHED, LEARNED = ("smoothing",), ("learning", "returns")
ARMS = (
    Arm("paris16", "PaRIS, 16 runs of N = 16", "baseline", {**ONE, "n": 16, "runs": 16}, tasks=SMOOTHED, says="averaged"),
    Arm("ppg16", "PPG, N = 16, 16 sweeps", "method", {**CHAIN, "n": 16, "sweeps": 16}, tasks=SMOOTHED, says="4 of burn-in"),
    Arm("ppg32", "PPG, N = 32, 8 sweeps", "method", {**CHAIN, "n": 32, "sweeps": 8}, tasks=SMOOTHED, says="2 of burn-in"),
    Arm(
        "ancestor16", "The same through ancestors", "control", {"backward": "ancestor", "n": 16, "sweeps": 16}, tasks=SMOOTHED,
        says="N = 16, 16 sweeps; paths and statistics by the filter's ancestors, without backward draws",
    ),
    Arm("paris64", "PaRIS, N = 64", "baseline", {**ONE, "n": 64, "runs": 1}, tasks=SMOOTHED, says="as many pairs of particles"),
    Arm(
        "paris256", "PaRIS, N = 256", "baseline", {**ONE, "n": 256, "runs": 1, "replicates": 4}, tasks=SMOOTHED,
        says="as many particles, 16 times the pairs",
    ),
    Arm("learn_ppg", "PPG", "method", {"how": "ppg"}, tasks=LEARNED, says="one sweep a step, from the last step's path"),
    Arm("learn_paris", "PaRIS", "baseline", {"how": "paris"}, tasks=LEARNED, says="one run a step"),
    Arm("learn_path", "Particles' paths", "control", {"how": "ancestor"}, tasks=("learning",), says="through ancestors"),
    Arm("forward", "PaRIS, M = inf", "method", {"draws": 0}, tasks=("exact",)),
    Arm("sampled", "PaRIS, M = 2", "control", {"draws": 2}, tasks=("exact",)),
    Arm("invariant", "Conditional PaRIS, N = 2", "method", tasks=("paths",), says="given a path from the exact law"),
    Arm("alone", "Two particles, given another path or none", "control", tasks=("paths",)),
)  # fmt: skip
TASKS = (
    Task(
        "smoothing", "Linear Gaussian model",
        "x' = 0.97 x + N(0, 0.2), y = x + N(0, 0.3), 60 observations, sum of x x'; 256 particles times sweeps; eight series, each "
        "smoothed 40 times; the exact value by Kalman's filter and the RTS smoother",
        {"steps": 60, "series": 8, "replicates": 40},
    ),
    Task(
        "exact", "Known sums",
        "the same model; given the particles, smoothing weights by loops; a constant functional; scores by two ways",
        {"steps": 50, "long": 500, "n": 24},
    ),
    Task(
        "paths", "A chain of two states at three times",
        "one sweep of each of 40,000 chains of two particles; the exact law of the eight paths by enumeration", {"chains": 40_000},
    ),
    Task(
        "learning", "Learning the linear Gaussian model",
        "a, Q and R from a = 0.5 and four series of 50; Adam, 80 steps, the last half averaged; 16 particles; distance in (a, log "
        "sqrt Q, log sqrt R) to the maximum of Kalman's likelihood",
        {"steps": 50, "series": 4, "n": 16, "sweeps": 1, "iterations": 80, "lr": 0.08, "chains": 6},
    ),
    Task(
        "returns", "Stochastic volatility of a stock",
        "the last 100 of Google's daily returns to October 2008; Adam, 60 steps, the last half averaged; 16 particles; "
        "likelihood by a filter of 20,000",
        {"steps": 100, "n": 16, "sweeps": 1, "iterations": 60, "lr": 0.1, "chains": 4, "large": 20_000},
    ),
)  # fmt: skip
METRICS = (
    Metric("ffbsm", "Relative difference from smoothing weights by loops", exact=True),
    Metric("constant", "Relative error of a constant functional, the worst particle's", exact=True),
    Metric("score", "Relative difference of two ways to the score", exact=True),
    Metric("growth", "Bytes held after 500 observations, over those after 50", exact=True),
    Metric("tv", "Total variation between the paths' law and the exact one"),
    Metric("off", "Relative error of the mean estimate"),
    Metric("bias", "Bias, root mean square over series"),
    Metric("rmse", "Error, root mean square"),
    Metric("distance", "Distance to the maximum of the likelihood"),
    Metric("distance_a", "Distance of a alone"),
    Metric("log_likelihood", "Log-likelihood", better="higher"),
    Metric("phi", "Persistence phi", better="higher"),
    Metric("sigma", "Deviation sigma of the log-variance's noise"),
    Metric("beta", "Deviation beta at x = 0", unit="%"),
)
PROVED = Ask(METRICS, kind="mechanism", task="exact", arm="forward", rule="every")
INVARIANT = Ask(METRICS, kind="mechanism", task="paths", arm="invariant", control="alone")
BIASED = Ask(METRICS, kind="effect", task="smoothing", arm="ppg16", over="paris16", control="ancestor16")
LEARN = Ask(METRICS, kind="effect", task="learning", metric="distance", arm="learn_ppg", over="learn_paris")
CRITERIA = (
    PROVED.at_most("ffbsm", 1e-10, "With all pairs PaRIS is FFBSm", metric="ffbsm", control="sampled"),
    *PROVED.table(
        "at_most", "name bound metric says",
        ("constant", 1e-12, "constant", "A constant functional is n times the constant, for every particle"),
        ("score", 1e-10, "score", "One backward pass gives the score that the particles would carry"),
        ("growth", 1.0, "growth", "Memory does not grow with time"),
    ),
    INVARIANT.at_most("invariant", 0.015, "With two particles a sweep leaves the exact law of paths as it is", metric="tv"),
    INVARIANT.at_most("unbiased", 0.02, "A sweep from the exact law is unbiased, with two particles", metric="off"),
    BIASED.at_most("bias", 1 / 3, "PPG's bias is at most a third of that of PaRIS runs of as many particles", metric="bias"),
    BIASED.at_most("rmse", 1.0, "and its error is not larger than theirs", metric="rmse"),
    LEARN.at_most("learning", 0.5, "Learned by PPG, parameters are at most half as far off as by PaRIS", control="learn_path"),
    *BIASED.but(gating=False, control="").table(
        "at_most", "name bound metric arm over says",
        ("bias_32", 1 / 3, "bias", "ppg32", "paris16", "PPG with N = 32 and 8 sweeps: its bias is at most a third, too"),
        ("equal_pairs", 1.0, "rmse", "ppg16", "paris64", "PPG's error is at most that of PaRIS with as many pairs of particles"),
        ("equal_particles", 1.0, "rmse", "ppg16", "paris256", "PPG's error is at most that of PaRIS with 16 times the pairs"),
    ),
    LEARN.but(gating=False).at_most("learning_a", 1.0, "PPG's a, too, is at most as far from the best", metric="distance_a"),
    LEARN.but(gating=False).beats(
        "returns", "Returns: what PPG learns has the higher likelihood", task="returns", metric="log_likelihood",
        minus="learn_paris",
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="paris", room="particles", name="PaRIS particle Gibbs",
    summary="Smoothed sums and scores of state-space models, whose bias falls geometrically with sweeps",
    says=(
        "PaRIS smooths additive functionals online with N particles, with a bias of order 1 / N. Run within a conditional "
        "particle filter, again and again, its bias falls geometrically with the sweeps, and averages have a comparable variance: "
        "at an equal budget of particles the bias is far lower. Parameters of a linear Gaussian model, of stochastic volatility "
        "and of a chaotic recurrent network are learned with lower errors."
    ),
    paper=Paper("State and parameter learning with PaRIS particle Gibbs", 2023, "2301.00900", "ICML 2023"),
    part="polyak.particles.paris:ParisParticleGibbs", budget="particles times sweeps",
    scales=(Scale("small", "linear Gaussian model, chain of two states, returns: two minutes on two cores", 5, first_seed=100),),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    sources=("polyak.claims.particles._state_spaces",),
    departures=(
        "The paper learns longer series with up to a thousand particles. Here they are short and particles few, where bias counts.",
        "Estimates use the weights of the last observation; the paper's particles are those after resampling.",
        "Bias is measured on eight series, each smoothed 40 times. The root mean square of means of 40 has noise of its own, "
        "a sixth of the error of one run; it is in all arms, against PPG.",
        "Learned are Q and R, too: with a alone PaRIS's bias in the two sums that give a cancels nearly (pilots, seeds 1 and 2).",
        "Returns are those of one stock, which matplotlib brings along, not of an index: they are offline. What is learned from "
        "them is reported, not judged.",
        "A recurrent network is not in the experiment; the part's NeuralSSM is tested.",
    ),
    usage=(
        "from polyak.particles import LinearGaussian, ParisParticleGibbs\n"
        "model = LinearGaussian(0.97, Q=0.2, R=0.3)\n"
        "smoother = ParisParticleGibbs(model, lambda x, x_next, t: x * x_next, n=32)\n"
        "estimate, path, per_sweep = smoother.run(model.simulate(60)[1])  # of E[sum_t x_t x_{t+1} | y]"
    ),
)  # fmt: skip
