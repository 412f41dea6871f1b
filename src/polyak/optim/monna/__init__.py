"""MoNNA: robust collaborative learning without a server (Farhadkhani et al., arXiv 2209.10931; ICML 2023).

n workers, of whom at most f are faulty in any way. Each takes a local step with Polyak's momentum, sends its parameters to
all others, and goes on from the mean of those nearest to its own:

    m_i = b m_i + (1 - b) g_i        x_i = x_i - lr m_i        x_i <- mean of the n - f received vectors nearest to x_i

Momenta stay local: they average the noise out of the gradients, in which faulty vectors hide. Every worker evaluates as many
gradients as in plain data-parallel SGD. :mod:`~polyak.optim.monna.aggregators` has the other rules and what NNA guarantees,
:mod:`~polyak.optim.monna.attacks` the attacks, :class:`Simulator` runs all workers in one process, :class:`Peers` connects
workers that may die.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.core import checks
from polyak.optim._engine import RuleOptimizer
from polyak.optim._engine.tensors import is_dtensor
from polyak.optim.monna.aggregators import (
    RULE,
    Mixer,
    agreement,
    check_faulty,
    geometric_median,
    krum,
    mean,
    median,
    mixer,
    multi_krum,
    mva,
    nna,
    nnm,
    self_centered_clip,
    trimmed_mean,
)
from polyak.optim.monna.alike import checksum, text_sum
from polyak.optim.monna.peers import Peers
from polyak.optim.monna.rule import clipping, rule
from polyak.optim.monna.simulator import Batches, Simulator, dirichlet_split, reduction
from polyak.optim.monna.transport import Alone, Group, Lost, Patience, Received, Transport

__all__ = [
    "Batches",
    "Mixer",
    "MoNNA",
    "Peers",
    "Simulator",
    "agreement",
    "dirichlet_split",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "mixer",
    "multi_krum",
    "mva",
    "nna",
    "nnm",
    "reduction",
    "self_centered_clip",
    "trimmed_mean",
]


_HINT = (
    "seed all ranks alike, or broadcast those of one; a worker's own checkpoint is loaded after the optimizer is made"
)


class _Connections(checks.Kind):
    words = "None, a torch.distributed process group or Peers"

    def like(self, value: Any) -> bool:
        if value is None or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
            return True
        return all(hasattr(value, n) for n in ("rank", "size", "exchange", "serve")) and not callable(value.rank)

    def __call__(self, name: str, value: Any) -> Any:
        if not self.like(value):
            raise ValueError(f"{name} must be {self.words}, got {type(value).__name__}")
        return value


_GROUP = _Connections()


class _Buffers(checks.Kind):
    words = "floating-point tensors"

    def like(self, value: Any) -> bool:
        return checks.Stream().like(value)

    def __call__(self, name: str, value: Any) -> list[Tensor]:
        value = list(super().__call__(name, value))
        for b in value:
            if not isinstance(b, Tensor) or not b.is_floating_point():
                got = b.dtype if isinstance(b, Tensor) else checks.shown(b)
                raise ValueError(f"{name} must be {self.words}, got {got}")
        return value


_BUFFERS = _Buffers()


class MoNNA(RuleOptimizer):
    """Momentum steps that are mixed with the other workers' robustly (arXiv 2209.10931, Algorithm 1).

    Reads like data-parallel training, but do not wrap the model in DDP: gradients stay local, parameters are exchanged. All
    workers must start from the same parameters and call :meth:`step` equally often.

    Args:
        params: parameters or param groups (of lr, momentum and weight_decay): real, of one device, not sharded.
        lr: learning rate. ``momentum``: retention b in [0, 1); the gradient counts 1 - b, so that a step is as long as SGD's.
        f: how many of the n workers may be faulty; 2 f < n. NNA's guarantees need n > 5 f, or n > 7 f with ``wait="n-f"``.
        mixer: "nna", another rule's name, ``mixer(name, **options)``, or a function ``(own, others, f) -> mixed``.
        group: a process group (None: the default one; without any, this worker is alone), which tolerates wrong values
            only; or :class:`Peers`, which tolerates workers that die, stay silent or send anything.
        weight_decay: times the parameters, added to the gradient. max_norm: the sum's norm, over all groups, is clipped to it.
        wait: "all": for everyone; f less those missing are left out. "n-f": not for the f slowest; of the n - f (or more)
            that are there f are left out. Needs Peers.
        timeout: seconds that Peers wait for a silent worker, once; a process group has its own timeout.
        server: a rank, which must be honest, that mixes for all, from its own parameters; None: everyone for itself. It costs
            2 vectors of communication for each worker in place of n, and all agree to the bit.
        buffers: further floating-point tensors that are exchanged and mixed with the parameters (BatchNorm's statistics, say),
            which otherwise stay local, as in the official code.

    State: exp_avg. A worker whose own gradients are NaN has NaN parameters from then on: it is one of the f. A step that
    raises RuntimeError because too few workers answer leaves the parameters at the local half step.

    Raises:
        ValueError: hyperparameters out of range, 2 f >= n, unknown options; parameters, buffers or hyperparameters that differ
            between ranks of a process group when the optimizer is made or a param group is added (their bits are compared).
        RuntimeError: sparse gradients, or more than f workers do not answer.

    Example:
        >>> with Peers.connect() as peers:  # under torchrun
        ...     optimizer = MoNNA(model.parameters(), lr=0.5, f=2, group=peers)
        ...     loss.backward()
        ...     optimizer.step()
    """

    rule = staticmethod(rule)
    state_names = ("exp_avg",)
    numbers = ("lr", "momentum", "weight_decay")
    counts_steps = False
    declared: ClassVar = dict(momentum=checks.retention, weight_decay=checks.non_negative)

    @checks.arguments(
        f=checks.Integer(0), mixer=RULE, group=_GROUP, wait=checks.Choice("all", "n-f"), max_norm=checks.positive | None,
        timeout=checks.positive, server=checks.Integer(0) | None, buffers=_BUFFERS,
    )  # fmt: skip
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.99,
        *,
        f: int,
        mixer: str | Callable[[Tensor, list[Tensor], int], Tensor] | Mixer = "nna",
        group: Any = None,
        weight_decay: float = 0.0,
        wait: str = "all",
        max_norm: float | None = None,
        timeout: float = 30.0,
        server: int | None = None,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        self._transport = _transport(group)
        self._mixer = _named(mixer)
        self._f = check_faulty(self._transport.size, f)
        self._wait = wait
        if wait == "n-f" and isinstance(self._transport, Group):
            raise ValueError("wait='n-f' needs group=Peers(...): a process group's collectives wait for all")
        if wait == "n-f":
            check_faulty(self._transport.size - f, f)
        self._timeout, self._max_norm = timeout, max_norm
        if server is not None:
            checks.integer("server", server, least=0, most=self._transport.size - 1)
        self._server, self._buffers = server, list(buffers)
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self._begun = True
        self._compare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_transport" not in self.__dict__:  # an older pickle, which has no more than its momenta
            self._transport, self._mixer, self._max_norm, self._server = Lost(0, 1), mixer("nna"), None, None
            self._f, self._wait, self._timeout, self._buffers, self._begun = 0, "all", 30.0, [], True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. In a process group all ranks must add the same parameters, at the same time."""
        super().add_param_group(param_group)
        if getattr(self, "_begun", False):
            try:
                self._compare()
            except ValueError:
                self.param_groups.pop()
                raise

    def _compare(self) -> None:
        """Raise ValueError, on all ranks of a process group, where they do not start alike."""
        if not isinstance(self._transport, Group):
            return
        tensors, split = self._tensors(), -len(self._buffers) or None
        options = [[group[name] for name in ("lr", "momentum", "weight_decay")] for group in self.param_groups]
        mixer = (self._mixer.name, self._mixer.options, self._mixer.nnm)
        facts = {
            "number of elements=": sum(t.numel() for t in tensors),
            "shapes and types": text_sum([(t.shape, t.dtype) for t in tensors]),
            "f=": self._f,
            "server=": -1 if self._server is None else self._server,
            "mixer": text_sum(mixer),
            "max_norm": text_sum(self._max_norm),
            "lr, momentum and weight_decay": text_sum([[float(value) for value in group] for group in options]),
            f"values of parameters ({_HINT})": checksum(tensors[:split]),
            "values of buffers": checksum(self._buffers),
        }
        self._transport.check_alike(facts, tensors[0].device)

    def _check_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.is_complex() or is_dtensor(p):
                raise ValueError(f"MoNNA needs real parameters that are not sharded, got {type(p).__name__}, {p.dtype}")
        devices = sorted({str(t.device) for t in self._tensors()})
        if len(devices) > 1:
            raise ValueError(f"MoNNA needs parameters and buffers on one device, got {devices}")

    def _tensors(self) -> list[Tensor]:
        return [p.detach() for group in self.param_groups for p in group["params"]] + self._buffers

    def _type(self) -> torch.dtype:
        kinds = [t.dtype for t in self._tensors()]
        kind = kinds[0]
        for other in kinds[1:]:
            kind = torch.promote_types(kind, other)
        return kind

    def _extra(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if self._max_norm is None else ("clip",)

    def _prepare(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (g := p.grad) is not None and (g.device != p.device or g.dtype != p.dtype):
                    raise RuntimeError(
                        f"a gradient must have its parameter's type and device ({p.dtype}, {p.device}), got {g.dtype}, {g.device}"
                    )
                if g is not None and g.layout is not torch.strided:
                    raise RuntimeError(f"MoNNA does not support sparse gradients, got layout {g.layout}")
        if self._max_norm is None:
            return
        grads = [
            p.grad.add(p, alpha=group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        clip = clipping(torch.nn.utils.get_total_norm(grads), self._max_norm) if grads else torch.ones(())
        self._extra_values = [{"clip": clip} for _ in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A local step, the exchange, and the mixing; returns the closure's loss, where there is a closure."""
        if isinstance(self._transport, Lost):
            self._transport.refuse()
        loss = super().step(closure)
        with torch.no_grad():
            self._exchange()
        return loss

    def _exchange(self) -> None:
        tensors, kind = self._tensors(), self._type()
        vector = torch.cat([t.reshape(-1).to(kind) for t in tensors])
        n, transport = self._transport.size, self._transport
        patience = Patience(need=n - self._f, everyone=self._wait == "all", timeout=self._timeout)
        if self._server is None:
            mixed = self._mix(transport.exchange(vector, patience))
        else:
            mixed = transport.serve(vector, patience, self._server, self._mix)
        parts = mixed.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def _mix(self, received: Received) -> Tensor:
        own = received[self._transport.rank]
        rows = [v for v in received if v is not None]
        assert own is not None
        # Who is waited for and does not answer is faulty: so many fewer are among those who do.
        f = self._f - (len(received) - len(rows)) if self._wait == "all" else self._f
        if self._mixer.centred:
            rows = [v for r, v in enumerate(received) if v is not None and r != self._transport.rank]
        return self._mixer.mix(own, rows, f)


_named = mixer  # the constructor has an argument of that name


def _transport(group: Any) -> Transport:
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return Alone()
    if group is None or isinstance(group, dist.ProcessGroup):
        return Group(group)
    return group
