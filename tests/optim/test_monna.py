"""MoNNA's mixing rules, attacks and simulator against their definitions and what they guarantee."""

import itertools
import math

import numpy as np
import pytest
import torch
from references_for_tests import assert_same, normal

from polyak.optim.monna import (
    aggregators,
    agreement,
    geometric_median,
    krum,
    mean,
    median,
    mixer,
    multi_krum,
    mva,
    nna,
    nnm,
    reduction,
    self_centered_clip,
    trimmed_mean,
)
from polyak.optim.monna.attacks import ALIE, FOE, LabelFlip, Mimic, NaN, ScaledSignFlip, SignFlip, View, line_search
from polyak.optim.monna.simulator import diameter, spread

CLOSE = 1e-12  # float64, sums of a dozen numbers of order one, and their norms

RULES = {
    "nna": lambda x, f: nna(x[0], x[1:], f),
    "mean": lambda x, f: mean(x),
    "trimmed_mean": trimmed_mean,
    "median": lambda x, f: median(x),
    "geometric_median": lambda x, f: geometric_median(x, iters=80, eps=1e-9),  # still by 60, on such vectors
    "self_centered_clip": lambda x, f: self_centered_clip(x[0], x, tau=1.5),
    "krum": krum,
    "krum_original": lambda x, f: krum(x, f, variant="original"),
    "multi_krum": multi_krum,
    "mva": mva,
    "nnm": lambda x, f: nnm(x, f).mean(0),
}
OF_OWN = ("nna", "self_centered_clip")
ROBUST = [name for name in RULES if name not in ("mean", "nnm")]


def rotation(d, seed):
    return torch.linalg.qr(normal((d, d), seed))[0]


# The rules, each against its definition in NumPy.


def by_definition(name, x, f):
    k = len(x)
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    if name == "nna":
        return x[np.argsort(distances[0], kind="stable")[: k - f]].mean(0)
    if name == "mean":
        return x.mean(0)
    if name == "trimmed_mean":
        return np.sort(x, 0)[f : k - f].mean(0)
    if name == "median":
        return np.quantile(x, 0.5, axis=0)
    if name == "self_centered_clip":
        z = x[0]
        for _ in range(3):
            steps = [v - z for v in x]
            z = z + sum(s * min(1, 1.5 / max(np.linalg.norm(s), 1e-300)) for s in steps) / k
        return z
    if name in ("krum", "krum_original", "multi_krum"):
        power, count = (2, k - f - 2) if name == "krum_original" else (1, k - f - 1)
        scores = [sum(sorted(np.delete(distances[i], i) ** power)[:count]) for i in range(k)]
        return x[np.argsort(scores, kind="stable")[: k - f]].mean(0) if name == "multi_krum" else x[np.argmin(scores)]
    if name == "mva":
        subsets = [list(s) for s in itertools.combinations(range(k), k - f)]
        return x[min(subsets, key=lambda s: x[s].var(0).sum())].mean(0)
    if name == "nnm":
        return np.stack([x[np.argsort(distances[i], kind="stable")[: k - f]].mean(0) for i in range(k)]).mean(0)
    raise AssertionError(name)


@pytest.mark.parametrize("name", [n for n in RULES if n != "geometric_median"])
@pytest.mark.parametrize(("k", "f"), [(5, 1), (8, 2), (11, 3)])
def test_rules_equal_their_definitions(name, k, f):
    for seed in range(5):
        x = normal((k, 6), seed)
        assert_same([RULES[name](x, f)], [by_definition(name, x.numpy(), f)], atol=CLOSE)


def test_the_geometric_median_is_three_weiszfeld_steps_from_zero():
    x, z = normal((7, 4), 0) + 3, np.zeros(4)
    for _ in range(3):
        w = 1 / np.maximum(np.linalg.norm(x.numpy() - z, axis=1), 0.1)
        z = (w[:, None] * x.numpy()).sum(0) / w.sum()
    assert_same([geometric_median(x)], [z], atol=CLOSE)


def test_the_geometric_median_minimizes_the_sum_of_distances():
    x = normal((7, 3), 2)
    z = geometric_median(x, iters=200, eps=1e-9)
    unit = (x - z) / (x - z).norm(dim=1, keepdim=True)
    assert unit.sum(0).norm() < 1e-9


def test_sorting_networks_sort():
    for k in range(1, 28):
        # A network that sorts all sequences of zeros and ones sorts everything; here a thousand of them for each length.
        x = torch.randint(0, 2, (k, 1000), generator=torch.Generator().manual_seed(k)).double()
        assert torch.equal(torch.stack(aggregators._ascending(x.unbind(0))), x.sort(0).values)
    for k in range(1, 9):
        every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=k))).T
        assert torch.equal(torch.stack(aggregators._ascending(every.unbind(0))), every.sort(0).values)


# Properties.


def test_without_faults_nna_is_the_mean():
    x = normal((9, 5), 1)
    assert_same([nna(x[0], x[1:], 0)], [x.mean(0)], atol=CLOSE)
    assert_same([trimmed_mean(x, 0)], [x.mean(0)], atol=CLOSE)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_vectors_stay(name, dtype):
    x = normal((1, 40), 3, dtype).expand(7, 40)
    # Sums of equal numbers over their count round; differences of equal numbers do not. Weiszfeld's first step does.
    atol = torch.finfo(dtype).eps * 8 if name == "geometric_median" else 0.0
    result = nnm(x, 2)[1] if name == "nnm" else RULES[name](x, 2)
    assert result.dtype == dtype
    assert_same([result], [x[0]], atol=atol)


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("trimmed_mean", "median")])
def test_rotation(name):
    x, q = normal((9, 5), 4), rotation(5, 5)
    assert_same([RULES[name](x @ q, 2)], [RULES[name](x, 2) @ q], atol=1e-9 if name == "geometric_median" else 1e-11)


@pytest.mark.parametrize("name", RULES)
def test_translation(name):
    x, shift = normal((9, 5), 6), normal((5,), 7)
    # Weiszfeld's steps, once they have converged: from zero, three of them do not know the translation.
    assert_same(
        [RULES[name](x + shift, 2)], [RULES[name](x, 2) + shift], atol=1e-9 if name == "geometric_median" else 1e-11
    )


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_the_others_does_not_matter(name):
    x = normal((9, 5), 8)
    order = [0, 5, 2, 8, 1, 3, 7, 6, 4] if name in OF_OWN else [4, 5, 2, 8, 1, 3, 7, 6, 0]
    assert_same([RULES[name](x[order], 2)], [RULES[name](x, 2)], atol=1e-11)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_vectors_that_are_no_numbers_count_for_nothing(name, value):
    x = normal((9, 5), 9)
    for where in (slice(None), slice(2, 3)):
        bad = x.clone()
        bad[3, where], bad[6, where] = value, value
        result = RULES[name](bad, 2)
        assert result.isfinite().all()
        assert result.norm() <= x.norm(dim=1).max() * 3
    good = x[[0, 1, 2, 4, 5, 7, 8]]
    bad[3], bad[6] = value, value
    if name in ("nna", "multi_krum", "mva"):
        assert_same([RULES[name](bad, 2)], [RULES[name](good, 0)], atol=CLOSE)


def test_the_mean_is_not_robust():
    x = normal((9, 5), 9)
    x[3] = math.nan
    assert mean(x).isnan().all()


def test_inputs_are_left_alone():
    x = normal((9, 5), 10)
    x[2, 1] = math.nan
    before = x.clone()
    for rule in RULES.values():
        rule(x, 2)
    assert_same([x], [before])


@pytest.mark.parametrize("name", RULES)
def test_containers_of_tensors(name):
    x = normal((7, 10), 11)
    trees = [{"a": row[:6].view(2, 3), "b": [row[6:9], row[9]]} for row in x]
    result, expected = RULES[name](trees, 2) if name != "nnm" else nnm(trees, 2)[4], None
    expected = RULES[name](x, 2) if name != "nnm" else nnm(x, 2)[4]
    assert result["a"].shape == (2, 3)
    assert_same([result["a"].reshape(-1), result["b"][0], result["b"][1]], [expected[:6], expected[6:9], expected[9]])


def test_low_precision_distances_do_not_overflow():
    x = torch.full((5, 70_000), 2.0, dtype=torch.float16)
    x[1:] += torch.tensor([1.0, 2.0, 3.0, 300.0], dtype=torch.float16)[:, None]  # norms up to 79,000
    assert_same([nna(x[0], x[1:], 1)], [x[0] + 1.5])


# What NNA guarantees.


def test_a_vector_farther_than_every_honest_one_never_enters():
    for seed in range(50):
        x = normal((9, 6), seed)
        honest, far = x[:7], x[7:]
        largest = (honest - honest[0]).norm(dim=1).max()
        far = honest[0] + far / far.norm(dim=1, keepdim=True) * largest * 1.001
        assert_same([nna(honest[0], torch.cat([honest[1:], far]), 2)], [honest.mean(0)], atol=CLOSE)


def test_the_result_is_within_the_largest_honest_distance():
    for seed in range(200):
        x = normal((9, 3), seed)
        x[7:] *= 10.0 ** (seed % 5 - 3)
        largest = (x[:7] - x[0]).norm(dim=1).max()
        assert (nna(x[0], x[1:], 2) - x[0]).norm() <= largest * (1 + 1e-12)


def test_near_copies_enter_with_the_weight_of_their_number():
    k, f, r = 9, 2, 0.5
    honest = torch.cat([torch.zeros(1, 4), torch.eye(4).repeat(2, 1)[:6]]).double()
    bad = torch.tensor([0.0, 0.0, 0.0, -r]).double().expand(f, 4)
    without = nna(honest[0], honest[1:], 0)
    moved = nna(honest[0], torch.cat([honest[1:], bad]), f)
    assert moved[3] < without[3]
    assert (moved - nna(honest[0], torch.cat([honest[1:], honest[:1].expand(f, 4)]), f)).norm() <= f / (
        k - f
    ) * r + CLOSE


@pytest.mark.parametrize(("n", "f", "wait"), [
    (6, 1, "all"), (11, 2, "all"), (7, 2, "all"), (8, 3, "all"), (8, 1, "n-f"), (15, 2, "n-f"), (11, 3, "n-f"),
])  # fmt: skip
def test_honest_workers_agree_within_the_bound(n, f, wait):
    """Against faulty vectors that differ from receiver to receiver and drive two of them apart as far as they can."""
    bound, worst = agreement(n, f, faulty=f, wait=wait), 0.0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        honest = normal((n - f, 1 + seed % 2), seed)
        if seed % 3 == 0:
            honest = honest.sign() + 1e-3 * honest  # two camps
        first, last = honest[0], honest[-1]
        apart = (first - last) / (first - last).norm()
        mixed = []
        for i, own, away in ((0, first, apart), (n - f - 1, last, -apart)):
            others = torch.cat([honest[:i], honest[i + 1 :]])
            if wait == "n-f":
                others = others[torch.randperm(len(others), generator=generator)[: n - 2 * f - 1]]
            reach = (others - own).norm(dim=1).max()
            bad = [(own + share * reach * away).expand(f, -1) for share in (0.3, 0.7, 0.999, 1.2)]
            mixed.append(max((nna(own, torch.cat([others, v]), f) for v in bad), key=lambda x, away=away: x @ away))
        distance = ((mixed[0] - mixed[1]).norm() / diameter(honest)).item()
        worst = max(worst, distance)
        assert distance <= bound + CLOSE
    assert worst > 0.5 * bound  # what is sent does harm


def test_the_bound_counts_who_is_missing():
    assert agreement(11, 2, faulty=2) == 8 / 9
    assert agreement(8, 3, faulty=3, answering=1) == 4 / 5
    assert agreement(8, 3, faulty=3, answering=0) == 0
    assert agreement(15, 2, faulty=2, wait="n-f") == 10 / 11
    with pytest.raises(ValueError, match="faulty must be at most 2"):
        agreement(11, 2, faulty=3)


def test_the_honest_spread_shrinks_when_attackers_stay_among_the_honest():
    for seed in range(50):
        honest = normal((11, 4), seed)
        weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(seed)).double()
        bad = weights / weights.sum(1, keepdim=True) @ honest
        mixed = torch.stack(
            [nna(honest[i], torch.cat([honest[:i], honest[i + 1 :], bad]), 2) for i in range(len(honest))]
        )
        found = reduction(honest, mixed)
        assert spread(mixed) <= spread(honest)
        assert found.alpha < 1
        assert reduction(honest, mixed, of="diameter").alpha < 1
        assert found.lam < 1


# Bad input.


@pytest.mark.parametrize("rule", [trimmed_mean, krum, multi_krum, mva, nnm, lambda x, f: nna(x[0], x[1:], f)])
def test_bad_numbers_of_faulty(rule):
    x = normal((6, 3), 0)
    with pytest.raises(ValueError, match="no rule tolerates half or more faulty: f=3 of 6"):
        rule(x, 3)
    with pytest.raises(ValueError, match="f must be at least 0, got -1"):
        rule(x, -1)
    with pytest.raises(TypeError, match=r"f must be an integer, got 1\.5"):
        rule(x, 1.5)


def test_bad_vectors():
    x = normal((6, 3), 0)
    with pytest.raises(ValueError, match=r"one length, got lengths \[3, 4\]"):
        nna(x[0], [torch.zeros(3).double(), torch.zeros(4).double()], 0)
    with pytest.raises(ValueError, match=r"one length, got lengths \[2, 3\]"):
        nna(x[0, :2], x[1:], 1)
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        trimmed_mean(torch.zeros(5, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"shape \(k, d\), got \(3,\)"):
        median(x[0])
    with pytest.raises(ValueError, match="at least one vector"):
        median([])
    with pytest.raises(TypeError, match="containers of tensors, got"):
        median([[1.0], [2.0]])


def test_bad_options():
    x = normal((4, 3), 0)
    with pytest.raises(ValueError, match="variant must be one of 'repo', 'original', got 'repos'; did you mean 'repo'"):
        krum(x, 1, variant="repos")
    with pytest.raises(ValueError, match="needs more than 3 vectors, got 3"):
        krum(x[:3], 1, variant="original")
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau must be"):
            self_centered_clip(x[0], x, tau=bad)
        with pytest.raises(ValueError, match="eps must be"):
            geometric_median(x, eps=bad)
    with pytest.raises(ValueError, match="iters must be at least 1"):
        geometric_median(x, iters=0)
    with pytest.raises(ValueError, match=f"all {math.comb(24, 8)} subsets of 16 of 24 vectors"):
        mva(normal((24, 2), 0), 8)
    with pytest.raises(ValueError, match=r"rule must be one of .*; did you mean 'trimmed_mean'"):
        mixer("trimmed_means")
    with pytest.raises(ValueError, match="'self_centered_clip' has no option 'taw'; did you mean 'tau'"):
        mixer("self_centered_clip", taw=1.0)
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1e\+38\), got -1.0"):
        mixer("self_centered_clip", tau=-1.0)
    with pytest.raises(ValueError, match="'nna' has no option 'tau'"):
        mixer("nna", tau=1.0)


def test_mixers_by_name_are_the_rules():
    x = normal((9, 4), 1)
    own, others = x[0], list(x[1:])
    for name in aggregators.RULES:
        made = mixer(name)
        rows = others if made.centred else [own, *others]
        plain = {
            "mean": lambda: mean(x), "median": lambda: median(x), "geometric_median": lambda: geometric_median(x),
            "self_centered_clip": lambda: self_centered_clip(own, x, tau=2.0),
        }  # fmt: skip
        direct = plain.get(name, lambda n=name: RULES[n](x, 2))
        assert_same([made.mix(own, rows, 2)], [direct()])
        mixed = nnm(x, 2)
        again = mixer(name, nnm=True).mix(own, rows, 2)
        expected = made.mix(mixed[0], list(mixed[1:] if made.centred else mixed), 2)
        assert_same([again], [expected])


# Attacks.


def view(honest, *, f=2, mix=None, flipped=None, lr=0.1):
    return View(honest=honest, f=f, mix=mix or (lambda v: honest), flipped=flipped or (lambda change: honest[0]), lr=lr)


def test_attacks_are_what_they_say():
    honest = normal((5, 3), 0)
    a, s = honest.mean(0), honest.numpy().std(0, ddof=1)
    assert_same([SignFlip()(view(honest))], [-a])
    assert_same([ScaledSignFlip()(view(honest))], [-a * 5 / 2], atol=CLOSE)
    assert_same([ALIE(1.5)(view(honest))], [a.numpy() + 1.5 * s], atol=CLOSE)
    assert_same([FOE(1.1)(view(honest))], [-0.1 * a], atol=CLOSE)
    assert_same([Mimic()(view(honest))], [honest[0]])
    assert_same([Mimic(3)(view(honest))], [honest[3]])
    assert NaN()(view(honest)).isnan().all()
    seen = []
    flip = LabelFlip(10)(view(honest, flipped=lambda change: seen.append(change(torch.tensor([0, 3, 9]))) or honest[1]))
    assert_same([flip], [a - 0.1 * honest[1]], atol=CLOSE)
    assert seen[0].tolist() == [9, 6, 0]


def test_the_line_search_doubles_then_closes_in():
    asked = []

    def objective(z):
        asked.append(z)
        return -((z - 11.3) ** 2)

    best = line_search(objective)
    assert asked[:6] == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0]
    assert len(asked) == 16
    assert min(asked) >= 0
    assert best == min(asked, key=lambda z: abs(z - 11.3))
    assert abs(best - 11.3) < 1.0
    assert line_search(lambda z: -z) == 0.0


@pytest.mark.parametrize("attack", [ALIE, FOE])
def test_searching_attacks_use_the_workers_own_mixer(attack):
    honest = normal((9, 4), 1) + 2
    a = honest.mean(0)

    def worst(rule):
        def mix(v):
            x = torch.cat([honest, v.expand(2, -1)])
            return torch.stack([rule(x[[i, *(j for j in range(11) if j != i)]]) for i in range(9)])

        sent = attack()(view(honest, mix=mix))
        fixed = [attack(z)(view(honest)) for z in (0.0, 1.0)]
        moved = [(mix(v).mean(0) - a).norm().item() for v in (sent, *fixed)]
        assert moved[0] >= max(moved[1:])
        return sent

    # The mean follows without limit; NNA does not hear what is far.
    away = (worst(lambda x: mean(x)) - a).norm()
    assert (worst(lambda x: nna(x[0], x[1:], 2)) - a).norm() < away / 100


def test_bad_attack_options():
    with pytest.raises(ValueError, match="z must be finite"):
        ALIE(math.nan)
    with pytest.raises(ValueError, match="evaluations must be at least 1"):
        FOE(evaluations=0)
    with pytest.raises(ValueError, match="classes must be at least 2"):
        LabelFlip(1)
    with pytest.raises(ValueError, match="worker must be at least 0"):
        Mimic(-1)
