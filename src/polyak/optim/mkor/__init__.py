"""MKOR: momentum-enabled Kronecker-factor-based optimizer using rank-1 updates (Mozaffari et al., arXiv 2306.01685).

Each gradient of a Linear or Conv2d layer, its bias's beside it as one more column, is preconditioned from both sides,

    U = G [dW | db] A,    then scaled to ||U_W|| + ||U_b|| = ||dW|| + ||db||,

and handed to any first-order optimizer. Every ``inv_freq`` steps the inverse factors take in one mean vector each, a of the
layer's inputs and g of the gradients at its outputs, by Sherman-Morrison: O(d^2) work, and O(d) words between processes,

    J <- (P^-1 + v v^T)^-1 = P - (P v)(P v)^T / (1 + v^T P v),    P = 0.95 J + 0.05 I.

At its first update a factor becomes I. The paper's text has other coefficients; these are of the code that gave its tables.
"""

from polyak.optim.mkor.hybrid import MKORH
from polyak.optim.mkor.optimizer import MKOR

__all__ = ["MKOR", "MKORH"]
