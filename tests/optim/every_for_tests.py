"""Every optimizer of polyak.optim.names(), made of a module or of param groups: for tests that are of all of them."""

import torch

import polyak.optim as po
from polyak.optim import MKOR

EXTRA = {"lionk": {"kappa": "l2"}, "monna": {"f": 0}}
NAMES = po.names()
PLAIN = [name for name in NAMES if not po.info(name).wraps]


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))


def base_of(name, params, **options):
    """The optimizer inside those that wrap."""
    return torch.optim.SGD(params, **{"lr": 0.05, "momentum": 0.9, **options})


def make(name, module, params=None, **options):
    """An optimizer of these parameters (None: all of the module's), which the module has."""
    given = list(module.parameters()) if params is None else params
    if po.info(name).wraps:
        return po.create(name, module, base=base_of(name, given, **options), inv_freq=2)
    return po.create(name, given, **{"lr": 0.02, **EXTRA.get(name, {}), **options})


def step(module, optimizer, count=1, start=0):
    """Steps with gradients of a loss that has no symmetry."""
    for t in range(count):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(start + t)) + 0.3
        optimizer.zero_grad()
        loss = module(x).pow(2).mean() + module[0].weight.sum() * 0.01
        if hasattr(optimizer, "observe"):
            optimizer.observe(1 / (1 + start + t))
        loss.backward()
        optimizer.step()


def outer(optimizer):
    """Where an optimizer keeps states and groups: the base, where there is one."""
    return optimizer.base if isinstance(optimizer, MKOR) else optimizer
