"""MoNNA's simulator against a loop over workers that is written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from references_for_tests import assert_same, normal

from polyak.optim.monna import Batches, Simulator, dirichlet_split, mixer, nna
from polyak.optim.monna.attacks import ALIE, FOE, LabelFlip, NaN, SignFlip
from polyak.optim.monna.simulator import diameter

CLOSE = 1e-12  # float64: a dozen steps of sums over some ten numbers of order one


class Point(torch.nn.Module):
    """One parameter x of the losses ||x - c||^2 / 2."""

    def __init__(self, start):
        super().__init__()
        self.x = torch.nn.Parameter(start.clone())

    def forward(self, c):
        return self.x - c


def half_square(difference, _):
    return difference.square().sum(-1).mean() / 2


def constant(c):
    """Batches of one sample: every worker's own centre."""
    while True:
        yield c[:, None], c[:, None]


def quadratic(c, start=None, **options):
    start = torch.zeros(c.shape[1], dtype=c.dtype) if start is None else start
    return Simulator(Point(start), constant(c), loss=half_square, **options)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()


def samples(n=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normal((n, 5), seed), torch.randint(0, 3, (n,), generator=generator)


def batches(workers, seed=0, size=4):
    x, y = samples()
    generator = torch.Generator().manual_seed(seed)
    split = dirichlet_split(y, workers, 1.0, generator=generator)
    return Batches(x, y, split, size, generator=generator)


def written_out(data, steps, *, n, f, lr, b, decay, attack, mix, max_norm=None):
    """Every worker's parameters after some steps, one worker after the other, with autograd."""
    h = n - f if attack else n
    models = [network() for _ in range(h)]
    momenta = [[torch.zeros_like(p) for p in m.parameters()] for m in models]
    for _ in range(steps):
        x, y = next(data)
        halves, flips = [], []
        for i, model in enumerate(models):
            params = list(model.parameters())
            flips.append(torch.autograd.grad(F.cross_entropy(model(x[i]), 2 - y[i]), params))
            grads = torch.autograd.grad(F.cross_entropy(model(x[i]), y[i]), params)
            grads = [g + decay * p.detach() for g, p in zip(grads, params, strict=True)]
            norm = math.sqrt(sum(g.square().sum().item() for g in grads))
            scale = min(1.0, max_norm / norm) if max_norm else 1.0
            momenta[i] = [b * m + (1 - b) * scale * g for m, g in zip(momenta[i], grads, strict=True)]
            half = [p.detach() - lr * m for p, m in zip(params, momenta[i], strict=True)]
            halves.append(torch.cat([v.reshape(-1) for v in half]))
        flat = torch.stack([torch.cat([g.reshape(-1) for g in fl]) for fl in flips]).mean(0)
        a, s = torch.stack(halves).mean(0), torch.stack(halves).std(0)
        bad = {"flip": -a, "alie": a + 1.5 * s, "label": a - lr * flat, "nan": a * math.nan}.get(attack)
        for i, model in enumerate(models):
            others = [v for j, v in enumerate(halves) if j != i] + ([bad] * f if attack else [])
            torch.nn.utils.vector_to_parameters(mix(halves[i], others), model.parameters())
    return torch.stack([torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models])


ATTACKS = {"flip": SignFlip(), "alie": ALIE(1.5), "label": LabelFlip(3), "nan": NaN(), None: None}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_steps_equal_a_loop_over_workers(attack, max_norm):
    options = dict(n=7, f=2, lr=0.3)
    h = 5 if attack else 7
    simulator = Simulator(
        network(), batches(h), momentum=0.8, weight_decay=0.01, max_norm=max_norm, attack=ATTACKS[attack], **options
    )
    for _ in range(10):
        simulator.step()
    expected = written_out(
        batches(h), 10, b=0.8, decay=0.01, attack=attack, mix=lambda own, others: nna(own, torch.stack(others), 2),
        max_norm=max_norm, **options,
    )  # fmt: skip
    assert_same([simulator.parameters], [expected], atol=CLOSE)
    assert simulator.steps == 10
    assert simulator.gradients == 10 * h * 4
    if attack in ("flip", "nan"):  # too far to be heard: all average the same vectors
        assert diameter(simulator.parameters) < CLOSE
    if attack == "alie":
        assert diameter(simulator.parameters) > 1e-3


@pytest.mark.parametrize("rule", ["trimmed_mean", "krum", "self_centered_clip", "geometric_median", "mean"])
def test_other_rules_and_functions_mix_alike(rule):
    made = mixer(rule)

    def by_hand(own, others, f=2):
        return made.mix(own, others if made.centred else [own, *others], f)

    options = dict(n=7, f=2, lr=0.3, momentum=0.8, attack=SignFlip())
    for given in (rule, made, by_hand):
        simulator = Simulator(network(), batches(5), mixer=given, **options)
        for _ in range(5):
            simulator.step()
        expected = written_out(batches(5), 5, n=7, f=2, lr=0.3, b=0.8, decay=0.0, attack="flip", mix=by_hand)
        assert_same([simulator.parameters], [expected], atol=CLOSE)


def test_one_worker_is_sgd_with_averaged_momentum():
    simulator = Simulator(network(), batches(1), n=1, f=0, lr=0.3, momentum=0.9)
    (p, m), data = (simulator.parameters[0].clone(), 0.0), batches(1)
    for _ in range(10):
        x, y = next(data)
        model = network()
        torch.nn.utils.vector_to_parameters(p, model.parameters())
        g = torch.autograd.grad(F.cross_entropy(model(x[0]), y[0]), list(model.parameters()))
        m = 0.9 * m + 0.1 * torch.cat([v.reshape(-1) for v in g])
        p = p - 0.3 * m
        simulator.step()
    assert_same([simulator.parameters[0]], [p], atol=CLOSE)


def test_without_attack_and_with_the_mean_it_is_data_parallel_sgd():
    c = normal((6, 4), 0)
    simulator = quadratic(c, n=6, f=0, lr=0.5, momentum=0.0, mixer="mean")
    for _ in range(60):
        simulator.step()
        assert_same([simulator.parameters], [simulator.parameters[:1].expand(6, -1)])
    assert_same([simulator.parameters[0]], [c.mean(0)], atol=CLOSE)


def test_the_first_step_is_each_workers_own():
    """In the official code all workers share one tensor until the first mixing, and so make each other's steps."""
    c = normal((4, 3), 1)
    simulator = quadratic(c, n=4, f=0, lr=0.5, momentum=0.0)
    simulator.step()
    assert_same([simulator.half], [0.5 * c], atol=1e-15)


def test_waiting_for_all_but_f_hears_every_attacker_and_random_others():
    simulator = quadratic(
        normal((9, 2), 0), n=11, f=2, lr=0.1, attack=NaN(), wait="n-f", generator=torch.Generator().manual_seed(0)
    )
    seen = set()
    for _ in range(20):
        heard = simulator._heard()
        assert heard.shape == (9, 8)
        for i, row in enumerate(heard.tolist()):
            assert row == sorted(set(row))
            assert i not in row
            assert row[-2:] == [9, 10]
            seen.add(tuple(row))
        simulator.step()
    assert len(seen) > 50
    assert simulator.parameters.isfinite().all()


@pytest.mark.parametrize("rule", ["nna", "trimmed_mean", "median"])
def test_waiting_for_all_but_f_mixes_what_was_heard(rule):
    simulator = quadratic(
        normal((7, 3), 0), n=9, f=2, lr=0.1, attack=SignFlip(), wait="n-f", mixer=rule, momentum=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    drawn, made = [], mixer(rule)
    draw = simulator._heard
    simulator._heard = lambda: drawn.append(draw()) or drawn[-1]
    for _ in range(3):
        simulator.step()
        everyone = torch.cat([simulator.half, simulator.sent.expand(2, -1)])
        for i, row in enumerate(drawn[-1].tolist()):
            ranks = row if made.centred else sorted([i, *row])
            expected = made.mix(simulator.half[i], list(everyone[ranks]), 2)
            assert_same([simulator.parameters[i]], [expected])


@pytest.mark.parametrize("wait", ["all", "n-f"])
def test_attackers_foresee_the_mixture(wait):
    """What they try is computed faster than the mixture itself, and is the same up to rounding."""
    tried = []

    def attack(view):
        for z in (-3.0, 0.0, 0.1, 1.0, 40.0, math.inf):
            v = view.honest.mean(0) + z * view.honest.std(0)
            tried.append((v, view.mix(v), simulator._mix(view.honest, v, heard[-1])))
        return view.honest[0]

    simulator = quadratic(
        normal((9, 3), 0), n=11, f=2, lr=0.1, momentum=0.5, attack=attack, wait=wait,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    heard, draw = [], simulator._heard
    simulator._heard = lambda: heard.append(draw()) or heard[-1]
    for _ in range(5):
        simulator.step()
    for _, foreseen, actual in tried:
        assert_same([foreseen], [actual], atol=CLOSE)


def test_gradients_may_be_mixed_first():
    c = normal((5, 3), 2)
    simulator = quadratic(
        c, n=7, f=2, lr=0.5, momentum=0.0, mixer="trimmed_mean", attack=SignFlip(), mix_gradients=True
    )
    simulator.step()
    bad = torch.cat([-c, c.mean(0).expand(2, -1)])  # the gradient at zero is -c
    step = bad.sort(0).values[2:5].mean(0)
    assert_same([simulator.half], [(-0.5 * step).expand(5, -1)], atol=CLOSE)


@pytest.mark.parametrize("attack", [ALIE(), FOE()])
def test_searching_attacks_hurt_the_mean_more_than_nna(attack):
    c, away = normal((9, 6), 3) + 1, {}
    for rule in ("mean", "nna"):
        simulator = quadratic(c, n=11, f=2, lr=0.1, momentum=0.9, mixer=rule, attack=attack)
        for _ in range(60):
            simulator.step()
        away[rule] = (simulator.parameters.mean(0) - c.mean(0)).norm().nan_to_num(nan=math.inf).item()
    assert away["nna"] < 5
    assert away["mean"] > 100


def test_what_is_given_is_left_alone_and_seeds_repeat():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    ends = []
    for _ in range(2):
        simulator = Simulator(model, batches(5), n=7, f=2, lr=0.3, attack=ALIE())
        for _ in range(3):
            simulator.step()
        ends.append(simulator.parameters)
    assert_same(ends[:1], ends[1:])
    assert_same(model.parameters(), before)
    x, _ = samples()
    outputs = simulator.outputs(x)
    assert outputs.shape == (5, 120, 3)
    torch.nn.utils.vector_to_parameters(simulator.parameters[2], model.parameters())
    assert_same([outputs[2]], [model(x)], atol=CLOSE)


def test_bad_input():
    c = normal((5, 2), 0)
    for name, value, message in (
        ("lr", -0.1, "lr must be >= 0"), ("lr", math.nan, "lr must be finite"), ("momentum", 1.0, r"momentum must be in \[0, 1\)"),
        ("momentum", -0.1, "momentum must be in"), ("weight_decay", -1.0, "weight_decay must be >= 0"),
        ("max_norm", 0.0, "max_norm must be > 0"), ("f", -1, "f must be at least 0"), ("f", 3, "half or more faulty: f=3 of 5"),
        ("n", 0, "n must be at least 1"), ("wait", "n_f", "wait must be one of 'all', 'n-f', got 'n_f'; did you mean 'n-f'"),
        ("mixer", "nnaa", "did you mean 'nna'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quadratic(c, **{**dict(n=5, f=1, lr=0.1), name: value})
    with pytest.raises(ValueError, match="f must be at least 1, got 0"):
        quadratic(c, n=5, f=0, lr=0.1, attack=NaN())
    with pytest.raises(ValueError, match="f=2 of 4"):
        quadratic(c, n=6, f=2, lr=0.1, wait="n-f")
    with pytest.raises(ValueError, match="batches must be for 4 honest workers, got 5"):
        quadratic(c, n=6, f=2, lr=0.1, attack=NaN()).step()


# Data.


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_splits_follow_the_dirichlet_distribution(alpha):
    labels = torch.arange(2000) % 10
    split = dirichlet_split(labels, 50, alpha, generator=torch.Generator().manual_seed(0))
    assert split.shape == (50, 40)
    assert all(len(set(row)) == 40 for row in split.tolist())  # no sample twice
    shares = torch.stack([torch.bincount(labels[row], minlength=10) for row in split]) / 40
    # The variance of a share is p (1 - p) / (1 + 10 alpha), and sampling 40 adds p (1 - p) / 40 of what is left.
    expected = 0.09 * (1 / (1 + 10 * alpha) + (1 - 1 / (1 + 10 * alpha)) / 40)
    assert shares.var(0).mean().item() == pytest.approx(expected, rel=0.3)
    assert len(split.unique()) > 50 * 40 * 0.4  # workers overlap, but not much


def test_classes_that_run_out_are_filled_up():
    labels = torch.tensor([0] * 5 + [1] * 95)
    split = dirichlet_split(labels, 20, 0.05, each=60, generator=torch.Generator().manual_seed(1))
    assert all(len(set(row)) == 60 for row in split.tolist())
    for bad in (0, 101):
        with pytest.raises(ValueError, match="each must be"):
            dirichlet_split(labels, 2, 1.0, each=bad)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1e\+38\), got 0.0"):
        dirichlet_split(labels, 2, 0.0)


def test_batches_go_through_each_workers_samples():
    x = torch.arange(40.0)
    split = torch.arange(20).view(2, 10) * 2
    data = Batches(x, x.long(), split, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        first, second = next(data), next(data)
        for i in range(2):
            assert sorted([*first[0][i].tolist(), *second[0][i].tolist()]) == split[i].tolist()
            assert first[0][i].tolist() == first[1][i].tolist()
    growing = Batches(x, x, split, lambda step: step + 1)
    assert [next(growing)[0].shape[1] for _ in range(12)] == [*range(1, 11), 10, 10]
