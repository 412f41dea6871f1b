"""MKOR's statistics: what is a row, what counts as one batch, and what leaves no trace."""

import math

import pytest
import torch
from mkor_for_tests import backward, data, mkor, mlp, train
from references_for_tests import assert_same, normal
from torch import nn

from polyak.optim.mkor.layers import Layer
from polyak.optim.mkor.statistics import input_mean, mean_patches, output_mean


def vectors(optimizer, name):
    """What a layer has gathered since the last step."""
    (layer,) = [layer for layer in optimizer._layers if layer.name == name]
    return layer.a / layer.passes, layer.g


def test_means_of_a_linear_layer():
    model, x = mlp(3, 2), data(5, 3)
    optimizer = mkor(model)
    y = model(x)
    y.retain_grad()
    y.square().mean().backward()
    a, g = vectors(optimizer, "0")
    assert_same([a, g], [torch.cat([x.mean(0), torch.ones(1)]), (5 * y.grad).mean(0)], atol=1e-15)


@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (5, 2, 3)])
def test_every_leading_dimension_is_rows(shape):
    layer = Layer.of("", nn.Linear(3, 2).double())
    x, g = normal((*shape, 3), 0), normal((*shape, 2), 1)
    rows = math.prod(shape)
    assert_same([input_mean(layer, x, 100.0, x.dtype)[:3]], [x.reshape(rows, 3).mean(0)], atol=1e-15)
    assert_same([output_mean(layer, g, 1e9, x.dtype, None, True)], [g.reshape(rows, 2).sum(0)], atol=1e-14)
    assert_same([output_mean(layer, g, 100.0, x.dtype, None, False)], [g.reshape(rows, 2).mean(0)], atol=1e-15)


CONVOLUTIONS = {
    "plain": dict(kernel_size=3),
    "strided": dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": dict(kernel_size=2, dilation=(2, 3), padding=2),
    "same": dict(kernel_size=(4, 3), padding="same"),
    "valid": dict(kernel_size=2, padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "circular": dict(kernel_size=3, padding=(1, 2), padding_mode="circular"),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mean_patches_are_what_the_convolution_sees(name, layout):
    """A convolution's mean over positions is its kernel applied to the mean patch: exactly, whatever the padding."""
    conv = nn.Conv2d(2, 3, bias=False, **CONVOLUTIONS[name]).double()
    x = normal((4, 2, 7, 6), 0).to(memory_format=layout)
    expected = conv(x).mean((2, 3))
    assert_same([mean_patches(conv, x) @ conv.weight.flatten(1).T], [expected], atol=1e-14)
    assert_same([mean_patches(conv, x[0])], [mean_patches(conv, x)[:1]], atol=1e-15)


def test_clamping_comes_before_the_mean():
    layer = Layer.of("", nn.Linear(1, 1).double())
    x = torch.tensor([[1000.0], [-1.0], [0.0], [0.0]], dtype=torch.float64)
    assert input_mean(layer, x, 100.0, x.dtype).tolist() == [99 / 4, 1.0]
    assert input_mean(layer, x, 0.5, x.dtype).tolist() == [0.0, 0.5]
    assert output_mean(layer, x, 100.0, x.dtype, None, True).tolist() == [(100 - 4) / 4]
    conv = Layer.of("", nn.Conv2d(1, 1, 1).double())
    maps = x.reshape(1, 1, 2, 2)
    assert input_mean(conv, maps, 100.0, x.dtype).tolist() == [100.0, 1.0]  # a row is a sample: 999/4, then clamped
    assert output_mean(conv, maps, 300.0, x.dtype, None, True).tolist() == [999 / 4]


def test_a_convolution_of_one_pixel_is_a_linear_layer():
    linear, conv = nn.Linear(4, 3).double(), nn.Conv2d(4, 3, 1).double()
    conv.load_state_dict({"weight": linear.weight.detach()[:, :, None, None], "bias": linear.bias.detach()})
    first, second = mkor(linear, inv_freq=1), mkor(conv, inv_freq=1)
    for t in range(5):
        x = data(6, 4, seed=t)
        train(linear, first, [x])
        train(conv, second, [x[:, :, None, None]])
    assert_same([conv.weight.flatten(1), conv.bias], [linear.weight, linear.bias], atol=1e-13)


def test_a_layer_without_bias_has_no_column_for_it():
    model = mlp(3, 2, bias=False)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, [data(4, 3, seed=t) for t in range(3)])
    assert [f.shape[-1] for f in optimizer.factors["0"]] == [3, 2]


def test_a_frozen_bias_has_no_column_either():
    model = mlp(3, 2)
    model[0].bias.requires_grad_(False)
    optimizer = mkor(model, inv_freq=1)
    before = model[0].bias.clone()
    train(model, optimizer, [data(4, 3, seed=t) for t in range(3)])
    assert optimizer.factors["0"][0].shape == (3, 3)
    assert torch.equal(model[0].bias, before)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_batches_are_one_batch(parts):
    x, model = data(6, 3), mlp(3, 5, 2)
    whole, pieces = mkor(model), mkor(model)
    backward(model, x)
    expected = [vectors(whole, name) for name in ("0", "2")]
    for optimizer in (whole, pieces):
        optimizer._forget()
    for part in x.chunk(parts):
        backward(model, part, 1 / parts)
    for name, (a, g) in zip(("0", "2"), expected, strict=True):
        assert_same(vectors(pieces, name), (a, g), atol=1e-15)


def test_a_module_used_twice_has_the_rows_of_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.inner(torch.tanh(self.inner(x)))

    model, x = Twice(), data(4, 3)
    optimizer = mkor(model)
    backward(model, x)
    a, g = vectors(optimizer, "inner")
    middle = torch.tanh(model.inner(x))
    assert_same([a[:3]], [torch.cat([x, middle]).mean(0)], atol=1e-15)
    assert_same([g], [model.inner.bias.grad], atol=1e-15)  # the sum over all rows of dL/dy


def test_g_is_the_gradient_of_the_bias():
    """Mean over N rows of N dL/dy: so where nothing is clamped, for any number of dimensions and passes."""
    model = mlp(3, 4, 2)
    optimizer = mkor(model)
    for seed, shape in enumerate([(5,), (2, 3), (2, 2, 2)]):
        backward(model, data(*shape, 3, seed=seed))
    for name in ("0", "2"):
        assert_same([vectors(optimizer, name)[1]], [model[int(name)].bias.grad], atol=1e-14)


def test_a_summed_loss_has_no_rows_to_undo():
    model, x = mlp(3, 2), data(4, 3)
    optimizer = mkor(model, loss_reduction="sum")
    for part in x.chunk(2):
        model(part).square().sum().backward()
    (stack,) = optimizer._stacks
    a, g, present = stack.vectors(optimizer.mean_loss)
    assert_same([g[0]], [model[0].bias.grad / 4], atol=1e-15)
    assert_same([a[0, :3]], [x.mean(0)], atol=1e-15)
    assert present.tolist() == [1.0]


def test_statistics_are_of_the_due_steps_alone():
    model = mlp(3, 2)
    optimizer = mkor(model, inv_freq=3, warmup_steps=2)
    due = []
    for t in range(9):
        optimizer.zero_grad()
        backward(model, data(4, 3, seed=t))
        due.append(optimizer._layers[0].passes)
        optimizer.step()
    assert due == [1, 1, 0, 1, 0, 0, 1, 0, 0]


def test_what_leaves_no_statistics():
    model, x = mlp(3, 2), data(4, 3)
    optimizer = mkor(model)
    layer = optimizer._layers[0]
    model(x)  # no backward pass
    with torch.no_grad():
        model(x)
    with optimizer.no_stats():
        backward(model, x)
        with optimizer.no_stats():
            pass
        backward(model, x)
    model(x[:0]).sum().backward()
    loss = model(x).sum()
    with optimizer.no_stats():
        loss.backward()
    assert layer.passes == 0
    backward(model, x)
    assert layer.passes == 1
    optimizer.zero_grad()
    assert layer.passes == 0
    backward(model, x)
    optimizer.step()
    assert layer.passes == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_passes_count_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    model, x = mlp(3, 4, 2), data(4, 3).requires_grad_()
    optimizer = mkor(model)
    backward(model, x)
    expected = [vectors(optimizer, name) for name in ("0", "2")]
    optimizer.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for name, pair in zip(("0", "2"), expected, strict=True):
        assert_same(vectors(optimizer, name), pair, atol=0)
    assert [layer.passes for layer in optimizer._layers] == [1, 1]
