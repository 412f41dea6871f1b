"""MoNNA in processes of their own: faulty workers of every kind, one killed in the middle, and process groups."""

import os
import re
import signal

import monna_for_tests as helpers
import pytest
import torch

from polyak.optim.monna import agreement
from polyak.optim.monna.alike import CHUNK, checksum
from polyak.optim.monna.attacks import ALIE
from polyak.optim.monna.simulator import diameter


@pytest.fixture(scope="module")
def processes(forks):
    """Starts processes, and ends those that are left."""
    started = []

    def start(target, *args, **kwargs):
        process = forks.Process(target=target, args=args, kwargs=kwargs, daemon=True)
        process.start()
        started.append(process)
        return process

    start.context = forks
    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


N, F = 8, 3
HONEST, KILLED = range(5), 7
STEPS, MIDDLE = 60, 20


@pytest.mark.parametrize(
    ("kinds", "timeout"),
    # Only who is silent is waited for.
    [(("sign flip", "wrong shape"), 3000.0), (("nan", "silent"), 10.0), (("near", "garbage"), 3000.0)],
)
def test_training_goes_on_with_two_faulty_workers_and_one_killed(processes, tmp_path, kinds, timeout):
    """n = 8 and f = 3: the two attackers and the worker that is killed. Ranks 0 to 4 stay honest, 7 is until it dies."""
    reached = processes.context.Event()  # for rank 0 alone: who is killed inside set() leaves its lock held for ever
    options = dict(f=F, steps=STEPS, timeout=timeout, pause=0.02, middle=MIDDLE)
    roles = {**dict.fromkeys([*HONEST, KILLED], "honest"), 5: kinds[0], 6: kinds[1]}
    running = {
        r: processes(helpers.worker, r, N, str(tmp_path), kind, reached=None if r else reached, **options)
        for r, kind in roles.items()
    }
    reached.wait()
    os.kill(running[KILLED].pid, signal.SIGKILL)
    running[KILLED].join()
    assert running[KILLED].exitcode == -signal.SIGKILL
    for r in HONEST:
        running[r].join()
        assert running[r].exitcode == 0
    runs = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in HONEST]

    # Who was heard, and for how long the others were waited for.
    present = [[len(others) + 1 for _, others, _ in run["seen"]] for run in runs]
    died = min(t for counts in present for t in range(STEPS) if t > MIDDLE and counts[t] < counts[t - 1])
    assert died < STEPS - 20
    answers = kinds[1] not in ("wrong shape", "garbage", "silent")
    for run, counts in zip(runs, present, strict=True):
        assert KILLED not in run["alive"]
        assert counts[MIDDLE - 1] == 7 + answers
        assert set(counts[died + 2 :]) == {6 + answers}
        assert [f for _, _, f in run["seen"]] == [F - (N - count) for count in counts]
        waits = [t for t in run["times"] if t > timeout / 2]
        if kinds[1] == "silent":
            assert sum(waits) >= timeout * 0.9
            assert len(waits) <= 2
        else:
            assert not waits

    # Honest workers agree within the bound, at every step.
    checked = 0
    for t in range(STEPS):
        if len({counts[t] for counts in present}) > 1:
            continue  # the step in which one died, whom some still heard
        killed = present[0][t] < present[0][MIDDLE - 1] and t > MIDDLE
        halves = [run["seen"][t][0] for run in runs]
        if not killed:
            halves.append(runs[0]["seen"][t][1][-1])
        bound = agreement(N, F, faulty=2 + killed, answering=present[0][t] - len(halves))
        size = diameter(torch.stack(halves))
        assert diameter(torch.stack([run["ends"][t] for run in runs])) <= bound * size + 1e-12
        checked += 1
    assert checked >= STEPS - 3
    assert agreement(N, F, faulty=3, answering=1) == 0.8  # what held after the death

    # Training went on: the loss over all honest data fell after the death, in every worker.
    for run in runs:
        start, middle, end = (helpers.loss_of(run["ends"][t], HONEST) for t in (0, died, STEPS - 1))
        assert end < middle - 0.01
        assert middle < start
        assert end < 0.6


@pytest.mark.parametrize(("rule", "attacked"), [("nna", True), ("nna", False), ("trimmed_mean", True)])
def test_a_gloo_group_equals_the_simulator_to_the_bit(processes, tmp_path, rule, attacked):
    running = [processes(helpers.group_worker, r, str(tmp_path), rule, attacked, None) for r in range(4)]
    for process in running:
        process.join()
        assert process.exitcode == 0
    simulator = helpers.simulated(rule, ALIE() if attacked else None)
    for _ in range(helpers.STEPS):
        simulator.step()
    ranks = range(3 if attacked else 4)
    found = torch.stack([torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in ranks])
    assert torch.equal(found, simulator.parameters)
    assert diameter(found) > 0 or rule == "trimmed_mean"


def test_a_gloo_group_with_a_server(processes, tmp_path):
    running = [processes(helpers.group_worker, r, str(tmp_path), "nna", False, 1) for r in range(4)]
    for process in running:
        process.join()
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(4)]
    # All go on from the server's own mixture.
    p, m = torch.ones(4, 16, dtype=torch.float64), torch.zeros(4, 16, dtype=torch.float64)
    for _ in range(helpers.STEPS):
        m = 0.5 * m + 0.5 * (p - helpers.CENTRES + p / 64)
        half = p - 0.25 * m
        p = helpers.nna(half[1], half[[0, 2, 3]], 1).expand(4, -1)
    assert all(torch.equal(v, found[0]) for v in found)
    torch.testing.assert_close(found[0], p[0], atol=1e-12, rtol=0)


def test_ranks_of_a_group_that_differ_all_say_so(processes, tmp_path):
    reports = processes.context.Queue()
    running = [processes(helpers.group_mistake, r, str(tmp_path), reports) for r in range(3)]
    said = {}
    while sum(what == "end" for _, what in said) < 3:
        rank, what, text = reports.get()
        said[rank, what] = text
    for process in running:
        process.join()
        assert process.exitcode == 0
    for rank in range(3):
        for what, expected in helpers.MISTAKES.items():
            if expected is None:
                assert (rank, what) not in said
            else:
                text = re.sub(r" \(seed all ranks.*?made\)", "", said[rank, what])
                assert text == f"all ranks must have the same {expected}"
        assert "values of parameters (seed all ranks alike, or broadcast" in said[rank, "added later"]
        assert "wait='n-f' needs group=Peers" in said[rank, "wait"]
        first, *others = said[rank, "copies"]
        assert all(one == first for one in others)
        assert first == said[0, "copies"][0]  # mixed: the copies, too, are in the group


def test_a_checksum_is_of_all_bits_in_their_order():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
        t = torch.randn(20, generator=g).to(dtype)
        seen = {checksum([t])}
        for i in range(20):
            other = t.clone()
            other.view(torch.uint8)[i * dtype.itemsize] ^= 1
            seen.add(checksum([other]))
        seen.add(checksum([t.view(torch.uint8).flip(0).view(dtype)]))
        assert len(seen) == 22
        assert checksum([t[:8], t[8:].reshape(3, 4)]) == checksum([t])
        assert checksum([t.reshape(4, 5).t().contiguous().t()]) == checksum([t])
    assert checksum([]) == 0
    long = torch.randn(CHUNK + 3, generator=g)
    assert checksum([long]) == checksum([long[:7], long[7:]]) != checksum([long.roll(CHUNK)])
