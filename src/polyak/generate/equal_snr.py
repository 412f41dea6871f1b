"""A trained denoiser on another path, by equal signal-to-noise ratio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Denoiser, Network
from polyak.generate.process import Process, expand, wide

_PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")


class _AtEqualSNR(Denoiser):
    """Asks a denoiser at the point of its own process that has the same signal-to-noise ratio."""

    def __init__(self, denoiser: Denoiser, new: Process) -> None:
        super().__init__(denoiser.model, new, "sample", unconditional=denoiser.unconditional)
        self.denoiser = denoiser
        old: Any = denoiser.process
        self._ends = old.lam(old.t_max), old.lam(old.t_min)

    def _run(self, model: Network, x: Tensor, t: float | Tensor) -> Tensor:
        old, new = self.denoiser.process, self.process
        assert isinstance(old, Process)
        assert isinstance(new, Process)
        t = t.to(wide(t.device)) if isinstance(t, Tensor) else float(t)
        lam = new.lam(t)
        low, high = self._ends
        there = old.t_of_lam(lam.clamp(low, high) if isinstance(lam, Tensor) else min(max(lam, low), high))
        ratio = _size(old, there) / _size(new, t)
        return self.denoiser._ask(model, expand(ratio, x) * x, there).x0


def _size(process: Process, t: float | Tensor) -> Any:
    return (process.alpha(t) ** 2 + process.sigma(t) ** 2) ** 0.5


@checks.arguments(denoiser=checks.Instance(Denoiser, words="a Denoiser"), old_process=_PROCESS, new_process=_PROCESS)
def reparametrize(denoiser: Denoiser, old_process: Process, new_process: Process) -> Denoiser:
    """A denoiser that was trained with one Gaussian process, on another.

    A state x of the new process is, scaled by the ratio of ``sqrt(alpha^2 + sigma^2)``, one of the old process at the time that has
    the same signal-to-noise ratio; of what is beyond the old process's ends, at its end.

    Args:
        denoiser: trained with ``old_process``; its network and its unconditional one are used as they are.
        old_process, new_process: both Gaussian.

    Returns:
        A denoiser of ``new_process`` that predicts the data ("sample").
    """
    if denoiser.process != old_process:
        raise ValueError(f"old_process must be the denoiser's own, {denoiser.process!r}, got {old_process!r}")
    for name, process in (("old_process", old_process), ("new_process", new_process)):
        if not process.is_gaussian:
            raise ValueError(f"{name} must have Gaussian noise, which {process!r} has not")
    return _AtEqualSNR(denoiser, new_process)
