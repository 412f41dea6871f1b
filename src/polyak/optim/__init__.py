"""Optimizers: drop-in ``torch.optim.Optimizer``s, each the rule of its paper run by one engine.

>>> from polyak.optim import Adan
>>> optimizer = Adan(model.parameters(), lr=1e-2, weight_decay=0.02)
"""

from polyak.optim.adamp import SGDP, AdamP
from polyak.optim.adan import Adan
from polyak.optim.lion import Lion, LionK
from polyak.optim.monna import MoNNA
from polyak.optim.spam import SPAM

__all__ = ["SGDP", "SPAM", "AdamP", "Adan", "Lion", "LionK", "MoNNA"]
