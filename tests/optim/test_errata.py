"""What official code and widespread implementations do, beside what their papers say and what the parts here do.

Each test is named by an erratum of a claim. What the others do is written out here in a few lines.
"""

import math

import pytest
import torch
from references_for_tests import normal, run

from polyak.optim import MKOR, SPAM, AdamP, Adan, Lion
from polyak.optim.monna import geometric_median, krum, nna
from polyak.optim.spam import warmup_scale


def weight(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_lion_with_coupled_decay_leaves_its_bound():
    """bitsandbytes added wd x to the gradient: then the sign sees it, and the weights go where the penalty has them."""
    centre = torch.tensor([10.0, -6.0, 0.3], dtype=torch.float64)
    ends = {}
    for coupled in (False, True):
        x = weight(0.0, 0.0, 0.0)
        optimizer = Lion([x], lr=0.01, weight_decay=0.0 if coupled else 1.0)
        for _ in range(2000):
            x.grad = x.detach() - centre + (x.detach() if coupled else 0)
            optimizer.step()
        ends[coupled] = x.detach()
    assert ends[False].abs().max() <= 1
    assert ends[False][:2].tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    torch.testing.assert_close(ends[True], centre / 2, atol=0.1, rtol=0.0)


def test_adamps_test_takes_the_cosines_size():
    """Equation 11 has no absolute value: there a gradient opposite to the weight would count as orthogonal to it."""
    w = normal((4, 50), 0)
    cosine, threshold = -1.0, 0.1 / math.sqrt(50)
    assert cosine < threshold  # the paper's words would project this step, and nothing would be left of it
    p = torch.nn.Parameter(w.clone())
    optimizer = AdamP([p], lr=0.1, record=True)
    run(optimizer, [p], [[-w]])
    assert optimizer.last_projection[p] is None
    torch.testing.assert_close(p.detach() - w, 0.1 * w.sign(), atol=1e-6, rtol=0.0)


def test_adan_with_a_groups_count_of_steps_starts_late_tensors_at_a_fifth():
    """The first gradient of a tensor, when its group has made 1000 steps: its averages are new, their correction is gone."""
    g, lr, (b1, b3), steps = torch.ones(3, dtype=torch.float64), 0.1, (0.98, 0.99), 1000
    m, n = (1 - b1) * g / (1 - b1**steps), (1 - b3) * g * g / (1 - b3**steps)
    official = lr * m / n.sqrt()
    assert official.tolist() == pytest.approx([0.2 * lr] * 3, rel=1e-4)
    early, late = weight(0.0), weight(0.0, 0.0, 0.0)
    optimizer = Adan([early, late], lr=lr)
    run(optimizer, [early, late], [[torch.ones(1), None]] * (steps - 1) + [[torch.ones(1), g]])
    assert late.tolist() == pytest.approx([-lr] * 3, rel=1e-6)


def test_adan_forgets_its_first_gradient_sooner_than_algorithm_1():
    """How much of the first gradient is in the corrected average, and in one that starts there, 50 steps later."""
    p = weight(0.0)
    optimizer = run(Adan([p]), [p], [[torch.ones(1)]] + [[torch.zeros(1)]] * 50)
    corrected = float(optimizer.state[p]["exp_avg"]) / (1 - 0.98**51)
    assert corrected == pytest.approx(0.02 * 0.98**50 / (1 - 0.98**51))
    assert 0.98**50 / corrected == pytest.approx((1 - 0.98**51) / 0.02)
    assert (round(corrected, 3), round(0.98**50, 2)) == (0.011, 0.36)


def test_mkors_vectors_that_are_averaged_twice_precondition_less():
    """A mean over 8 processes that is divided by 8 again: the factor hardly moves from I, and so does the direction."""
    factors = {}
    for again in (1, 8):
        model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.0), inv_freq=1, factor_dtype=torch.float64)
        for _ in range(200):
            optimizer.zero_grad()
            model(torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64) / again).sum().backward()
            optimizer.step()
        u = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64) / math.sqrt(10)
        A, _ = optimizer.factors[""]
        factors[again] = float(u @ A @ u)
    assert factors[1] < 0.1
    assert factors[8] > 0.25


def test_three_weiszfeld_steps_from_zero_depend_on_where_the_origin_is():
    """Far from zero all vectors are alike far: the first step is the plain mean, and two more do not make up for it."""
    x = normal((11, 4), 0)
    x[8:] += 30  # three of eleven are faulty
    honest = x[:8].mean(0)
    near, far = geometric_median(x), geometric_median(x + 100) - 100
    assert (geometric_median(x, iters=500, eps=1e-9) - honest).norm() < 2
    assert (far - near).norm() > 1
    assert (far - honest).norm() > 1.5 * (near - honest).norm()
    for shift in (0, 100):  # nearest neighbours leave the faulty out wherever they are
        assert (nna(x[0] + shift, x[1:] + shift, 3) - shift - honest).norm() < 1e-9


def test_krum_of_the_papers_code_is_not_krum():
    """Plain distances to one more neighbour: of 50 sets of seven vectors a third have another winner."""
    sets = [normal((7, 2), seed) for seed in range(50)]
    differ = [not torch.equal(krum(x, 2), krum(x, 2, variant="original")) for x in sets]
    assert 10 < sum(differ) < 30


def test_spams_script_never_ends_its_warmup():
    """It hands the learning rate's 1000 steps of warmup over as those of each reset, of which there is one every 500."""
    reached = [warmup_scale(k, 1000) for k in range(500)]
    assert max(reached) == reached[-1] == pytest.approx(0.503, abs=1e-3)
    with pytest.warns(UserWarning, match="never gets back"):
        SPAM([weight(0.0)], warmup_steps=1000)
    assert warmup_scale(150, 150) == 1
