"""The fields that an interpolant is solved with, each from what networks were trained to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.interpolants.path import Interpolant
from polyak.generate.process.path import TIME, one_for_each_row

Network = Callable[[Tensor, Tensor], Tensor]
NETWORK = checks.Function("a function (x, t) -> tensor", 2)
INTERPOLANT = checks.Instance(Interpolant, words="an Interpolant")
Eps = float | Callable[[Any], Any]
EPS = checks.non_negative | checks.Function("a function of t", 1)


def checked(name: str, said: Any, x: Tensor) -> Tensor:
    """What a network said at x, if it is a tensor of x's shape."""
    if not isinstance(said, Tensor) or said.shape != x.shape:
        got = tuple(said.shape) if isinstance(said, Tensor) else checks.shown(said)
        raise ValueError(f"{name} must return a tensor of x's shape {tuple(x.shape)}, got {got}")
    return said


class Fields:
    """``b``, ``v``, ``s`` and ``eta`` of an interpolant at (x, t), from one network, or one of each pair.

    With two sides: ``s = -eta / gamma`` and ``b = v - gamma gamma' s = v + gamma' eta``. One-sided, with z = x0: ``v = b``, and
    either network is enough, since ``x = a E[x0] + b E[x1]`` and ``v = a' E[x0] + b' E[x1]``. Mirror: ``b = -gamma gamma' s``.

    Args:
        interpolant: what the networks were trained with.
        b or v, s or eta: functions (x, t) of x, shape (B, ...), and t, shape (B,), of x's shape; at most one of each pair.

    Every method takes x of shape (B, ...) and t, a number or a tensor of shape () or (B,), and returns x's shape. What does not
    follow from the networks is a ValueError that says what is lacking.

    Example:
        >>> fields = Fields(Interpolant(), v=net_v, eta=net_eta)
        >>> x = integrate(fields, x0, eps=1.0, steps=100)
    """

    @checks.arguments(
        interpolant=INTERPOLANT, b=NETWORK | None, v=NETWORK | None, s=NETWORK | None, eta=NETWORK | None,
    )  # fmt: skip
    def __init__(
        self,
        interpolant: Interpolant,
        *,
        b: Network | None = None,
        v: Network | None = None,
        s: Network | None = None,
        eta: Network | None = None,
    ) -> None:
        if b is None and v is None and s is None and eta is None:
            raise ValueError("b or v, or s or eta, must be given")
        if b is not None and v is not None:
            raise ValueError("b and v: give one of the two, the other follows")
        if s is not None and eta is not None:
            raise ValueError("s and eta: give one of the two, the other follows")
        if v is not None and interpolant.mirror:
            raise ValueError("v must be left out: it is 0 on the mirror path")
        self.interpolant = interpolant
        self._nets = {"b": b, "v": v, "s": s, "eta": eta}

    def _ask(self, name: str, x: Tensor, t: float | Tensor) -> Tensor | None:
        """What the network of this name says, or None where there is none."""
        net = self._nets[name]
        if net is None:
            return None
        if isinstance(t, Tensor):
            told = one_for_each_row(t, x).to(device=x.device, dtype=x.dtype).expand(len(x))  # type: ignore[union-attr]
        else:
            told = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        return checked(name, net(x, told), x)

    def _need(self, *names: str) -> ValueError:
        return ValueError(f"{' or '.join(names)} must be given to Fields for this: it does not follow from the others")

    def _of(self, name: str, t: float | Tensor, x: Tensor) -> Any:
        return self.interpolant.coefficient(name, t, x)

    def _velocity(self, x: Tensor, t: float | Tensor) -> Tensor | None:
        """b or v of a path on which they are the same, if a network says it."""
        said = self._ask("b", x, t)
        return self._ask("v", x, t) if said is None else said

    def _solved(self, x: Tensor, t: float | Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``E[x0]`` and ``E[x1]`` from ``x = a E[x0] + b E[x1]`` and ``v = a' E[x0] + b' E[x1]``."""
        if self.interpolant.path == "encdec":
            raise ValueError("path 'encdec' never holds both ends, so that their means do not follow from the fields")
        a, b, da, db = (self._of(name, t, x) for name in ("a", "b", "da", "db"))
        over = 1 / (a * db - da * b)
        return over * (db * x - b * v), over * (a * v - da * x)

    @checks.arguments(x=checks.floating, t=TIME)
    def s(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The score ``grad log rho_t``."""
        said = self._ask("s", x, t)
        if said is not None:
            return said
        eta = self.eta(x, t)
        return -self._of("over_latent", t, x) * eta

    @checks.arguments(x=checks.floating, t=TIME)
    def eta(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[z | x_t = x]``; of a one-sided path ``E[x0 | x_t = x]``."""
        said = self._ask("eta", x, t)
        if said is not None:
            return said
        if self.interpolant.latent_free:
            raise self._need("eta")
        s = self._ask("s", x, t)
        if s is not None:
            return -self._of("latent", t, x) * s
        v = self._velocity(x, t) if self.interpolant.one_sided else None
        if v is None:
            raise self._need("s", "eta")
        return self._solved(x, t, v)[0]

    @checks.arguments(x=checks.floating, t=TIME)
    def b(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The velocity of the probability flow."""
        return self._both(x, t, score=False)[0]

    @checks.arguments(x=checks.floating, t=TIME)
    def v(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[dI/dt | x_t = x]``; of a one-sided path, whose x0 is part of I, the same as b."""
        path = self.interpolant
        if path.mirror:
            return torch.zeros_like(x)
        said = self._ask("v", x, t)
        if said is not None:
            return said
        if path.one_sided or path.noise == "zero":
            return self.b(x, t)
        b, s = self._both(x, t, score=True)
        return b + self._of("gg_dot", t, x) * s

    def _both(self, x: Tensor, t: float | Tensor, *, score: bool) -> tuple[Tensor, Any]:
        """b, and the score where it is asked for; every network is asked once."""
        path = self.interpolant
        b = self._velocity(x, t) if path.one_sided or path.noise == "zero" else self._ask("b", x, t)
        if path.one_sided and b is not None and score and self._nets["s"] is None and self._nets["eta"] is None:
            return b, -self._of("over_latent", t, x) * self._solved(x, t, b)[0]
        s = self.s(x, t) if score or (b is None and path.noise != "zero") else None
        if b is not None:
            return b, s
        if path.one_sided:
            eta = self.eta(x, t) if s is None else -self._of("a", t, x) * s
            weight = self._of("b", t, x)
            if not isinstance(weight, Tensor) and weight == 0:
                raise ValueError("t must be > 0: at t=0 b does not follow from the score; use t0 > 0")
            # E[x1] = (x - a E[x0]) / b
            return self._of("da", t, x) * eta + self._of("db", t, x) / weight * (x - self._of("a", t, x) * eta), s
        if path.mirror:
            return -self._of("gg_dot", t, x) * s, s
        v = self._ask("v", x, t)
        if v is None:
            raise self._need("b", "v")
        return v - self._of("gg_dot", t, x) * s, s

    @checks.arguments(x=checks.floating, t=TIME, eps=checks.real)
    def drift(self, x: Tensor, t: float | Tensor, eps: float = 0.0) -> Tensor:
        """``b + eps s``: of the forward SDE with noise level eps; with ``-eps`` that of the backward one."""
        b, s = self._both(x, t, score=eps != 0)
        return b if eps == 0 else b + eps * s

    @checks.arguments(x=checks.floating, t=TIME)
    def x1(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[x1 | x_t = x]``: on the linear path ``x + (1 - t) v + gamma^2 s``."""
        return self._means(x, t)[1]

    @checks.arguments(x=checks.floating, t=TIME)
    def x0(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[x0 | x_t = x]``; the mirror path has none."""
        if self.interpolant.mirror:
            raise ValueError("the mirror path has no x0")
        return self._means(x, t)[0]

    def _means(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        path = self.interpolant
        if path.one_sided or path.noise == "zero":
            return self._solved(x, t, self.b(x, t))
        gamma = self._of("gamma", t, x)
        if path.mirror:
            mean = x + gamma**2 * self.s(x, t)
            return mean, mean
        b, s = self._both(x, t, score=True)
        return self._solved(x + gamma**2 * s, t, b + self._of("gg_dot", t, x) * s)

    @checks.arguments(eps=checks.non_negative)
    def equation(self, eps: float = 0.0) -> Equation:
        """The forward equation as torchdiffeq's ``odeint`` takes it (eps = 0), or torchsde's ``sdeint``."""
        return Equation(self, eps)


class Equation:
    """``dX = (b + eps s) dt + sqrt(2 eps) dW``, whose functions are called with (t, x): t first, as these libraries do."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, fields: Fields, eps: float) -> None:
        self.fields, self.eps = fields, eps

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        return self.fields.drift(x, t, self.eps)

    f = __call__

    def g(self, t: Any, x: Tensor) -> Tensor:
        return torch.full_like(x, (2 * self.eps) ** 0.5)
