"""The losses: pure functions of log-probabilities, log-flows and rewards or energies, and of no network.

Of a step s to s' let ``d = log P_F(s'|s) - log P_B(s|s')``. P_B is asked at s', the state that is left backwards. Log-probabilities
are those of the policy that is trained, wherever the trajectories come from. F is the flow, Ft the forward-looking one,
``F(s) = exp(-E(s)) Ft(s)``; at a terminal state F(x) = R(x) and Ft(x) = 1: what is given there is not looked at.

Padding, which ``traj.valid`` tells apart, never counts. Every loss is a scalar, of a type that has at least 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.particles.gflownet.trajectories import Trajectories

_TRAJ = checks.Instance(Trajectories, words="Trajectories")
_STEPS = checks.Tensor(floating=True, ndim=2)
_GIVEN = dict(traj=_TRAJ, log_pf=_STEPS, log_pb=_STEPS, log_z=checks.floating | None)
_REWARD = dict(log_flow=_STEPS, log_reward=checks.Tensor(floating=True, ndim=1))
_ENERGY = dict(log_flow=_STEPS, energies=_STEPS)
PARITY = checks.Choice(None, "official", "official-molecules")


@checks.arguments(**_GIVEN, **_REWARD)
def db(
    traj: Trajectories,
    log_pf: Tensor,
    log_pb: Tensor,
    log_flow: Tensor,
    log_reward: Tensor,
    log_z: Tensor | None = None,
) -> Tensor:
    """Detailed balance: the mean over steps of ``(log F(s) + d - log F(s'))^2`` (Bengio et al., arXiv 2111.09266).

    Args:
        traj: the trajectories, of which ``done``, ``lengths`` and the shapes are used.
        log_pf, log_pb: log P_F(s'|s) and log P_B(s|s') of each step, [B, T].
        log_flow: log F of each state, [B, T + 1].
        log_reward: log R of the last state, [B]; not looked at where it is not terminal.
        log_z: in place of the source's log-flow, a scalar.
    """
    flow = _flow(traj, log_flow, log_reward[:, None], None if log_z is None else _scalar(log_z))
    return _mean(_residual(traj, log_pf, log_pb, flow), traj.valid)


@checks.arguments(**_GIVEN, log_flow=_STEPS | None, log_reward=checks.Tensor(floating=True, ndim=1))
def tb(
    traj: Trajectories,
    log_pf: Tensor,
    log_pb: Tensor,
    log_flow: Tensor | None,
    log_reward: Tensor,
    log_z: Tensor | None = None,
) -> Tensor:
    """Trajectory balance: the mean over trajectories of ``(log Z + sum d - log R(x))^2`` (Malkin et al., arXiv 2201.13259).

    Its forward-looking form is the same, since the energies' differences add up to ``-log R``. Arguments are those of :func:`db`;
    ``log_flow`` may be None where ``log_z`` is given.

    Raises:
        ValueError: a trajectory is incomplete.
    """
    if not traj.all_complete():
        raise ValueError("traj must have complete trajectories for tb, from the source to a terminal state")
    if log_z is None and log_flow is None:
        raise ValueError("log_z must be given where log_flow is None, got None")
    start = _states(traj, "log_flow", log_flow)[:, 0] if log_z is None and log_flow is not None else _scalar(log_z)
    d = torch.where(traj.valid, _steps(traj, "log_pf", log_pf) - _steps(traj, "log_pb", log_pb), 0)
    return (start + d.sum(1) - _rows(traj, log_reward)).square().mean()


@checks.arguments(**_GIVEN, **_REWARD, lam=checks.positive)
def subtb(
    traj: Trajectories, log_pf: Tensor, log_pb: Tensor, log_flow: Tensor, log_reward: Tensor, log_z: Tensor | None = None,
    *, lam: float = 0.9,
) -> Tensor:  # fmt: skip
    """Sub-trajectory balance: all pieces i..j of a trajectory, of weights lam^(j - i) (Madan et al., arXiv 2209.12782).

    The mean over trajectories of ``sum_ij w_ij (log F(s_i) + sum_ij d - log F(s_j))^2``, where a trajectory's w add up to 1. With
    lam to 0 it is :func:`db`, with lam to infinity the balance of whole trajectories. O(B T^2) numbers. Arguments are those of
    :func:`db`.
    """
    flow = _flow(traj, log_flow, log_reward[:, None], None if log_z is None else _scalar(log_z))
    return _pieces(traj, _steps(traj, "log_pf", log_pf) - _steps(traj, "log_pb", log_pb), flow, lam)


@checks.arguments(**_GIVEN, **_ENERGY, parity=PARITY)
def fl_db(
    traj: Trajectories, log_pf: Tensor, log_pb: Tensor, log_flow: Tensor, energies: Tensor, log_z: Tensor | None = None,
    *, parity: str | None = None,
) -> Tensor:  # fmt: skip
    """Forward-looking detailed balance: the mean over steps of ``(log Ft(s) + d - log Ft(s') + E(s') - E(s))^2`` (equation 9).

    A step that does not end in a terminal state needs no reward, so that incomplete trajectories can be learned from.

    Args:
        log_flow: log Ft of each state, [B, T + 1].
        energies: E of each state, [B, T + 1]; ``E(x) = -log R(x)`` at terminal ones.
        log_z: in place of what is read off at the source, ``log Ft(s0) - E(s0)``.
        parity: what the official code does at the end, for comparison: "official" (sets) takes the network's own log-flow at the
            terminal state, "official-molecules" that of the state before, which drops out. What is learned is then not R(x) / Z.
    """
    if parity is None:
        flow = _flow(traj, log_flow, log_flow.new_zeros(len(traj), 1), _tilted(traj, log_z, energies))
    else:
        flow = _states(traj, "log_flow", log_flow)
    change = _states(traj, "energies", energies).diff(dim=1)
    residual = _residual(traj, log_pf, log_pb, flow) + change
    if parity == "official-molecules":
        residual = torch.where(traj.terminal[:, 1:], residual - flow[:, :-1] + flow[:, 1:], residual)
    return _mean(residual, traj.valid)


@checks.arguments(**_GIVEN, **_ENERGY, lam=checks.positive)
def fl_subtb(
    traj: Trajectories, log_pf: Tensor, log_pb: Tensor, log_flow: Tensor, energies: Tensor, log_z: Tensor | None = None,
    *, lam: float = 0.9,
) -> Tensor:  # fmt: skip
    """Forward-looking sub-trajectory balance: :func:`subtb` of Ft, with ``d + E(s') - E(s)`` in place of d.

    Arguments are those of :func:`fl_db`.
    """
    flow = _flow(traj, log_flow, log_flow.new_zeros(len(traj), 1), _tilted(traj, log_z, energies))
    d = _steps(traj, "log_pf", log_pf) - _steps(traj, "log_pb", log_pb)
    return _pieces(traj, d + _states(traj, "energies", energies).diff(dim=1), flow, lam)


LOSSES: dict[str, Callable[..., Tensor]] = {"db": db, "tb": tb, "subtb": subtb, "fl_db": fl_db, "fl_subtb": fl_subtb}


def _steps(traj: Trajectories, name: str, value: Tensor) -> Tensor:
    return _of_shape(name, value, tuple(traj.actions.shape))


def _states(traj: Trajectories, name: str, value: Tensor) -> Tensor:
    return _of_shape(name, value, tuple(traj.states.shape[:2]))


def _rows(traj: Trajectories, log_reward: Tensor) -> Tensor:
    return _of_shape("log_reward", log_reward, (len(traj),))


def _of_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape} for these trajectories, got {tuple(value.shape)}")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _scalar(log_z: Tensor | None) -> Tensor:
    if log_z is None or log_z.numel() != 1:
        raise ValueError(f"log_z must be one number, got {checks.shown(log_z)}")
    return log_z.reshape(())


def _tilted(traj: Trajectories, log_z: Tensor | None, energies: Tensor) -> Tensor | None:
    """The forward-looking log-flow of the source that goes with log Z."""
    return None if log_z is None else _scalar(log_z) + _states(traj, "energies", energies)[:, 0]


def _flow(traj: Trajectories, log_flow: Tensor, end: Tensor, start: Tensor | None) -> Tensor:
    """Log-flows with what they must be at terminal states, [B, 1], and, where it is given, at the source."""
    flow = _states(traj, "log_flow", log_flow)
    _rows(traj, end[:, 0])
    if start is not None:
        if not traj.from_source:
            raise ValueError("log_z must be left out where trajectories do not start at the source")
        flow = torch.cat([start.to(flow).expand(len(traj))[:, None], flow[:, 1:]], 1)
    return torch.where(traj.terminal, end.to(flow.dtype), flow)


def _residual(traj: Trajectories, log_pf: Tensor, log_pb: Tensor, flow: Tensor) -> Tensor:
    return flow[:, :-1] + _steps(traj, "log_pf", log_pf) - flow[:, 1:] - _steps(traj, "log_pb", log_pb)


def _mean(residual: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, residual, 0).square().sum() / valid.sum()


def _pieces(traj: Trajectories, d: Tensor, flow: Tensor, lam: float) -> Tensor:
    """All pieces by cumulative sums: with ``u_i = log F_i - sum_{t<i} d_t`` a piece's residual is ``u_i - u_j``."""
    summed = torch.where(traj.valid, d, 0).cumsum(1)
    u = flow - torch.nn.functional.pad(summed, (1, 0))
    at = torch.arange(u.shape[1], device=u.device)
    steps = at[None] - at[:, None]  # [i, j]: j - i
    there: Any = (steps > 0) & (at <= traj.lengths[:, None, None])
    # Weights as logarithms: lam to a power of T overflows.
    weight = (steps * torch.log(torch.as_tensor(lam, dtype=torch.float64))).to(u)
    weight = weight.expand(there.shape).masked_fill(~there, -torch.inf).flatten(1)
    share = (weight - weight.amax(1, keepdim=True).clamp(min=torch.finfo(u.dtype).min)).exp()
    share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    residual = torch.where(there, u[:, :, None] - u[:, None, :], 0)
    return (share * residual.flatten(1).square()).sum(1).mean()
