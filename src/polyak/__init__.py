"""polyak: published methods around momentum as parts of PyTorch, each with its paper's claim as an experiment.

Drop-in PyTorch parts (``polyak.optim``, ``polyak.generate``, ...), each with the claim of its paper as an experiment that
anyone can run (``polyak reproduce SLUG``). Importing this package imports no room.
"""

__version__ = "0.1.0"
