"""Marginalization models against laws that are known by enumeration, in float64."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from polyak.core.exact import Ising
from polyak.generate import MarginalizationModel, MLPDual, PersistentChain, TransformerDual
from polyak.generate.marginalization import consistency_loss, data_loss, energy_loss
from polyak.generate.marginalization.values import random_ranks

DOUBLE = torch.float64
D, K, MANY = 4, 3, 6000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def states(values=range(1, K + 1), length=D):
    return torch.tensor(list(itertools.product(values, repeat=length)))


STATES, PARTIAL = states(), states(range(K + 1))


class Law(nn.Module):
    """The marginals and conditionals of a law over {1..K}^D, each summed up anew from the list of all states."""

    def __init__(self, log_p, length=D, values=K, shift=0.0):
        super().__init__()
        self.all, self.values, self.shift = states(range(1, values + 1), length), values, shift
        self.log_p = nn.Parameter(log_p.log_softmax(0))
        self.calls = []

    def forward(self, x):
        self.calls.append(x.clone())
        agree = ((x[:, None] == self.all) | (x[:, None] == 0)).all(2)
        joint = torch.where(agree, self.log_p, -math.inf)
        f = joint.logsumexp(1)
        member = self.all[:, :, None] == torch.arange(1, self.values + 1)  # [states, D, K]
        p = joint.exp() @ member.flatten(1).to(joint)
        return f + self.shift, p.unflatten(1, (x.shape[1], self.values)).clamp(min=1e-300).log()


def law(seed=0, **options):
    return Law(torch.randn(K**D, dtype=DOUBLE, generator=seeded(seed)), **options)


def model(seed=0, **options):
    return MarginalizationModel(law(seed, **options), K, D)


class Tables(nn.Module):
    """A free f for every partly known state, and free logits: what any network could say."""

    def __init__(self, f, length, values):
        super().__init__()
        self.base = (values + 1) ** torch.arange(length)
        self.f = nn.Parameter(f)
        self.tilts = nn.Parameter(torch.zeros(len(f), length, values, dtype=f.dtype))

    def forward(self, x):
        at = (x * self.base).sum(1)
        return self.f[at], self.tilts[at]


def mlp(dtype=DOUBLE, seed=0, length=D, values=K):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MarginalizationModel(MLPDual(values, length, 16, 2).to(dtype), values, length)


# What is said


def test_marginals_are_sums_over_what_is_unknown():
    one = model(shift=5.0)
    p = one.net.log_p.exp()
    for x, said in zip(PARTIAL, one.log_marginal(PARTIAL), strict=True):
        agree = ((x == STATES) | (x == 0)).all(1)
        assert said.item() == pytest.approx(p[agree].sum().log().item(), abs=1e-12)
    assert one.log_marginal(torch.zeros(2, D, dtype=torch.long)).tolist() == [0, 0]
    f, _ = one(torch.zeros(2, D, dtype=torch.long))  # not normalized
    torch.testing.assert_close(f.detach(), torch.full((2,), 5.0, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_a_marginal_is_that_of_its_extensions():
    one = model(shift=-3.0)
    for j in range(D):
        x = PARTIAL[PARTIAL[:, j] == 0]
        after = torch.stack([one.log_marginal(x.index_fill(1, torch.tensor(j), v)) for v in range(1, K + 1)], 1)
        torch.testing.assert_close(after.logsumexp(1), one.log_marginal(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(after.log_softmax(1), one.conditional(x, j)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_probabilities_of_one_call_and_of_chains_are_those_of_the_law(shift):
    one = model(shift=shift)
    for said in (one.log_prob(STATES), one.log_prob(STATES, "chain"), one.log_prob(STATES, "chain", 3)):
        torch.testing.assert_close(said, one.net.log_p, rtol=0, atol=1e-12)  # forgotten, f(nothing) would be seen


def test_a_chains_log_p_depends_on_the_order_unless_it_is_one_law():
    orders = [torch.tensor(order) for order in itertools.permutations(range(D))]
    one, other = model(), mlp()
    with torch.no_grad():
        spread = [torch.stack([m.log_prob(STATES, "chain", o) for o in orders]).std(0).max() for m in (one, other)]
        assert spread[0] < 1e-12
        assert spread[1] > 1e-3
        for order in orders:  # each order's add up to one all the same
            assert other.log_prob(STATES, "chain", order).logsumexp(0).abs() < 1e-12
        each = torch.stack([other.log_prob(STATES, "chain", o) for o in orders])
        many = other.log_prob(STATES, "chain", 500, generator=seeded())
        draw = seeded(1)
        two = torch.stack(
            [other.log_prob(STATES, "chain", random_ranks(len(STATES), D, STATES.device, draw)) for _ in "ab"]
        )
        mean = other.log_prob(STATES, "chain", 2, generator=seeded(1))
    torch.testing.assert_close(mean, two.exp().mean(0).log(), rtol=0, atol=1e-12)  # of probabilities, not of log p
    torch.testing.assert_close(many, each.logsumexp(0) - math.log(24), rtol=0, atol=5 * each.std(0).max() / 500**0.5)


def test_an_order_is_the_rank_of_each_position():
    """Position 2 is the first of these ranks; as a list of positions it would be position 1."""
    one, rank = mlp(), torch.tensor([1, 3, 0, 2])
    x = torch.tensor([[2, 1, 3, 2]])
    with torch.no_grad():
        total, seen = 0.0, torch.zeros_like(x)
        for j in rank.argsort().tolist():
            total += one.conditional(seen, j)[0, 0, x[0, j] - 1].item()
            seen[0, j] = x[0, j]
        assert one.log_prob(x, "chain", rank).item() == pytest.approx(total, abs=1e-12)
        assert one.log_prob(x, "chain", rank.argsort()).item() != pytest.approx(total, abs=1e-6)
        rows = torch.stack([rank, rank.argsort()])
        both = one.log_prob(x.expand(2, -1), "chain", rows)
        torch.testing.assert_close(both[:1], one.log_prob(x, "chain", rank), rtol=0, atol=1e-12)
    net = law()
    MarginalizationModel(net, K, D).sample(1, order=rank, generator=seeded())
    known = [set(seen[0].nonzero()[:, 0].tolist()) for seen in net.calls]
    assert known == [set(), {2}, {2, 0}, {2, 0, 3}]


# The samples


def close_to(drawn, log_p, sigmas=5.0):
    """Whether counts of states are those of a law, by chi squared: mean n, deviation sqrt(2 n)."""
    index = ((drawn - 1) * K ** torch.arange(D - 1, -1, -1)).sum(1)
    counts, expected = torch.bincount(index, minlength=K**D), log_p.detach().exp() * len(drawn)
    n = K**D - 1
    return abs(((counts - expected) ** 2 / expected).sum().item() - n) < sigmas * math.sqrt(2 * n)


FLAT = torch.randn(K**D, dtype=DOUBLE, generator=seeded(4)) * 0.5


@pytest.mark.parametrize("order", ["random", "forward", torch.tensor([1, 3, 0, 2])])
def test_samples_are_of_the_law_in_any_order(order):
    one = MarginalizationModel(Law(FLAT), K, D)
    drawn = one.sample(MANY, order=order, generator=seeded(1))
    assert drawn.dtype == torch.long
    assert close_to(drawn, one.net.log_p)
    assert not close_to(drawn.flip(1), one.net.log_p)


def test_what_is_given_stays_and_the_rest_is_of_the_conditional_law():
    one = MarginalizationModel(Law(FLAT), K, D)
    given = torch.tensor([0, 2, 0, 1])
    drawn = one.sample(4000, given, generator=seeded(1))
    assert (drawn[:, [1, 3]] == given[[1, 3]]).all()
    agree = ((given == STATES) | (given == 0)).all(1)
    p = one.net.log_p.exp()[agree]
    p = p / p.sum()
    counts = torch.stack([(drawn == s).all(1).sum() for s in STATES[agree]]).double()
    assert ((counts / 4000 - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
    rows = PARTIAL[:: len(PARTIAL) // 50]
    drawn = one.sample(len(rows), rows, generator=seeded())
    assert ((drawn == rows) | (rows == 0)).all()
    assert (drawn > 0).all()
    whole = one.sample(2, STATES[:2])
    assert torch.equal(whole, STATES[:2])
    assert whole.data_ptr() != STATES.data_ptr()
    assert one.sample(0).shape == (0, D)


def test_an_order_goes_the_same_way_with_and_without_what_is_given():
    """Official code draws what is conditioned from the highest rank down, and all else upwards."""
    net = law()
    one = MarginalizationModel(net, K, D)
    ways = []
    for given in (None, torch.tensor([0, 0, 2, 0])):
        net.calls.clear()
        one.sample(1, given, "forward", generator=seeded())
        ways.append([(seen[0] == 0).nonzero()[:, 0].tolist() for seen in net.calls])
    assert ways == [[[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]], [[0, 1, 3], [1, 3], [3]]]


class Misled(nn.Module):
    """Exact conditionals that are told, as by official code, that those still erased are known, and the known are not."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.zeros_like(x))


@pytest.mark.parametrize("steps", [1, 2, D])
def test_a_chain_with_exact_conditionals_stays_in_its_law(steps):
    one = MarginalizationModel(Law(FLAT), K, D)
    chain = PersistentChain(MANY, D, K)
    for net, stays in ((one, True), (MarginalizationModel(Misled(one.net), K, D), False)):
        chain.x = one.sample(MANY, generator=seeded(2))
        before = chain.x
        for _ in range(2):
            after = chain.refresh(net, steps, generator=seeded(3))
        assert torch.equal(after, chain.x)
        assert close_to(chain.x, one.net.log_p) == stays
        if steps == 1:
            assert 0 < ((before != after).sum(1) > 0).double().mean() < 1


def test_a_chain_erases_so_many_positions_of_each_row_and_goes_to_the_law():
    net = Law(2 * FLAT)
    one, chain = MarginalizationModel(net, K, D), PersistentChain(MANY, D, K, generator=seeded())
    assert close_to(chain.x, torch.full((K**D,), -D * math.log(K), dtype=DOUBLE))
    chain.refresh(one, 2, generator=seeded(1))
    assert [(seen == 0).sum(1).unique().tolist() for seen in net.calls] == [[2], [1]]
    assert len((net.calls[0] == 0).unique(dim=0)) == 6  # each row has positions of its own
    assert not close_to(chain.x, one.net.log_p)
    for seed in range(8):
        chain.refresh(one, 2, generator=seeded(10 + seed))
    assert close_to(chain.x, one.net.log_p)
    again = PersistentChain(MANY, D, K)
    again.load_state_dict(chain.state_dict())
    assert torch.equal(again.refresh(one, generator=seeded()), chain.refresh(one, generator=seeded()))


# The losses


def test_the_loss_of_consistency_is_zero_where_it_is_one_law():
    one = model(shift=2.0)
    loss = consistency_loss(one, STATES, seeded(), log_z=2.0)
    assert loss < 1e-20
    assert torch.autograd.grad(loss, one.net.log_p)[0].abs().max() < 1e-9
    assert consistency_loss(one, STATES, seeded(), log_z=0.5).item() == pytest.approx(1.5**2, abs=1e-12)


def test_the_loss_of_consistency_is_d_times_the_mean_over_orders_and_steps():
    one, x = mlp(), STATES[[17]]
    with torch.no_grad():
        errors = []
        for order in itertools.permutations(range(D)):
            for d in range(D):
                before = torch.zeros_like(x)
                before[0, list(order[:d])] = x[0, list(order[:d])]
                after = before.clone()
                after[0, order[d]] = x[0, order[d]]
                step = one.conditional(before, order[d])[0, 0, x[0, order[d]] - 1]
                errors.append((one.f(before) + step - one.f(after)).square().item())
        n = 10_000
        got = consistency_loss(one, x.expand(n, -1), seeded(), log_z=one.f(torch.zeros_like(x))[0])
    errors = torch.tensor(errors)
    assert got.item() == pytest.approx(D * errors.mean().item(), abs=5 * D * errors.std().item() / n**0.5)


class Raised(Law):
    """f is one more where so many positions are known."""

    known = 0

    def forward(self, x):
        f, logits = super().forward(x)
        return f + ((x > 0).sum(1) == self.known), logits


@pytest.mark.parametrize(("known", "steps"), [(0, 1), (1, 2), (D - 1, 2), (D, 1)])
def test_every_step_has_its_part_in_the_loss_of_consistency(known, steps):
    net = Raised(FLAT)
    net.known = known
    with torch.no_grad():
        got = consistency_loss(
            MarginalizationModel(net, K, D), STATES.repeat(100, 1), seeded(), log_z=float(known == 0)
        )
    part = steps / D  # of D steps, each of error 1
    assert got.item() == pytest.approx(steps, abs=5 * D * math.sqrt(part * (1 - part) / (100 * K**D)))


def test_both_marginals_and_the_conditional_have_the_gradient_of_consistency():
    f = torch.randn((K + 1) ** D, dtype=DOUBLE, generator=seeded(1))
    one = MarginalizationModel(Tables(f, D, K), K, D)
    net, x = one.net, STATES[[50]]
    loss = consistency_loss(one, x, seeded(3), log_z=net.f[0].item())
    of_f, of_logits = torch.autograd.grad(loss, (net.f, net.tilts))
    before, after = (
        of_f.nonzero()[:, 0].sort().values.tolist() if of_f.count_nonzero() == 2 else pytest.fail("one side")
    )
    assert of_f[before].item() == pytest.approx(-of_f[after].item(), rel=1e-12)
    error = of_f[before].item() / (2 * D)
    assert loss.item() == pytest.approx(D * error**2, rel=1e-12)
    assert of_logits.abs().max() > 0
    assert of_logits.sum().abs() < 1e-12  # of a log-softmax


def test_the_loss_on_data_is_the_mean_over_orders_of_chains():
    one, x = mlp(), STATES[[17, 40]]
    with torch.no_grad():
        each = torch.stack([one.log_prob(x, "chain", torch.tensor(o)) for o in itertools.permutations(range(D))])
        losses = torch.stack([data_loss(one, x.repeat(MANY // 20, 1), seeded(s)) for s in range(20)])
    assert losses.mean().item() == pytest.approx(-each.mean().item(), abs=5 * losses.std().item() / 20**0.5 + 1e-12)
    assert losses.std() < 0.1
    exact = model()
    p = exact.net.log_p.detach().exp()
    rows = STATES[torch.multinomial(p, MANY, replacement=True, generator=seeded())]
    entropy = -(p * p.log()).sum().item()
    assert data_loss(exact, rows, seeded()).item() == pytest.approx(entropy, abs=0.1)  # it is the least that there is


def held(counts):
    chain = PersistentChain(int(counts.sum()), D, K)
    chain.x = STATES.repeat_interleave(counts, 0)
    return chain


COUNTS = torch.randint(1, 9, (K**D,), generator=seeded(5))
TARGET = torch.randn(K**D, dtype=DOUBLE, generator=seeded(6))


def density(x, log_p=TARGET):
    return log_p[((x - 1) * K ** torch.arange(D - 1, -1, -1)).sum(1)]


def enumerated(target):
    """The gradient of KL(p || target) in f, by autograd on the sum over all states; p in proportion to COUNTS."""
    f = COUNTS.double().log().requires_grad_()
    log_p = f.log_softmax(0)
    return torch.autograd.grad((log_p.exp() * (log_p - target)).sum(), f)[0], log_p.detach()


def tables(log_p):
    f = torch.zeros((K + 1) ** D, dtype=DOUBLE)
    index = (STATES * (K + 1) ** torch.arange(D)).sum(1)
    f[index] = log_p
    return MarginalizationModel(Tables(f, D, K), K, D), index


@pytest.mark.parametrize("constant", [0.0, 12.0])
def test_reinforce_is_the_gradient_of_the_divergence_by_the_deviation_of_its_reward(constant):
    exact, log_p = enumerated(TARGET)
    one, index = tables(log_p + constant)
    loss = energy_loss(one, lambda x: density(x) - 2 * constant, held(COUNTS), alpha=0.0)
    grad = torch.autograd.grad(loss, one.net.f)[0][index]
    r = (log_p - TARGET).repeat_interleave(COUNTS)
    torch.testing.assert_close(grad * r.std(), exact, rtol=0, atol=1e-12)
    with_energy = energy_loss(one, lambda x: -density(x), held(COUNTS), alpha=0.0)
    wrong = torch.autograd.grad(with_energy, one.net.f)[0][index]
    assert torch.nn.functional.cosine_similarity(wrong, exact, dim=0) < 0.9  # the sign matters


def test_at_the_target_nothing_moves():
    _, log_p = enumerated(TARGET)
    one = MarginalizationModel(Law(log_p, shift=D * math.log(K)), K, D)
    loss = energy_loss(one, lambda x: density(x, log_p) + 41.0, held(COUNTS), generator=seeded())
    assert torch.autograd.grad(loss, one.net.log_p)[0].abs().max() < 1e-9
    assert loss.abs() < 1e-12  # f(nothing) is D log K


def test_the_energys_loss_has_alpha_of_consistency():
    one, chain = mlp(), held(COUNTS)
    with torch.no_grad():
        losses = [energy_loss(one, density, chain, a, generator=seeded()) for a in (0.0, 1.0, 4.0)]
        tied = consistency_loss(one, chain.x, seeded(), log_z=D * math.log(K))
    assert (losses[1] - losses[0]).item() == pytest.approx(tied.item(), rel=1e-9)
    assert (losses[2] - losses[0]).item() == pytest.approx(4 * tied.item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_equal_energies_of_equal_states_give_no_reward(dtype):
    one, chain = mlp(dtype), PersistentChain(300, D, K)
    chain.x = STATES[[7]].expand(300, -1).clone()
    parts = list(one.parameters())
    loss = energy_loss(one, lambda x: torch.full((len(x),), 0.1, dtype=dtype), chain, alpha=0.0)
    assert loss == 0
    assert all(g is None or not g.any() for g in torch.autograd.grad(loss, parts, allow_unused=True))


def test_what_is_impossible_is_taken_as_ten_nats_below_the_rest_with_a_warning():
    one, chain = mlp(), held(COUNTS)

    def clamped(x):
        return torch.where(x[:, 0] == 1, density(x)[x[:, 0] != 1].min() - 10, density(x))

    with torch.no_grad():
        expected = energy_loss(one, clamped, chain, generator=seeded())
        with pytest.warns(UserWarning, match=r"log_f is minus infinity for \d+ of"):
            got = energy_loss(one, lambda x: density(x).masked_fill(x[:, 0] == 1, -math.inf), chain, generator=seeded())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nowhere = energy_loss(one, lambda x: torch.full((len(x),), -math.inf), chain, generator=seeded())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert nowhere.isfinite()


def test_a_form_with_the_adjacency_counts_bonds_twice():
    """Official code's x'Jx + b x with sigma times the adjacency of a torus is the Ising model whose coupling is 2 sigma."""
    side, sigma, bias = 4, 0.1, 0.2
    index = torch.arange(side**2).reshape(side, side)
    adjacency = torch.zeros(side**2, side**2, dtype=DOUBLE)
    for shift, axis in itertools.product((1, -1), (0, 1)):
        adjacency[index.flatten(), index.roll(shift, axis).flatten()] = 1
    s = 2.0 * torch.randint(2, (50, side**2), generator=seeded()).double() - 1
    official = ((s @ (sigma * adjacency)) * s).sum(1) + bias * s.sum(1)
    torch.testing.assert_close(Ising(side, 2 * sigma, bias).log_density(s), official, rtol=0, atol=1e-12)
    assert (Ising(side, sigma, bias).log_density(s) - official).abs().max() > 0.1


# The networks


def networks(dtype=torch.float32):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return {
            "mlp": MLPDual(K, D, 16, 3).to(dtype),
            "transformer": TransformerDual(K, D, 16, 2, 2, 32).to(dtype),
        }


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_a_network_says_of_each_row_what_it_says_of_it_alone(name, dtype):
    one = MarginalizationModel(networks(dtype)[name], K, D)
    with torch.no_grad():
        f, logits = one(PARTIAL)
        wide = torch.promote_types(dtype, torch.float32)
        assert (f.shape, logits.shape) == ((len(PARTIAL),), (len(PARTIAL), D, K))
        assert f.dtype == logits.dtype == wide
        near = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(one.f(PARTIAL[5:6]), f[5:6], rtol=near, atol=near)
        torch.testing.assert_close(one.logits(PARTIAL[5:6]), logits[5:6], rtol=near, atol=near)
        some = one.heads(PARTIAL, 3)
        torch.testing.assert_close(some, (f, logits[:3]), rtol=near, atol=near)
    if dtype == DOUBLE:  # every position counts, and which value it has
        for j, v in itertools.product(range(D), range(1, K + 1)):
            x = torch.zeros(1, D, dtype=torch.long)
            x[0, j] = v
            assert (one.f(x) - one.f(torch.zeros_like(x))).abs() > 1e-6
        assert one.log_prob(STATES, "chain", 2, generator=seeded()).logsumexp(0).isfinite()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_values_may_be_whole_numbers_of_any_type(kind):
    one, x = mlp(), STATES.to(kind)
    assert torch.equal(one.log_prob(x), one.log_prob(STATES))
    assert torch.equal(one.log_prob(x, "chain", torch.arange(D)), one.log_prob(STATES, "chain", torch.arange(D)))
    assert torch.equal(data_loss(one, x, seeded()), data_loss(one, STATES, seeded()))
    assert one.sample(2, x[0] % 2, generator=seeded()).dtype == torch.long


def test_a_transformers_positions_and_its_first_token_are_in_their_places():
    """Without attention each position's logits are of its own value, and f is of none."""
    net = networks(DOUBLE)["transformer"]
    with torch.no_grad():
        for layer in net.body.layers:
            layer.self_attn.out_proj.weight.zero_()
        f, logits = net(PARTIAL)
        assert f.std() < 1e-12
        for j in range(D):
            same = torch.stack([logits[PARTIAL[:, j] == v, j].std(0).max() for v in range(K + 1)])
            assert same.max() < 1e-12
            assert logits[:, j].std(0).max() > 1e-3


def test_a_perceptron_is_that_of_the_paper():
    net = networks(DOUBLE)["mlp"]
    x = torch.tensor([[0, 3, 1, 2]])
    h = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0.0]], dtype=DOUBLE)
    for part, said in ((net.of_marginals, net(x)[0][:, None]), (net.of_conditionals, net(x)[1].flatten(1))):
        y = torch.nn.functional.leaky_relu(part.first(h))
        for layer in part.middle:
            y = y + torch.nn.functional.leaky_relu(layer(y))
        torch.testing.assert_close(said, part.last(y), rtol=0, atol=1e-13)
    assert len(net.of_marginals.middle) == 2
    assert sum(p.numel() for p in MLPDual(2, 100).of_marginals.parameters()) == 301 * 2048 + 3 * 2049 * 2048 + 2049


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_a_network_of_one_body_is_called_once(name):
    """With separate heads each is called for what is wanted of it alone."""
    net = networks()[name]
    rows = []
    part = net.of_conditionals if name == "mlp" else net.body
    part.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    one = MarginalizationModel(net, K, D)
    energy_loss(one, lambda x: x.sum(1).float(), held(torch.ones(K**D, dtype=torch.long)))
    n = K**D
    assert rows == ([n] if name == "mlp" else [3 * n + 1])


# Training


def test_an_energy_is_learned_and_its_marginals_with_it():
    """The Ising model of 2 x 2: samples are of its law, and subsets have its marginals."""
    law, generator = Ising(2, 0.3, 0.2), seeded(1)
    one, chain = mlp(torch.float32, 1, 4, 2), PersistentChain(128, 4, 2, generator=generator)
    optimizer = torch.optim.Adam(one.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 350)
    for _ in range(350):
        chain.refresh(one, 2, generator=generator)
        loss = energy_loss(one, lambda x: law.log_density(2 * x - 3).float(), chain, 0.5, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = states(range(3), 4)
    with torch.no_grad():
        error = one.log_marginal(x).double() - law.log_marginal(torch.where(x == 0, 0, 2 * x - 3))
        full = states((1, 2), 4)
        exact = law.log_prob(2 * full - 3)
        orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
        log_p = torch.stack([one.log_prob(full, "chain", order).double() for order in orders])
    # A law for each order; of an order for each row there would be none, and its divergence might be negative.
    divergences = (log_p.exp() * (log_p - exact)).sum(1)
    assert divergences.min() >= 0
    assert divergences.mean() < 0.05
    assert error.abs().mean() < 0.2


def test_a_golden_trajectory():
    """Three steps of gradient descent on tables: f by the formula, in plain Python."""
    log_f = [0.0, 1.0, -1.0, 0.5]
    full = states((1, 2), 2)
    base = torch.tensor([1, 3])
    net = Tables(torch.zeros(9, dtype=DOUBLE), 2, 2)
    net.base = base
    one, chain = MarginalizationModel(net, 2, 2), PersistentChain(4, 2, 2)
    chain.x = full
    index = (full * base).sum(1).tolist()
    f = [0.0] * 4
    for _ in range(3):
        loss = energy_loss(one, lambda x: torch.tensor(log_f, dtype=DOUBLE), chain, alpha=0.0)
        (grad,) = torch.autograd.grad(loss, net.f)
        with torch.no_grad():
            net.f -= 0.5 * grad
        r = [a - b for a, b in zip(f, log_f, strict=True)]
        mean = sum(r) / 4
        std = math.sqrt(sum((a - mean) ** 2 for a in r) / 3)
        f = [a - 0.5 * (b - mean) / std / 4 for a, b in zip(f, r, strict=True)]
        assert net.f[index].tolist() == pytest.approx(f, abs=1e-12)
    assert f == pytest.approx([-0.05493, 0.38449, -0.49435, 0.16478], abs=5e-4)


# Bad input

X = STATES[:6]
WRONG = {
    "a value beyond K": (lambda m: m.log_prob(X + 1), r"x must have values 1 to 3, got 4"),
    "unknown in log_prob": (lambda m: m.log_prob(X - 1), r"x must have values 1 to 3, got 0"),
    "a value below 0": (lambda m: m.log_marginal(X - 2), r"x_partial must have 0 \(unknown\) or values 1 to 3, got -1"),
    "unknown in training": (lambda m: data_loss(m, X - 1), r"x must have values 1 to 3, got 0"),
    "and in consistency": (lambda m: consistency_loss(m, X * 0), r"x must have values 1 to 3, got 0"),
    "no rows": (lambda m: data_loss(m, X[:0]), r"x must have a row"),
    "floats": (lambda m: m(X.double()), r"x must be whole numbers"),
    "truths": (lambda m: m(X > 1), r"x must be whole numbers"),
    "another length": (lambda m: m(X[:, :2]), r"x must have shape \[B, 4\], got \(6, 2\)"),
    "given beyond K": (lambda m: m.sample(2, X[0] + 3), r"given must have 0 \(unknown\) or values 1 to 3, got \d"),
    "given of other rows": (lambda m: m.sample(2, X), r"given must have one row, or one for each of n=2 draws, got 6"),
    "an order of others": (lambda m: m.sample(2, X[:2], torch.zeros(3, D).long()), r"order must be ranks, .*\(2, 4\)"),
    "no order": (
        lambda m: m.sample(2, order=torch.tensor([0, 1, 1, 3])),
        r"order must have the ranks 0 to 3, each once",
    ),
    "ranks from one": (lambda m: m.sample(2, order=torch.tensor([1, 2, 3, 4])), r"order must have the ranks 0 to 3"),
    "orders of floats": (lambda m: m.log_prob(X, "chain", torch.rand(D)), r"orders must be ranks, whole numbers"),
    "another method": (lambda m: m.log_prob(X, "chains"), r"method must be one of .* did you mean 'chain'"),
    "another order": (lambda m: m.sample(2, order="forwards"), r"order must be .*'forward'"),
    "no orders": (lambda m: m.log_prob(X, "chain", 0), r"orders must be"),
    "a known position": (lambda m: m.conditional(X, 1), r"positions must be unknown \(0\) in x, got \[1\]"),
    "a position beyond": (lambda m: m.conditional(X * 0, [0, 4]), r"positions must be in \[0, 4\), got \[0, 4\]"),
    "no positions": (lambda m: m.conditional(X * 0, []), r"positions must be whole numbers, one or more"),
    "too many steps": (
        lambda m: PersistentChain(2, D, K).refresh(m, 5),
        r"steps must be at most the 4 positions that there are, got 5",
    ),
    "a chain of others": (lambda m: PersistentChain(2, 5, K).refresh(m), r"model must have length 5 and 3 values"),
    "energies of NaN": (
        lambda m: energy_loss(m, lambda x: torch.full((len(x),), math.nan), held(COUNTS)),
        r"log_f must be finite or minus infinity, got NaN or infinity for \d+ of",
    ),
    "energies of infinity": (
        lambda m: energy_loss(m, lambda x: torch.full((len(x),), math.inf), held(COUNTS)),
        r"log_f must be finite or minus infinity",
    ),
    "energies of pairs": (
        lambda m: energy_loss(m, lambda x: x.double(), held(COUNTS)),
        r"log_f must give a floating-point",
    ),
    "whole energies": (lambda m: energy_loss(m, lambda x: x.sum(1), held(COUNTS)), r"log_f must give a floating-point"),
    "heads of a transformer": (lambda m: TransformerDual(K, D, 10, 3), r"dim must be a multiple of heads=3, got 10"),
    "a net of one number": (
        lambda m: MarginalizationModel(Law(FLAT), 2, D)(STATES.clamp(max=2)),
        r"net must give logits of shape \(81, 4, 2\), got \(81, 4, 3\)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_refused_by_name(what):
    one, (call, says) = mlp(), WRONG[what]
    before = copy.deepcopy(one.state_dict())
    with pytest.raises((TypeError, ValueError), match=says):
        call(one)
    assert all(torch.equal(a, before[name]) for name, a in one.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_does_not_wait_for_it():
    one, chain = mlp(torch.float32).cuda(), PersistentChain(64, D, K).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    optimizer = torch.optim.Adam(one.parameters(), 1e-3)

    def step():
        chain.refresh(one, 2, generator=generator)
        optimizer.zero_grad()
        (
            energy_loss(one, lambda x: x.sum(1).float(), chain, generator=generator)
            + data_loss(one, chain.x, generator)
        ).backward()
        optimizer.step()
        one.log_prob(chain.x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert one.sample(5, torch.tensor([0, 1, 0, 2]), generator=generator).is_cuda
