"""Optimizers: drop-in ``torch.optim.Optimizer``s, each the rule of its paper run by one engine.

>>> from polyak.optim import Adan
>>> optimizer = Adan(model.parameters(), lr=1e-2, weight_decay=0.02)

or by name, as in ``create("adan", model, lr=1e-2)``; :func:`names` lists them all.
"""

from polyak.optim._registry import Info, create, info, names
from polyak.optim.adamp import SGDP, AdamP
from polyak.optim.adan import Adan
from polyak.optim.apo import APO
from polyak.optim.lion import Lion, LionK
from polyak.optim.mkor import MKOR, MKORH
from polyak.optim.monna import MoNNA
from polyak.optim.spam import SPAM

__all__ = [
    "APO",
    "MKOR",
    "MKORH",
    "SGDP",
    "SPAM",
    "AdamP",
    "Adan",
    "Info",
    "Lion",
    "LionK",
    "MoNNA",
    "create",
    "info",
    "names",
]
