"""Every backend of the engine is the eager reference, on every kind of tensor."""

import pytest
import torch

from polyak.core.cc import SPLIT
from polyak.optim import Adan, Lion, LionK
from polyak.optim.lion import kappa

SYSTEMS = {
    "adan": lambda p, **o: Adan(p, lr=1e-2, weight_decay=0.02, **o),
    "adan-clip": lambda p, **o: Adan(p, lr=1e-2, weight_decay=0.02, max_grad_norm=0.5, **o),
    "adan-no-prox": lambda p, **o: Adan(p, lr=1e-2, weight_decay=0.02, no_prox=True, maximize=True, **o),
    "lion": lambda p, **o: Lion(p, lr=1e-2, weight_decay=0.5, **o),
    "lion-huber": lambda p, **o: LionK(p, kappa.Huber(0.3), lr=1e-2, weight_decay=0.5, **o),
    "lion-dead-zone": lambda p, **o: LionK(p, kappa.DeadZone(0.2), lr=1e-2, weight_decay=0.5, **o),
    "lion-entropic": lambda p, **o: LionK(p, kappa.Entropic(2.0), lr=1e-2, weight_decay=0.5, **o),
    "lion-relativistic": lambda p, **o: LionK(p, kappa.Relativistic(0.2), lr=1e-2, weight_decay=0.5, **o),
    "lion-l2-all": lambda p, **o: LionK(p, kappa.L2("all"), lr=1e-2, weight_decay=0.5, **o),
}
SHAPES = [(), (0,), (1,), (3, 5), (16384,), (16385,), (SPLIT - 1,), (SPLIT,), (2 * SPLIT + 7,)]


def train(make, shapes, dtype, steps=4, **options):
    g = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    optimizer = make(params, **options)
    for t in range(steps):
        for i, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
            p.grad = None if (i == 3 and t in (0, 2)) else drawn  # one starts late and skips a step
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lists_are_the_loop_bit_for_bit(name, dtype):
    expected, _ = train(SYSTEMS[name], SHAPES, dtype, foreach=False)
    actual, optimizer = train(SYSTEMS[name], SHAPES, dtype, foreach=True)
    assert optimizer._plan.mode == "foreach"
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_is_the_loop_to_rounding(name, dtype):
    """Compiled rules do not contract multiply-adds: |p| < 8, two roundings of 2 eps in each of four steps."""
    expected, _ = train(SYSTEMS[name], SHAPES, dtype, foreach=False)
    actual, _ = train(SYSTEMS[name], SHAPES, dtype)
    ulp = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 16 * ulp if a.numel() else True


def test_without_a_compiler_lists_run(monkeypatch):
    from polyak.optim._engine import compiled

    monkeypatch.setattr(compiled, "rule", lambda *what: None)
    _, optimizer = train(SYSTEMS["adan"], [(4,)], torch.float32)
    assert optimizer._plan.mode == "foreach"


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {}])
def test_layouts_complex_and_strided_gradients(options):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    grads = [torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3)]
    plain = start.clone().requires_grad_()
    last = start.clone().to(memory_format=torch.channels_last).requires_grad_()
    other = start.clone().requires_grad_()
    optimizers = [Adan([p], lr=1e-2, **options) for p in (plain, last, other)]
    for grad in grads:
        plain.grad, last.grad = grad.clone(), grad.clone().to(memory_format=torch.channels_last)
        other.grad = grad.clone().to(memory_format=torch.channels_last)  # laid out unlike its parameter
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(last, plain, atol=1e-14, rtol=0)
    torch.testing.assert_close(other, plain, atol=1e-14, rtol=0)
    z = torch.randn(5, generator=g, dtype=torch.complex128).requires_grad_()
    r = torch.view_as_real(z.detach()).clone().requires_grad_()
    a, b = Adan([z], lr=1e-2, **options), Adan([r], lr=1e-2, **options)
    for _ in range(3):
        z.grad = torch.randn(5, generator=g, dtype=torch.complex128)
        r.grad = torch.view_as_real(z.grad).clone()
        a.step(), b.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), r.detach(), atol=1e-14, rtol=0)
