"""What the optimizers' tests share: independent float64 references in NumPy, and small ways to feed an optimizer."""

from __future__ import annotations

import numpy as np
import torch


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes, dtype=torch.float64):
    return [torch.nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]


def gradients(shapes, steps, *, absent=(), scale=1.0, seed=1000):
    """``steps`` lists of gradients, one a parameter; ``absent`` holds the pairs (step, parameter) that have none."""
    return [
        [
            None if (t, i) in absent else scale * normal(shape, seed * (t + 1) + i)
            for i, shape in enumerate(shapes)
        ]
        for t in range(steps)
    ]  # fmt: skip


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.to(p.dtype).clone()


def run(optimizer, params, steps):
    """Step once for each list of gradients; returns the optimizer."""
    for grads in steps:
        give(params, grads)
        optimizer.step()
    return optimizer


def snapshot(params):
    return [p.detach().clone() for p in params]


def numbers(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def assert_same(actual, expected, *, atol=0.0, rtol=0.0):
    """Equal, or within the tolerance; NaN equals NaN."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = (torch.as_tensor(x).detach() for x in (a, e))
        torch.testing.assert_close(
            a, e.to(a.dtype), atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, i=i: f"tensor {i}: {m}"
        )


def adan(params, steps, options, *, with_state=False):
    """Adan as its specification has it, in NumPy; ``options`` are one dict for all parameters, or one for each."""
    defaults = dict(
        lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0, no_prox=False, maximize=False
    )
    each = [{**defaults, **o} for o in (options if isinstance(options, list) else [options] * len(params))]
    values = [np.array(p, dtype=np.float64) for p in params]
    state = [dict(m=np.zeros_like(p), v=np.zeros_like(p), n=np.zeros_like(p), g=None, t=0) for p in values]
    for grads in steps:
        arrays = [None if g is None else g.double().numpy() for g in grads]
        norm = np.sqrt(sum(np.sum(g**2) for g in arrays if g is not None))
        for i, (g, s, o) in enumerate(zip(arrays, state, each, strict=True)):
            if g is None:
                continue
            g = -g if o["maximize"] else g
            if o["max_grad_norm"] > 0:
                g = g * min(1.0, o["max_grad_norm"] / (norm + o["eps"]))
            b1, b2, b3 = o["betas"]
            s["t"] += 1
            d = np.zeros_like(g) if s["t"] == 1 else g - s["g"]
            s["m"] = b1 * s["m"] + (1 - b1) * g
            s["v"] = b2 * s["v"] + (1 - b2) * d
            s["n"] = b3 * s["n"] + (1 - b3) * (g + b2 * d) ** 2
            s["g"] = g
            denominator = np.sqrt(s["n"]) / np.sqrt(1 - b3 ** s["t"]) + o["eps"]
            u = (s["m"] / (1 - b1 ** s["t"]) + b2 * s["v"] / (1 - b2 ** s["t"])) / denominator
            if o["no_prox"]:
                values[i] = values[i] * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * u
            else:
                values[i] = (values[i] - o["lr"] * u) / (1 + o["lr"] * o["weight_decay"])
    return (values, state) if with_state else values


def _unit(u, norm):
    return np.divide(u, norm, out=np.zeros_like(u), where=norm != 0)


def _top(u, k):
    chosen = np.zeros(u.size)
    chosen[np.argsort(-np.abs(u.ravel()), kind="stable")[:k]] = 1
    return np.sign(u) * chosen.reshape(u.shape)


def _polar(u):
    left, values, right = np.linalg.svd(u.reshape(u.shape[0], -1), full_matrices=False)
    return ((left * (values > 1e-13 * values.max())) @ right).reshape(u.shape)


def _ns5(u):
    x = u.reshape(u.shape[0], -1)
    x = x if x.shape[0] <= x.shape[1] else x.T
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return (x if u.reshape(u.shape[0], -1).shape == x.shape else x.T).reshape(u.shape)


# name -> the direction D(c) of the Lion-K family, by its formula.
DIRECTIONS = {
    "L1()": np.sign,
    "L2()": lambda u: _unit(u, np.sqrt((u**2).sum())),
    "Lp(p=3.0)": lambda u: np.sign(u) * np.abs(u) ** 2 / (np.abs(u) ** 3).sum() ** (2 / 3),
    "DeadZone(e=0.1)": lambda u: np.sign(u) * (np.abs(u) > 0.1),
    "Huber(e=0.2)": lambda u: np.clip(u / 0.2, -1, 1),
    "Entropic(a=3.0)": lambda u: np.tanh(3 * u),
    "Relativistic(e=0.3)": lambda u: u / np.sqrt(u**2 + 0.09),
    "TopK(k=4)": lambda u: _top(u, 4),
    "Group(dim=0)": lambda u: _unit(u, np.sqrt((u.reshape(len(u), -1) ** 2).sum(1)).reshape(-1, *[1] * (u.ndim - 1))),
    "Nuclear(method='svd')": _polar,
    "Nuclear(method='ns5')": _ns5,
    "HalfSquare()": lambda u: u,
}


def lion(params, steps, direction, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Lion-K as its specification has it, in NumPy."""
    values = [np.array(p, dtype=np.float64) for p in params]
    buffers = [np.zeros_like(p) for p in values]
    for grads in steps:
        for i, g in enumerate(grads):
            if g is None:
                continue
            g = -g.double().numpy() if maximize else g.double().numpy()
            c = betas[0] * buffers[i] + (1 - betas[0]) * g
            values[i] = (1 - lr * weight_decay) * values[i] - lr * direction(c)
            buffers[i] = betas[1] * buffers[i] + (1 - betas[1]) * g
    return values
