"""What a few seeds say of a mean: Student's t, corrected for many comparisons (Holm), and intervals of shares.

All functions take arrays: the last axis is over seeds (for Holm: over comparisons), all others are independent problems, so that
hundreds of simulated comparisons go the way of a single one.

*Infinities.* A diverged trial may score infinitely badly. Means and intervals with infinities are taken as the limit of ever larger
numbers put in their place: how often each sign of infinity occurs decides first, and an end that it leaves open is infinite.

*No spread.* Where all values are equal, so is the interval, and the p-value is a bound: of two arms that are alike, and independent
of each other, at most one in four pairs of outcomes differs by one certain amount, whatever these outcomes are. So n pairs agree to
the last digit on a difference that is not zero with probability 4^(1 - n) at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.05  # of two-sided tests; an interval holds 1 - LEVEL


@dataclass(frozen=True)
class Mean:
    """Means over seeds with their intervals; arrays of the shape of the problems.

    Args:
        low, high: the interval of level 1 - LEVEL.
        p: the two-sided p-value of a mean this far from zero.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def mean(values: Any) -> Mean:
    """Student's t over the last axis, of at least one value."""
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    infinite = np.isinf(x)
    finite, signs = np.where(infinite, 0.0, x), np.where(infinite, np.sign(x), 0.0)
    found, limit = _student(finite), _student(signs)
    lost = infinite.any(-1)
    equal = (x == x[..., :1]).all(-1)
    n = x.shape[-1]

    def of_both(own: np.ndarray, other: np.ndarray, at_zero: np.ndarray | float) -> np.ndarray:
        return np.where(lost, np.where(other == 0, at_zero, np.copysign(np.inf, other)), own)

    p = np.where(lost, limit.p, found.p)
    return Mean(
        np.where(equal, x[..., 0], of_both(found.mean, limit.mean, found.mean)),
        np.where(equal & (n > 1), x[..., 0], of_both(found.low, limit.low, -np.inf)),
        np.where(equal & (n > 1), x[..., 0], of_both(found.high, limit.high, np.inf)),
        np.where(equal & (n > 1), np.where(x[..., 0] == 0, 1.0, 4.0 ** (1 - n)), p),
    )


def _student(x: np.ndarray) -> Mean:
    """Of finite values, whose squares may overflow."""
    import numpy as np
    from scipy import special

    n = x.shape[-1]
    if n == 1:  # one seed says nothing about the others
        open_ = np.full(x.shape[:-1], np.inf)
        return Mean(x[..., 0], -open_, open_, np.ones(x.shape[:-1]))
    size = np.abs(x).max(-1, keepdims=True)
    scaled = x / np.where(size == 0, 1.0, size)
    middle, error = scaled.mean(-1), scaled.std(-1, ddof=1) / np.sqrt(n)
    reach = special.stdtrit(n - 1, 1 - LEVEL / 2) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(middle == 0, 0.0, np.abs(middle) / error)
    size = size[..., 0]
    return Mean(size * middle, size * (middle - reach), size * (middle + reach), 2 * special.stdtr(n - 1, -t))


def holm(p: Any) -> np.ndarray:
    """P-values corrected for their number over the last axis (Holm, 1979).

    The chance that any of what is decided by them is wrong is the level at most.
    """
    import numpy as np

    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, -1, kind="stable")
    steps = np.arange(p.shape[-1], 0, -1)
    ordered = np.maximum.accumulate(np.take_along_axis(p, order, -1) * steps, -1).clip(max=1.0)
    found = np.empty_like(p)
    np.put_along_axis(found, order, ordered, -1)
    return found


def share(count: float, n: int) -> tuple[float, float]:
    """The interval of a probability, of which ``count`` of ``n`` cases were seen (Clopper and Pearson, 1934; a tie counts half)."""
    from scipy import special

    low = float(special.betaincinv(count, n - count + 1, LEVEL / 2)) if count > 0 else 0.0
    high = float(special.betaincinv(count + 1, n - count, 1 - LEVEL / 2)) if count < n else 1.0
    return low, high
