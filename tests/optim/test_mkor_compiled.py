"""MKOR in a compiled model: its statistics are part of the graph, and are those of the model that is not compiled."""

import gc
import itertools

import pytest
import torch
from mkor_for_tests import OTHERS, backward, batches, conv_net, data, images, mkor, mlp, sgd, train
from references_for_tests import assert_same
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from polyak.optim import MKOR, MKORH


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True, scope="module")
def _none_for_other_modules():
    yield
    torch._dynamo.reset()


def both(make, backend="eager", of=mkor, **options):
    """Model, what runs it and its optimizer: compiled and not."""
    model, twin = make(), make()
    return (model, torch.compile(model, backend=backend), of(model, **options)), (twin, twin, of(twin, **options))


def graphs():
    assert sum(counters["graph_break"].values()) == 0
    return counters["stats"]["unique_graphs"]


def assert_alike(first, second, atol=1e-14):
    assert_same(first[0].parameters(), second[0].parameters(), atol=atol)
    for name, pair in second[2].factors.items():
        assert_same(first[2].factors[name], pair, atol=atol)
        assert not torch.equal(pair[0], torch.eye(len(pair[0]), dtype=pair[0].dtype))


class Anew(torch.fx.Interpreter):
    """Runs a graph with gaps between the elements of every image, which none had when it was traced."""

    def run_node(self, n):
        made = super().run_node(n)
        image = isinstance(made, torch.Tensor) and made.dim() == 4 and n.op == "call_function"
        return torch.stack([made, made], -1)[..., 0] if image else made


def test_patches_are_seen_as_they_lie_in_memory():
    """Inductor lays tensors out anew; its own compilation takes ten seconds."""

    def convolution():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1)).double()

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(Anew(graph).run))
    compiled, plain = both(convolution, backend, inv_freq=1)
    for _, net, optimizer in (compiled, plain):
        train(net, optimizer, images(3))
    assert_alike(compiled, plain)


def test_a_deep_model_of_many_shapes_stays_compiled():
    compiled, plain = both(lambda: mlp(*range(3, 9)), inv_freq=1)
    for _, net, optimizer in (compiled, plain):
        train(net, optimizer, batches(3))
    assert_alike(compiled, plain)
    assert graphs() == 1  # no hook breaks it


def test_batches_of_other_sizes():
    compiled, plain = both(conv_net, inv_freq=1)
    inputs = [data(n, 2, 5, 5, seed=n) for n in (4, 6, 9)]
    for _, net, optimizer in (compiled, plain):
        train(net, optimizer, inputs)
    assert_alike(compiled, plain)
    assert graphs() == 2  # the second has a size that is not fixed


def test_accumulated_passes_and_shared_modules():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.outer(self.inner(self.inner(x).tanh()).tanh())

    compiled, plain = both(Twice)
    for _, net, optimizer in (compiled, plain):
        for t in range(5):
            optimizer.zero_grad()
            for part in range(2):
                backward(net, data(4, 3, seed=2 * t + part), 0.5)
            optimizer.step()
    assert_alike(compiled, plain)
    assert graphs() == 2  # one where the factors are due and one where they are not


def test_eager_and_compiled_passes_of_one_step_are_one_batch():
    compiled, plain = both(lambda: mlp(3, 4, 2), inv_freq=1)
    for model, net, optimizer in (compiled, plain):
        for t in range(3):
            optimizer.zero_grad()
            backward(net, data(4, 3, seed=2 * t), 0.5)
            backward(model, data(4, 3, seed=2 * t + 1), 0.5)
            optimizer.step()
    assert_alike(compiled, plain)


def test_passes_that_must_not_count():
    """Under no_stats, in evaluation, without a backward pass, or dropped by zero_grad."""
    compiled, plain = both(lambda: mlp(3, 4, 2), inv_freq=1)
    for _, net, optimizer in (compiled, plain):
        for t in range(3):
            x = data(4, 3, seed=t)
            backward(net, 7 + x)
            optimizer.zero_grad()
            with optimizer.no_stats():
                backward(net, 5 + x)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = None
            with torch.no_grad():
                net(3 + x)
            net(2 + x)
            attack, loss = net(4 + x).square().mean(), net(x).square().mean()
            with optimizer.no_stats():  # the backward pass alone, before that of another graph made outside
                torch.autograd.grad(attack, optimizer.param_groups[0]["params"])
            loss.backward()
            optimizer.step()
    assert_alike(compiled, plain)


@pytest.mark.parametrize("clear", [True, False])
def test_a_scaler_that_skips(clear):
    """The scale is read in the backward pass; what was gathered for a step that is skipped is left out."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    made = both(lambda: mlp(3, 4, 2, dtype=torch.float32), inv_freq=1, factor_dtype=torch.float32)
    for (model, net, optimizer), scaler in zip(made, scalers, strict=True):
        optimizer.scaler = scaler
        for t in range(6):
            (optimizer if clear else model).zero_grad()
            scaler.scale(net(data(4, 3, seed=t, dtype=torch.float32)).square().mean()).backward()
            if t in (0, 3):
                model[2].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert optimizer._steps == 4
    assert_alike(*made, atol=1e-6)
    assert graphs() == 1


def test_hooks_come_and_go():
    compiled, plain = both(lambda: mlp(3, 4, 2), of=lambda m, **o: MKOR(m, sgd(m), skip=["0"], **OTHERS))
    for _, net, optimizer in (compiled, plain):
        train(net, optimizer, batches(2))
        optimizer.remove()
        train(net, optimizer, batches(2, 2))
    assert_alike(compiled, plain)
    torch._dynamo.reset()  # PyTorch does not look whether a graph was compiled without hooks
    hybrid, twin = both(lambda: mlp(3, 4, 2), of=lambda m: MKORH(m, sgd(m), window=2, **OTHERS))
    for _, net, optimizer in (hybrid, twin):
        for t, x in enumerate(batches(6)):
            optimizer.observe(1.0 + t)
            train(net, optimizer, [x])
        assert not optimizer.preconditions
    assert_same(hybrid[0].parameters(), twin[0].parameters(), atol=1e-14)


def test_an_optimizer_that_is_gone_leaves_no_sums_behind():
    model = mlp(3, 2)
    net = torch.compile(model, backend="eager")
    optimizer = mkor(model, inv_freq=1)
    tallies = [layer.tally for layer in optimizer._layers]
    train(net, optimizer, batches(2))
    del optimizer
    gc.collect()
    backward(net, data(4, 3))
    assert all(not t.used and not t.a.any() for t in tallies)


def test_gradients_are_those_without_hooks_bit_for_bit():
    model, twin = mlp(3, 2), mlp(3, 2)
    optimizer = mkor(model, inv_freq=1)
    for m in (model, twin):
        backward(torch.compile(m, backend="aot_eager"), data(4, 3))
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert all(layer.tally.used for layer in optimizer._layers)


def test_an_exported_model_has_no_statistics():
    model = mlp(3, 4, 2)
    optimizer = mkor(model, inv_freq=1)
    exported = torch.export.export(model, (data(4, 3),))
    names = {str(node.target) for node in exported.graph.nodes}
    assert not any("add_" in name or "clamp" in name for name in names)
    assert all(not layer.tally.used for layer in optimizer._layers)
    assert list(itertools.chain(*exported.graph_signature.buffers_to_mutate)) == []


def test_a_model_that_was_compiled_before_is_told():
    """PyTorch does not guard on hooks: a graph that was made without them goes on without."""
    model = mlp(3, 2)
    net = torch.compile(model, backend="eager")
    backward(net, data(4, 3))
    optimizer = mkor(model, inv_freq=1)
    with pytest.warns(UserWarning, match="has seen no pass of its layers.*make the optimizer first"):
        train(net, optimizer, batches(3))
    torch._dynamo.reset()
    train(net, optimizer, batches(2))
    assert not torch.equal(optimizer.factors["0"][0], torch.eye(4).double())
