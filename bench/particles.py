"""Particles: what resampling, filtering, smoothing and discrete samplers cost, beside their peers in the same run.

    python bench/particles.py [--device cpu|cuda] [--only resample filter smooth discrete gflownet] [--json rows.json]

Peers that are not installed are left out, with a line that says so: ``particles`` (NumPy and numba, one system at a time; several
systems are a loop), ``blackjax`` (JAX, jitted, mapped over systems), ``torchgfn``. "plain" is what people write in
PyTorch: softmax, cumsum, searchsorted, gather. The least of several runs counts, after two to warm up.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.core import particles as ours

# A peer has this file's name: it is not to be found here.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

Rows = list[dict[str, Any]]
RESAMPLED = {
    "cpu": ((1, 10**3), (1, 10**4), (1, 10**5), (1, 10**6), (100, 10**3), (100, 10**4), (1000, 10**3)),
    "cuda": ((1, 10**4), (1, 10**5), (1, 10**6), (1000, 10**3), (1000, 10**4), (100, 10**5)),
}
FILTERED = {
    "cpu": ((1, 10**3), (1, 10**4), (1, 10**5), (100, 10**3)),
    "cuda": ((1, 10**4), (1, 10**6), (1000, 10**3), (1000, 10**4)),
}
STEPS = 50  # of a filter


def has(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed: its columns are missing")
        return False
    return True


def seconds(run: Callable[[], Any], device: str, budget: float = 1.0) -> float:
    """The least of several runs: at least three, and as many as fit into the budget."""
    best, spent, i = math.inf, 0.0, 0
    while i < 5 or (spent < budget and i < 200):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        spent, i = spent + took, i + 1
        if i > 2:
            best = min(best, took)
    return best


def captured(run: Callable[[], Any], *generators: torch.Generator) -> Callable[[], Any]:
    """The same as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bandwidth(device: str) -> float:
    """Bytes a second that a copy of 400 MB reads and writes."""
    a = torch.empty(50_000_000, dtype=torch.float64, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), device)


def plain(logw: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.softmax(logw, -1).cumsum(-1)
    n = logw.shape[-1]
    points = (torch.arange(n, dtype=logw.dtype, device=logw.device) + u) / n
    ancestors = torch.searchsorted(c, points, right=True).clamp_(max=n - 1)
    return ancestors, x.gather(-1, ancestors)


def resampling(device: str) -> Rows:
    """Systematic resampling from log-weights, and the gather of a float32 number a particle."""
    found, speed = [], bandwidth(device)
    theirs = device == "cpu" and has("particles")
    jaxes = device == "cpu" and has("blackjax")
    for systems, count in RESAMPLED[device]:
        g = torch.Generator(device).manual_seed(0)
        logw = torch.randn(systems, count, dtype=torch.float64, device=device, generator=g)
        x = torch.randn(systems, count, device=device, generator=g)

        def of_polyak(logw: Tensor = logw, x: Tensor = x, g: torch.Generator = g) -> Any:
            ancestors = ours.resample(logw, generator=g)
            return ours.gather(x, ancestors, 1)

        def of_torch(logw: Tensor = logw, x: Tensor = x, g: torch.Generator = g) -> Any:
            return plain(logw, x, torch.rand(len(logw), 1, dtype=logw.dtype, device=logw.device, generator=g))

        runs = {"polyak": of_polyak, "plain": of_torch}
        if theirs:
            from particles import resampling as rs

            w, y = logw.numpy(), x.numpy()

            def of_particles(w: Any = w, y: Any = y) -> Any:
                return [b[rs.systematic(rs.exp_and_normalise(a), M=len(a))] for a, b in zip(w, y, strict=True)]

            runs["particles"] = of_particles
        if jaxes:
            import jax
            from blackjax.smc import resampling as bj

            keys = jax.random.split(jax.random.PRNGKey(0), systems)
            mapped = jax.jit(jax.vmap(lambda k, a, b: b[bj.systematic(k, jax.nn.softmax(a), len(a))]))
            pair = (jax.numpy.asarray(logw.numpy()), jax.numpy.asarray(x.numpy()))
            runs["blackjax"] = lambda keys=keys, pair=pair, mapped=mapped: mapped(keys, *pair).block_until_ready()
        row: dict[str, Any] = {"systems": systems, "N": count}
        row |= {name: 1e3 * seconds(run, device) for name, run in runs.items()}
        if device != "cpu":
            for name, run in (("polyak", of_polyak), ("plain", of_torch)):
                row[f"{name}, graph"] = 1e3 * seconds(captured(run, g), device)
        # log-weights and states are read, ancestors and states written
        row["floor"] = 1e3 * systems * count * (8 + 8 + 4 + 4) / speed
        found.append(row)
    return found


def filtering(device: str) -> Rows:
    """A bootstrap filter of x' = 0.9 x + N(0, 1), y = x + N(0, 1); resampling at every step; its log-evidence is returned."""
    found, y = [], torch.randn(STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    theirs = device == "cpu" and has("particles")
    for systems, count in FILTERED[device]:
        g = torch.Generator(device).manual_seed(0)

        def noise(systems: int = systems, count: int = count, g: torch.Generator = g) -> Tensor:
            return torch.randn(systems, count, device=device, generator=g)

        def of_polyak(noise: Any = noise, g: torch.Generator = g, systems: int = systems, n: int = count) -> Tensor:
            cloud = ours.Cloud.uniform(noise(), (systems, n))
            for t, seen in enumerate(y):
                if t:
                    cloud, _, _ = cloud.maybe_resample(1.0, generator=g)
                    cloud = dataclasses.replace(cloud, x=0.9 * cloud.x + noise())
                cloud = cloud.reweight(-0.5 * (seen - cloud.x) ** 2)
            return cloud.log_z

        def of_torch(noise: Any = noise, g: torch.Generator = g, n: int = count) -> Tensor:
            x, log_z = noise(), torch.zeros((), device=device)
            logw = torch.zeros_like(x, dtype=torch.float64)
            for t, seen in enumerate(y):
                if t:
                    u = torch.rand(len(x), 1, dtype=torch.float64, device=device, generator=g)
                    x = 0.9 * plain(logw, x, u)[1] + noise()
                logw = (-0.5 * (seen - x) ** 2).double()
                log_z = log_z + torch.logsumexp(logw, -1) - math.log(n)
            return log_z

        runs = {"polyak": of_polyak, "plain": of_torch}
        if theirs:
            import particles
            from particles import kalman
            from particles import state_space_models as ssm

            model = ssm.Bootstrap(ssm=kalman.LinearGauss(rho=0.9, sigmaX=1.0, sigmaY=1.0, sigma0=1.0), data=y)

            def of_particles(model: Any = model, systems: int = systems, count: int = count) -> None:
                for _ in range(systems):
                    particles.SMC(fk=model, N=count, resampling="systematic", ESSrmin=1.0).run()

            runs["particles"] = of_particles
        row: dict[str, Any] = {"systems": systems, "N": count}
        row |= {name: 1e3 * seconds(run, device) / STEPS for name, run in runs.items()}
        if device != "cpu":
            row["polyak, graph"] = 1e3 * seconds(captured(of_polyak, g), device) / STEPS
        found.append(row)
    return found


SMOOTHED = {
    "cpu": ((100, 100), (200, 100), (400, 100), (800, 100), (200, 50), (200, 200), (200, 400)),
    "cuda": ((1024, 100), (4096, 100)),
}


def smoothing(device: str) -> Rows:
    """PaRIS with M = 2 of sum x_t x_{t+1}, of (N, T): the whole pass over T observations of a linear Gaussian model."""
    from polyak.particles import LinearGaussian, PaRIS

    found, theirs = [], device == "cpu" and has("particles")
    model = LinearGaussian(0.97, Q=0.2, R=0.3).to(device)
    for count, steps in SMOOTHED[device]:
        y = model.simulate(steps, generator=torch.Generator(device).manual_seed(1))[1].detach()
        g = torch.Generator(device).manual_seed(0)
        row: dict[str, Any] = {"N": count, "T": steps}
        for backward in ("dense", "rejection"):

            def of_polyak(backward: str = backward, count: int = count, y: Tensor = y, g: Any = g) -> Tensor:
                smoother = PaRIS(model, lambda x, after, t: x * after, n=count, backward=backward, generator=g)
                smoother.init(y[0])
                for seen in y[1:]:
                    smoother.update(seen)
                return smoother.estimate()

            row[f"polyak, {backward}"] = seconds(of_polyak, device, 0.5)
        if theirs and count <= 400 and steps <= 200:
            import particles
            from particles import collectors, kalman
            from particles import state_space_models as ssm

            class Summed(ssm.Bootstrap):
                def add_func(self, t: int, before: Any, x: Any) -> Any:
                    return 0.0 * x if before is None else before * x

            # log N(x; rho x', sigma^2) is at most -log(sigma sqrt(2 pi))
            class Model(kalman.LinearGauss):
                def upper_bound_log_pt(self, t: int) -> float:
                    return -math.log(math.sqrt(0.2 * 2 * math.pi))

            made = Model(rho=0.97, sigmaX=0.2**0.5, sigmaY=0.3**0.5, sigma0=1.0)
            law = Summed(ssm=made, data=y.cpu().numpy())

            def of_particles(law: Any = law, count: int = count) -> None:
                particles.SMC(fk=law, N=count, ESSrmin=1.0, collect=[collectors.Paris()]).run()

            began = time.perf_counter()
            of_particles()
            row["particles"] = time.perf_counter() - began
        found.append(row)
    return found


def exponents(found: Rows, name: str) -> str:
    """By what powers of N and of T the time grows, by least squares through the rows."""
    of_n = [(math.log(r["N"]), math.log(r[name])) for r in found if r["T"] == 100 and name in r]
    of_t = [(math.log(r["T"]), math.log(r[name])) for r in found if r["N"] == 200 and name in r]
    return ", ".join(f"{axis}^{_slope(points):.2f}" for axis, points in (("N", of_n), ("T", of_t)) if len(points) > 1)


def _slope(points: list[tuple[float, float]]) -> float:
    mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def discrete(device: str) -> Rows:
    """64 masks of 64 strings, 8,192 tokens: first-hitting, which is exact, beside ancestral sampling, which is so in the limit.

    The network is one small transformer layer's worth of work: two products. Milliseconds for all strings.
    """
    from polyak.generate import FirstHitting, MaskedAncestral, MaskedProcess, TokenDenoiser, sample

    vocab, length, batch, width = 8192, 64, 64, 64
    g = torch.Generator(device).manual_seed(0)
    inner = torch.randn(vocab + 1, width, device=device, generator=g)
    outer = torch.randn(width, vocab, device=device, generator=g) / 8
    denoiser = TokenDenoiser(lambda x: inner[x] @ outer, MaskedProcess(vocab))
    found = []
    for name, solver in (
        ("first-hitting", FirstHitting()),
        *((f"ancestral, {n} steps", MaskedAncestral(n)) for n in (64, 256, 1024)),
        *((f"ancestral, {n} steps, no cache", MaskedAncestral(n, cache=False)) for n in (256,)),
    ):

        def run(solver: Any = solver) -> Any:
            return sample(denoiser, (batch, length), solver=solver, generator=g, device=device, return_info=True)

        took = seconds(run, device, 0.5)
        found.append({"sampler": name, "calls": run()[1].nfe, "time": 1e3 * took})
    return found


def networks(device: str) -> Rows:
    """Trajectories a second on sets of 20 of 30 elements, one perceptron of 2 x 256."""
    from polyak.particles.gflownet import FlowNet, SetEnv, sample

    found, theirs = [], has("gfn")
    for batch in (64, 1024, 16384):
        env = SetEnv(torch.linspace(-1, 1, 30, device=device), k=20)
        net, g = FlowNet(env), torch.Generator(device).manual_seed(0)

        @torch.no_grad()
        def of_polyak(env: Any = env, net: Any = net, batch: int = batch, g: Any = g) -> Any:
            return sample(env, net, batch, generator=g)

        row: dict[str, Any] = {"batch": batch, "polyak": batch / seconds(of_polyak, device)}
        if theirs:
            from gfn.estimators import DiscretePolicyEstimator
            from gfn.gym import SetAddition
            from gfn.samplers import Sampler
            from gfn.utils.modules import MLP

            other = SetAddition(30, 20, lambda s: torch.ones(len(s), device=device), fixed_length=True, device=device)
            module = MLP(input_dim=30, output_dim=other.n_actions, hidden_dim=256, n_hidden_layers=2).to(device)
            sampler = Sampler(DiscretePolicyEstimator(module, n_actions=other.n_actions))

            @torch.no_grad()
            def of_torchgfn(sampler: Any = sampler, other: Any = other, batch: int = batch) -> Any:
                return sampler.sample_trajectories(other, n=batch)

            row["torchgfn"] = batch / seconds(of_torchgfn, device)
        found.append(row)
    return found


def table(found: Rows, ours_is: str, *, more: bool = False) -> str:
    """Numbers, and of every other contender how many times ours it takes (of rates: how many times theirs ours is)."""
    names = list(dict.fromkeys(name for row in found for name in row))
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    plainly = ("systems", "N", "T", "batch", "sampler", "calls", ours_is)
    for row in found:
        cells = []
        for name in names:
            value = row.get(name)
            text = (
                ""
                if value is None
                else f"{value:,}"
                if isinstance(value, int)
                else value
                if isinstance(value, str)
                else f"{value:.4g}"
            )
            if value is not None and name not in plainly and not isinstance(value, str):
                text += f" ({row[ours_is] / value if more else value / row[ours_is]:.2f})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PARTS: dict[str, tuple[str, Callable[[str], Rows], str]] = {
    "resample": ("Systematic resampling and moving a float32, milliseconds", resampling, "polyak"),
    "filter": (f"One step of a bootstrap filter, milliseconds (of {STEPS})", filtering, "polyak"),
    "smooth": ("PaRIS, two backward draws, seconds for all steps", smoothing, "polyak, dense"),
    "discrete": ("Masked tokens, milliseconds", discrete, "time"),
    "gflownet": ("GFlowNet trajectories a second", networks, "polyak"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=(*PARTS,), default=[*PARTS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    devices = [given.device] if given.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    all_found = {}
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {given.threads} thread(s)"
        for part in given.only:
            says, run, own = PARTS[part]
            all_found[f"{device} {part}"] = found = run(device)
            print(f"\n{name}, torch {torch.__version__}. {says}; in brackets the ratio to ours.\n")
            print(table(found, own, more=part == "gflownet"))
            if part == "smooth":
                for which in ("polyak, dense", "polyak, rejection", "particles"):
                    print(f"\n{which}: time grows as {exponents(found, which)}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump(all_found, file, indent=1)


if __name__ == "__main__":
    main()
