"""Solvers that are coroutines: copies between their evaluations draw the same noise, and no evaluation goes astray."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers_cases import network, rng

from polyak.generate import VP, Query, Solver, Step
from polyak.generate.adapters.diffusers import PolyakScheduler

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda s: pickle.loads(pickle.dumps(s)), "copy": copy.copy}


def normal(x: torch.Tensor, generator: Any) -> torch.Tensor:
    if isinstance(generator, list):
        return torch.cat([normal(row[None], g) for row, g in zip(x, generator, strict=True)])
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


class Twice(Solver):
    """Draws noise in the middle of a step, and uses it again at its end; also before its first question."""

    stages, stochastic = 2, True

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        always = normal(x, generator)
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            z = normal(x, generator) + always
            q = yield Query(p.x + (t - s) / 2 * p.flow + 0.1 * z, (s + t) / 2, first=False)
            x = p.x + (t - s) * q.flow + 0.1 * z
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


class Kept(Solver):
    """The same, which remembers the noise of its last step."""

    stages, stochastic, history = 2, True, 1

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None, memory: Any = None) -> Any:
        done, before = (0, 0.0) if memory is None else memory
        for i, (s, t) in enumerate(pairwise(times)):
            if i < done:
                continue
            ahead = normal(x, generator)
            p = yield Query(x, s)
            z = normal(x, generator) + before + ahead
            q = yield Query(p.x + (t - s) / 2 * p.flow + 0.1 * z, (s + t) / 2, first=False)
            x, before = p.x + (t - s) * q.flow + 0.1 * z, z
            yield Step(x, s, t, i, i == len(times) - 2, memory=(i + 1, z))
        return x


@pytest.mark.parametrize("solver", [Twice(), Kept()], ids=repr)
@pytest.mark.parametrize("generators", ["one", "for each row", "a new one in each step", "the default"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_between_two_evaluations_has_the_noise_that_was_drawn(solver: Solver, generators: str, way: str) -> None:
    def run(copied: tuple[int, ...]) -> torch.Tensor:
        torch.manual_seed(3)
        scheduler = PolyakScheduler(solver=solver, process=VP())
        scheduler.set_timesteps(3)
        x = torch.ones(2, 3, dtype=torch.float64)
        given: Any = {"one": rng(1), "for each row": [rng(1), rng(2)]}.get(generators)
        for i, t in enumerate(scheduler.timesteps):
            if i in copied:
                scheduler = WAYS[way](scheduler)
            if generators == "a new one in each step":
                given = rng(i)
            x = scheduler.step(network(x, t), t, x, generator=given).prev_sample
        return x

    want = run(())
    for copied in ((1,), (2,), (1, 2, 3, 4, 5)):
        assert torch.equal(run(copied), want), copied


class Wanders(Solver):
    """Asks by what it is told: once more, at another time, or no longer."""

    def __init__(self, way: str) -> None:
        self.way = way

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            x = p.x + (t - s) * p.flow
            if bool((x != 0).any()) and self.way == "more":
                yield Query(x, t, first=False)
            elif bool((x != 0).any()) and self.way == "elsewhere" and i == 1:
                yield Step(x, s, t, i, False)
                yield Query(x, t / 2)
            elif bool((x != 0).any()) and self.way == "last" and i == len(times) - 2:
                yield Query(x, t, first=False)
            elif bool((x != 0).any()) and self.way == "less" and i == 1:
                return x
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


@pytest.mark.parametrize(
    ("way", "evaluations", "message"),
    [
        ("more", 2, r"asks at t=0\.75025 after 2 evaluations, where it was planned to ask at t=0\.5005"),
        ("elsewhere", 2, r"asks at t=0\.250\d* after 2 evaluations"),
        ("last", 4, r"asks at t=0\.001 after 4 evaluations, where it was planned to ask no more"),
        ("less", 2, r"ends after 2 evaluations, where it was planned to ask at t=0\.5005"),
    ],
)
def test_a_solver_that_asks_otherwise_than_it_was_planned_to_is_stopped(
    way: str, evaluations: int, message: str
) -> None:
    scheduler = PolyakScheduler(solver=Wanders(way), process=VP())
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2)
    *before, last = scheduler.timesteps[:evaluations]
    for t in before:
        x = scheduler.step(network(x, t), t, x).prev_sample
    with pytest.raises(ValueError, match=message):
        scheduler.step(network(x, last), last, x)
