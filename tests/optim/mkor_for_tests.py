"""What MKOR's tests share: small models, and a float64 reference in NumPy that inverts matrices instead of updating inverses."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from polyak.optim import MKOR, MKORH
from polyak.optim.mkor.reduction import average

MOMENTUM = 0.9
OTHERS = dict(inv_freq=1, factor_dtype=torch.float64)


def mlp(*widths, seed=0, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def conv_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4, bias=False), nn.Tanh(),
        nn.Linear(4, 2),
    ).double()  # fmt: skip


def data(rows, *shape, seed=0, dtype=torch.float64):
    """Inputs that are not centred, as means are what MKOR sees."""
    return (torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5).to(
        dtype
    )


def batches(count, start=0):
    return [data(4, 3, seed=start + t) for t in range(count)]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)


def mkor(model, **options):
    return MKOR(model, sgd(model), **{"factor_dtype": torch.float64, "inv_freq": 2, **options})


def train(model, optimizer, batches):
    """Mean squared outputs; returns the losses."""
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def backward(model, x, scale=1.0):
    """A pass with the mean squared output for its loss."""
    (scale * model(x).square().mean()).backward()


class Reference:
    """The specification in NumPy, for a Sequential of Conv2d, Linear, Tanh and Flatten with SGD and its momentum."""

    def __init__(
        self, model, *, lr=0.1, inv_freq=2, warmup_steps=0, decay=0.95, ema=False, threshold=2.0, blend=1.0, clip=100.0
    ):
        self.modules = list(model)
        self.weights = {i: _matrix(m) for i, m in enumerate(self.modules) if hasattr(m, "weight")}
        self.factors = {i: [None, None] for i in self.weights}
        self.flags = {i: [False, False] for i in self.weights}
        self.buffers = {i: np.zeros_like(w) for i, w in self.weights.items()}
        self.lr, self.inv_freq, self.warmup, self.decay, self.ema = lr, inv_freq, warmup_steps, decay, ema
        self.threshold, self.blend, self.clip, self.steps = threshold, blend, clip, 0

    def step(self, x):
        inputs, outputs = {}, {}
        leaves = {i: torch.from_numpy(w.copy()).requires_grad_() for i, w in self.weights.items()}
        for i, module in enumerate(self.modules):
            if i not in self.weights:
                x = module(x)
                continue
            if isinstance(module, nn.Conv2d):
                size = [
                    (n + 2 * p - k) // s + 1
                    for n, p, k, s in zip(x.shape[2:], module.padding, module.kernel_size, module.stride, strict=True)
                ]
                rows = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).mT
            else:
                rows = x
            if module.bias is not None:
                rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
            x = rows @ leaves[i].T
            x.retain_grad()
            inputs[i], outputs[i] = rows.detach(), x
            if isinstance(module, nn.Conv2d):
                x = x.mT.unflatten(2, size)
        x.square().mean().backward()
        if self.steps % self.inv_freq == 0 or self.steps < self.warmup:
            for i in self.weights:
                a, g = inputs[i], outputs[i].grad * len(inputs[i])
                if a.dim() == 3:
                    a, g = a.mean(1), g.mean(1)
                self._update(i, 0, a.clamp(-self.clip, self.clip).mean(0).numpy())
                self._update(i, 1, g.clamp(-self.clip, self.clip).mean(0).numpy())
        for i, w in self.weights.items():
            g, biased = leaves[i].grad.numpy(), self.modules[i].bias is not None
            u = self.factors[i][1] @ g @ self.factors[i][0]
            u = u * (_size(g, biased) / _size(u, biased))
            self.buffers[i] = MOMENTUM * self.buffers[i] + u if self.steps else u
            self.weights[i] = w - self.lr * self.buffers[i]
        self.steps += 1

    def _update(self, i, side, v):
        J, eye = self.factors[i][side], np.eye(len(v))
        if J is None:
            self.factors[i][side] = eye
        elif self.flags[i][side]:
            self.factors[i][side] = (1 - self.blend) * J + self.blend * eye
            self.flags[i][side] = False
        else:
            if self.ema:
                J = np.linalg.inv(self.decay * np.linalg.inv(J) + (1 - self.decay) * np.outer(v, v))
            else:
                P = self.decay * J + (1 - self.decay) * eye
                J = np.linalg.inv(np.linalg.inv(P) + np.outer(v, v))
            self.factors[i][side] = J
            if np.abs(J).max() > self.threshold:
                self.flags[i] = [True, True]


def _matrix(module):
    w = module.weight.detach().flatten(1)
    return (w if module.bias is None else torch.cat([w, module.bias.detach()[:, None]], 1)).double().numpy().copy()


def _size(matrix, biased):
    return np.linalg.norm(matrix[:, :-1]) + np.linalg.norm(matrix[:, -1]) if biased else np.linalg.norm(matrix)


def run(model, net, optimizer, inputs):
    """Two accumulated passes a step, the first without reduction where there is DDP."""
    for x in inputs:
        optimizer.zero_grad()
        first, second = x.chunk(2)
        with net.no_sync() if net is not model else nullcontext():
            (net(first).square().mean() / 2).backward()
        (net(second).square().mean() / 2).backward()
        optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


def images(count):
    return [data(8, 2, 5, 5, seed=t) for t in range(count)]


def ranks(rank, folder, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
        results, words = {}, []
        reduce = dist.all_reduce
        dist.all_reduce = lambda t, *a, **k: (words.append(t.numel()), reduce(t, *a, **k))[1]
        for low in (False, True):
            model = conv_net()
            net = nn.parallel.DistributedDataParallel(model)
            optimizer = mkor(net, factor_dtype=torch.float32 if low else torch.float64)
            assert set(optimizer.factors) == {"0", "3", "5"}
            # Each pass of both ranks together sees the half of the batch that one process's pass sees.
            mine = [torch.cat([half.chunk(2)[rank] for half in x.chunk(2)]) for x in images(7)]
            results[low] = run(model, net, optimizer, mine)
        results["words"] = list(words)
        # A layer that one rank does not use.
        model = conv_net()
        optimizer = mkor(model, inv_freq=1)
        for x in images(3):
            optimizer.zero_grad()
            out = model[:5](x) if rank else model(x)
            out.square().mean().backward()
            optimizer.step()
        value = torch.tensor([[1.0 + rank], [0.0 if rank else 5.0], [0.0]])
        (found,) = average([(value, 2 * value, torch.tensor([1.0, 1.0 - rank, 0.0]))], None)
        results["average"] = [t.numpy() for t in found]
        results["unused"] = [f.numpy() for f in optimizer.factors["5"]]
        hybrid = MKORH(model, sgd(model), window=1, process_group=None)
        switched = []
        for t in range(4):
            hybrid.observe([8.0, 4.0, 3.9, 3.8][t] if rank else [8.0, 4.0, 2.0, 1.0][t])
            hybrid.step()
            switched.append(hybrid.preconditions)
        results["switched"] = switched
        queue.put((rank, results))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        import traceback

        queue.put((rank, traceback.format_exc()))
        raise
