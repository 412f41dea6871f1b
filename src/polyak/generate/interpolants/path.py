"""The interpolant itself: ``x_t = a(t) x0 + b(t) x1 + gamma(t) z``, its coefficients and their slopes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Flow, Generators, ProbabilityPath, Process, TrigFlow, expand, standard_normal, wide
from polyak.generate.process.path import TIME, one_for_each_row, unwatched

Schedule = Callable[[Tensor], Tensor]
SINGULAR = "the score is singular at the endpoint; use t0 > 0"
_ROUNDING = 1e-6  # what single precision may miss an end of [0, 1] by
_POINTS = 65  # at which a schedule of the user's own is looked at
_SCHEDULE = checks.Function("a function of t", 1)


@checks.arguments(a=_SCHEDULE, b=_SCHEDULE, one_sided=checks.flag)
class LinearPath(NamedTuple):
    """A path of one's own, ``I(t, x0, x1) = a(t) x0 + b(t) x1``; slopes are found by automatic differentiation.

    a, b: functions of a float64 tensor, with a(0) = b(1) = 1 and a(1) = b(0) = 0.
    one_sided: x0 is N(0, I) and plays the part of z.
    """

    a: Schedule
    b: Schedule
    one_sided: bool = False


def _at(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Let a method written for float64 tensors within [0, 1] take a number or any floating-point tensor."""

    @wraps(method)
    def call(self: Any, t: Any) -> Any:
        if not isinstance(t, Tensor):
            with unwatched():
                return method(self, torch.tensor(_inside(t), dtype=torch.float64, device="cpu")).item()
        if not t.is_floating_point():
            raise ValueError(f"t must be floating point, got a tensor of {t.dtype}")
        return method(self, _all_inside(t.to(wide(t.device)))).to(t.dtype)

    return call


def _inside(t: Any) -> float:
    number = checks.real("t", t)
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        raise ValueError(f"t must be in [0, 1], got {t!r}")
    return min(max(number, 0.0), 1.0)


def _all_inside(t: Tensor) -> Tensor:
    if t.device.type == "cpu" and t.numel():  # elsewhere a look would wait for the device
        for end in (t.min(), t.max()):
            _inside(end.item())
    return t.clamp(0.0, 1.0)


def slope(schedule: Schedule, t: Tensor) -> Tensor:
    """The derivative of an elementwise function, also where gradients are switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        point = t.detach().clone().requires_grad_()
        value = schedule(point)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (made,) = torch.autograd.grad(value.sum(), point)
    return made.detach()


def _bump(t: Tensor, f: float = 10.0) -> tuple[Tensor, Tensor]:
    """The sigmoid gamma and its slope."""
    up, down = torch.sigmoid(f * (t - 0.5) + 1), torch.sigmoid(f * (t - 0.5) - 1)
    ends = 1 / (1 + math.exp(f / 2 - 1)) - 1 / (1 + math.exp(f / 2 + 1))
    return up - down - ends, f * (up * (1 - up) - down * (1 - down))


def _sines(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(math.pi * t).square(), math.pi * torch.sin(2 * math.pi * t)


# gamma -> (gamma, gamma') at t; "brownian" and "zero" apart.
_GAMMAS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "bsquared": lambda t: (t * (1 - t), 1 - 2 * t),
    "sinesquared": _sines,
    "sigmoid": _bump,
}
GAMMAS = ("brownian", *_GAMMAS, "zero")


def _cosines(t: Tensor) -> tuple[Tensor, Tensor]:
    """``cos(pi t / 2)`` and ``sin(pi t / 2)``; the first exactly 0 at t = 1."""
    return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)


def _halves(t: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """What stands before t = 1/2 for a and after it for b."""
    early = t <= 0.5
    zero = torch.zeros_like(first)
    return torch.where(early, first, zero), torch.where(early, zero, first)


PATHS = ("linear", "trig", "encdec", "onesided_linear", "onesided_trig", "mirror")


class Interpolant(ProbabilityPath):
    """``x_t = a(t) x0 + b(t) x1 + gamma(t) z`` in its own time: the source at t = 0, the target at t = 1.

    Args:
        path: "linear": a = 1 - t, b = t; "trig": a = sqrt(1 - gamma^2) cos(pi t/2), b = sqrt(1 - gamma^2) sin(pi t/2), so that
            unit variance is kept; "encdec": all is noise at t = 1/2, a = cos(pi t)^2 before it and b = cos(pi t)^2 after it;
            "onesided_linear", "onesided_trig": x0 is N(0, I), and no z is added; "mirror": ``x_t = x1 + gamma z``; or a
            :class:`LinearPath`.
        gamma: "brownian": sqrt(a2 t (1 - t)); "bsquared": t (1 - t); "sinesquared": sin(pi t)^2; "sigmoid"; "zero"; or a
            function of a float64 tensor. Default: "brownian", of one-sided paths "zero".
        a2: of the brownian gamma.

    Raises:
        ValueError: gamma is not 0 at both ends and positive between them, or a path does not end where it must.

    A bridge does not run from noise to data, so that :func:`polyak.generate.sample` refuses it; it is solved forward in its own
    time by :func:`integrate`. All coefficients are computed in float64 and returned in t's dtype; t is a number or a tensor.
    """

    t_min, t_max = 0.0, 1.0

    @checks.arguments(
        path=checks.Choice(*PATHS) | checks.Instance(LinearPath, words="a LinearPath"),
        gamma=checks.Choice(*GAMMAS) | _SCHEDULE | None, a2=checks.positive,
    )  # fmt: skip
    def __init__(self, path: str | LinearPath = "linear", gamma: str | Schedule | None = None, a2: float = 1.0) -> None:
        self.path, self.a2 = path, a2
        self.one_sided = path.one_sided if isinstance(path, LinearPath) else path.startswith("onesided")
        self.mirror = path == "mirror"
        self.noise = ("zero" if self.one_sided else "brownian") if gamma is None else gamma
        self.latent_free = self.noise == "zero" and not self.one_sided  # no Gaussian part: no eta, and v = b
        if self.one_sided and self.noise != "zero":
            raise ValueError(f"gamma must be 'zero' of a one-sided path, whose x0 is the noise, got {gamma!r}")
        if self.mirror and self.noise == "zero":
            raise ValueError("gamma must not be 'zero' of the mirror path, which has no other noise")
        if a2 != 1.0 and self.noise != "brownian":
            raise ValueError(f"a2 is of the brownian gamma alone, got {a2!r} with gamma={self.noise!r}")
        self._check()

    def __repr__(self) -> str:
        scale = f", a2={self.a2:g}" if self.noise == "brownian" else ""
        return f"Interpolant({self.path!r}, {self.noise!r}{scale})"

    def _check(self) -> None:
        t = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device="cpu")
        if not isinstance(self.noise, str):
            gamma = torch.as_tensor(self.noise(t))
            if gamma.shape != t.shape or gamma.dtype != t.dtype:
                raise ValueError("gamma must be a function of a float64 tensor, elementwise")
            ends = gamma[[0, -1]].tolist()
            if not max(map(abs, ends)) <= _ROUNDING:
                raise ValueError(f"gamma must be 0 at t=0 and t=1, got {ends[0]:g} and {ends[1]:g}")
            if not bool((gamma[1:-1] > 0).all()):
                raise ValueError("gamma must be > 0 inside (0, 1)")
        if self.path == "trig" and not bool((self.gamma(t) < 1).all()):
            raise ValueError(f"gamma must be below 1 for the trig path, got {self.noise!r} with a2={self.a2:g}")
        if isinstance(self.path, LinearPath):
            for name, schedule, want in (("a", self.path.a, (1.0, 0.0)), ("b", self.path.b, (0.0, 1.0))):
                value = torch.as_tensor(schedule(t))
                if value.shape != t.shape or value.dtype != t.dtype:
                    raise ValueError(f"path: {name} must be a function of a float64 tensor, elementwise")
                ends = value[[0, -1]].tolist()
                if not max(abs(e - w) for e, w in zip(ends, want, strict=True)) <= _ROUNDING:
                    raise ValueError(
                        f"path: {name} must go from {want[0]:g} to {want[1]:g}, got {ends[0]:g} to {ends[1]:g}"
                    )

    # ------------------------------------------------------------------------------------------------- coefficients

    def _ab(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.path, LinearPath):
            return self.path.a(t), self.path.b(t)
        if self.path in ("linear", "onesided_linear"):
            return 1 - t, t
        if self.path == "mirror":
            return torch.zeros_like(t), torch.ones_like(t)
        if self.path == "encdec":
            return _halves(t, torch.sin(math.pi * (0.5 - t)).square())  # exactly 0 at t = 1/2
        cos, sin = _cosines(t)
        if self.path == "trig":
            scale = (1 - self._gamma(t).square()).sqrt()
            cos, sin = scale * cos, scale * sin
        return cos, sin

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.path, LinearPath):
            return slope(self.path.a, t), slope(self.path.b, t)
        if self.path in ("linear", "onesided_linear"):
            return -torch.ones_like(t), torch.ones_like(t)
        if self.path == "mirror":
            return torch.zeros_like(t), torch.zeros_like(t)
        if self.path == "encdec":
            return _halves(t, -math.pi * torch.sin(2 * math.pi * t))
        cos, sin = _cosines(t)
        da, db = -math.pi / 2 * sin, math.pi / 2 * cos
        if self.path == "trig":
            scale = (1 - self._gamma(t).square()).sqrt()
            turn = -self._gg_dot(t) / scale  # the slope of scale
            da, db = scale * da + turn * cos, scale * db + turn * sin
        return da, db

    def _gamma(self, t: Tensor) -> Tensor:
        if self.noise == "brownian":
            return (self.a2 * t * (1 - t)).sqrt()
        if self.noise == "zero":
            return torch.zeros_like(t)
        return self.noise(t) if not isinstance(self.noise, str) else _GAMMAS[self.noise](t)[0]

    def _gg_dot(self, t: Tensor) -> Tensor:
        if self.noise == "brownian":
            return self.a2 / 2 * (1 - 2 * t)  # finite at the ends, where gamma' is not
        if self.noise == "zero":
            return torch.zeros_like(t)
        if not isinstance(self.noise, str):
            noise = self.noise
            return slope(lambda u: noise(u).square() / 2, t)
        gamma, dgamma = _GAMMAS[self.noise](t)
        return gamma * dgamma

    def _dgamma(self, t: Tensor) -> Tensor:
        if self.noise == "brownian":
            self._refuse_ends(t)
            return self._gg_dot(t) / self._gamma(t)
        if self.noise == "zero":
            return torch.zeros_like(t)
        return _GAMMAS[self.noise](t)[1] if isinstance(self.noise, str) else slope(self.noise, t)

    def _refuse_ends(self, t: Tensor) -> None:
        if t.device.type == "cpu" and not bool(((t > 0) & (t < 1)).all()):
            at = 0 if bool((t <= 0).any()) else 1
            raise ValueError(f"t must be inside (0, 1), got t={at}: {SINGULAR}")

    def coefficients(self, t: Tensor) -> tuple[Tensor, ...]:
        """a, b, a', b' and gamma at float64 times, together."""
        t = _all_inside(t)
        return (*self._ab(t), *self._slopes(t), self._gamma(t))

    @_at
    def a(self, t: Tensor) -> Tensor:
        """The weight of x0."""
        return self._ab(t)[0]

    @_at
    def b(self, t: Tensor) -> Tensor:
        """The weight of x1."""
        return self._ab(t)[1]

    @_at
    def da(self, t: Tensor) -> Tensor:
        """``a'(t)``."""
        return self._slopes(t)[0]

    @_at
    def db(self, t: Tensor) -> Tensor:
        """``b'(t)``."""
        return self._slopes(t)[1]

    @_at
    def gamma(self, t: Tensor) -> Tensor:
        """The weight of z."""
        return self._gamma(t)

    @_at
    def dgamma(self, t: Tensor) -> Tensor:
        """``gamma'(t)``; of the brownian gamma infinite at both ends, which are refused (on the CPU; elsewhere not looked at)."""
        return self._dgamma(t)

    @_at
    def gg_dot(self, t: Tensor) -> Tensor:
        """``gamma gamma'``, formed analytically: finite also where gamma' is not."""
        return self._gg_dot(t)

    # --------------------------------------------------------------------------------------------- what carries the noise

    @_at
    def latent(self, t: Tensor) -> Tensor:
        """The weight of the Gaussian latent: gamma, or a of a one-sided path; the score is ``-eta / latent``."""
        return self._ab(t)[0] if self.one_sided else self._gamma(t)

    @_at
    def dlatent(self, t: Tensor) -> Tensor:
        """The slope of :meth:`latent`."""
        return self._slopes(t)[0] if self.one_sided else self._dgamma(t)

    @_at
    def over_latent(self, t: Tensor) -> Tensor:
        """``1 / latent``; the ends at which it is 0 are refused (on the CPU; elsewhere not looked at)."""
        latent = self._ab(t)[0] if self.one_sided else self._gamma(t)
        if latent.device.type == "cpu" and not bool((latent > 0).all()):
            raise ValueError(
                f"t must be where the latent has weight, got t={t[latent <= 0].flatten()[0].item():g}: {SINGULAR}"
            )
        return 1 / latent

    def coefficient(self, name: str, t: float | Tensor, x: Tensor) -> Any:
        """One of the functions of t above, ready to multiply x of shape (B, ...)."""
        t = t.to(wide(t.device)) if isinstance(t, Tensor) else t
        return expand(getattr(self, name)(t), x)

    # ------------------------------------------------------------------------------------------------------------- draws

    @checks.arguments(
        t=TIME, x0=checks.floating | None, x1=checks.floating, z=checks.floating | None,
        generator=checks.generators | None,
    )  # fmt: skip
    def sample(
        self,
        t: float | Tensor,
        x0: Tensor | None,
        x1: Tensor,
        z: Tensor | None = None,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``x_t`` given the ends.

        Args:
            t: a number or a tensor of shape (B,), in [0, 1].
            x0, x1: a pair of source and target, shape (B, ...). None for x0 where the path is "mirror", which has none, or
                one-sided, where it is drawn.
            z: standard normal of x1's shape; drawn from ``generator`` where it is left out.

        Returns:
            ``(x_t, z)``, both of x1's shape; z is x0 where the path is one-sided.
        """
        x0, z = self.ends(x0, x1, z, generator)
        one_for_each_row(t, x1)
        x = self.coefficient("b", t, x1) * x1
        if not self.mirror:
            x = x + self.coefficient("a", t, x1) * x0
        if not self.one_sided:
            x = x + self.coefficient("gamma", t, x1) * z
        return x, z

    @checks.arguments(t=TIME, x0=checks.floating | None, x1=checks.floating)
    def dt(self, t: float | Tensor, x0: Tensor | None, x1: Tensor) -> Tensor:
        """``dI/dt = a'(t) x0 + b'(t) x1``, x1's shape."""
        if x0 is None and not self.mirror:
            raise ValueError("x0 must be given: dI/dt depends on it")
        self._check_ends(x0, x1)
        one_for_each_row(t, x1)
        if x0 is None:
            return torch.zeros_like(x1)
        return self.coefficient("da", t, x1) * x0 + self.coefficient("db", t, x1) * x1

    def ends(
        self, x0: Tensor | None, x1: Tensor, z: Tensor | None, generator: Generators | None
    ) -> tuple[Tensor | None, Tensor]:
        """x0 and the latent, drawn where they are left out; of a one-sided path both are the same."""
        self._check_ends(x0, x1)
        if z is not None and (self.one_sided or z.shape != x1.shape):
            what = (
                "be left out: x0 is the noise of a one-sided path"
                if self.one_sided
                else f"have shape {tuple(x1.shape)}"
            )
            raise ValueError(f"z must {what}, got {tuple(z.shape)}")
        if x0 is None and not (self.one_sided or self.mirror):
            raise ValueError(f"x0 must be given: {self!r} has two ends")
        if self.one_sided:
            z = x0
        if z is None:
            z = standard_normal(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
        return (z if self.one_sided else x0), z

    def _check_ends(self, x0: Tensor | None, x1: Tensor) -> None:
        if x0 is None:
            return
        if self.mirror:
            raise ValueError("x0 must be left out: the mirror path begins and ends at x1")
        if x0.shape != x1.shape:
            raise ValueError(f"x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")

    # ---------------------------------------------------------------------------------------------- beside the processes

    def as_process(self) -> Process:
        """The process of this room that a one-sided interpolant is, in the room's time: ``1 - t``, data first.

        Its "flow" is ``-b``: a network of b serves as ``Denoiser(lambda x, t: -net(x, 1 - t), process, "flow")``.

        Raises:
            ValueError: the path has two sides.
        """
        if not self.one_sided:
            raise ValueError(f"path must be one-sided to be a process, got {self!r}; solve it with integrate()")
        if isinstance(self.path, LinearPath):
            return OneSided(self.path)
        return Flow() if self.path == "onesided_linear" else TrigFlow()

    def _refuse(self) -> NoReturn:
        why = "use its as_process()" if self.one_sided else "solve it with polyak.generate.interpolants.integrate"
        raise ValueError(f"process must run from noise to data, and {self!r} runs forward in its own time; {why}")

    def check_time(self, name: str, t: Any) -> float:
        self._refuse()

    def check_times(self, times: Any) -> list[float]:
        self._refuse()

    def grid(self, n: int, kind: str = "time", *, start: float | None = None, end: float | None = None) -> Tensor:
        self._refuse()

    def prior(self, shape: Any, *, generator: Any = None, dtype: Any = None, device: Any = None) -> Tensor:
        self._refuse()


class OneSided(Process):
    """The process of a one-sided path of the user's own: ``alpha(t) = b(1 - t)``, ``sigma(t) = a(1 - t)``."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, path: LinearPath) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"OneSided({self.path!r})"

    def _alpha(self, t: Tensor) -> Tensor:
        return self.path.b(1 - t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.path.a(1 - t)

    @property
    def prior_std(self) -> float:
        return 1.0
