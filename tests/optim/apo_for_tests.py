"""A small model that has all that extrapolation must tell apart, and what APO's tests do with it."""

import torch
from torch import nn


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Small(nn.Module):
    """Tied embeddings, a buffer of floats and one of integers, a frozen layer."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed = nn.Embedding(7, 4, dtype=dtype)
        self.inner, self.frozen = nn.Linear(4, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype)
        self.head = nn.Linear(4, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(4, dtype=dtype))
        self.register_buffer("count", torch.tensor([3, 4]))
        self.frozen.requires_grad_(False)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(normal(*p.shape, seed=i))

    def forward(self, ids):
        return self.head(self.frozen(torch.tanh(self.inner(self.embed(ids)))) * self.scale)


def moved(model, seed=9, by=0.1):
    """The model, trained a little: every trainable weight has changed."""
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.data.add_(normal(*p.shape, seed=seed + i).to(p.dtype), alpha=by)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
