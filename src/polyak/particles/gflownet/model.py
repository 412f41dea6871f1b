"""A GFlowNet: an environment, a network, a loss, and the loop that trains the network."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.particles.gflownet.envs import ENV, Env
from polyak.particles.gflownet.losses import LOSSES, PARITY
from polyak.particles.gflownet.replay import PrioritizedReplay
from polyak.particles.gflownet.trajectories import Trajectories, concatenate, sample


class FlowNet(nn.Module):
    """A perceptron of a state's features: A forward logits, A backward logits and one log-flow, [n, 2 A + 1].

    Args:
        env: whose ``features`` it reads, or the state's numbers where it has none.
        hidden: width of each hidden layer.
        layers: how many there are, with leaky ReLUs.
    """

    @checks.arguments(env=ENV, hidden=checks.Integer(1, 10**6), layers=checks.Integer(0, 1000))
    def __init__(self, env: Env, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self._features: Callable[[Tensor], Tensor] | None = getattr(env, "features", None)
        source = env.reset(1)
        widths = [self._read(source).shape[1], *[hidden] * layers]
        parts: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            parts += [nn.Linear(a, b), nn.LeakyReLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], 2 * env.n_actions + 1)).to(source.device)

    def _read(self, s: Tensor) -> Tensor:
        return s.flatten(1) if self._features is None else self._features(s)

    def forward(self, s: Tensor) -> Tensor:
        return self.layers(self._read(s).to(next(self.parameters()).dtype))


class GFlowNet:
    """A policy that is trained to build x with probability R(x) / Z.

    Args:
        env: an :class:`~polyak.particles.gflownet.Env`.
        net: a module, states [n, ...] to [n, 2 A + 1] as :class:`FlowNet`, which it is by default; on the environment's device.
        loss: "db", "tb", "subtb", "fl_db" or "fl_subtb". The last two need ``env.energy``.
        lam: of "subtb" and "fl_subtb".
        fixed_pb: P_B is uniform over parents, and the backward logits are not used.
        eps, temperature: of the behaviour that training samples by, as in :func:`sample`. ``eps`` may be changed on the way.
        batch: trajectories of a step.
        lr: of Adam; ``z_lr`` of log Z, which "tb" alone has as a parameter.
        length: train on trajectories that are cut after so many steps. Not for "tb".
        floor: log-rewards below it, such as log 0, are raised to it, with a warning at the end of :meth:`fit`.
        replay: a :class:`PrioritizedReplay`: every step then trains on as many old trajectories as new ones.
        parity: of "fl_db", as in :func:`~polyak.particles.gflownet.fl_db`.
        generator: of all that is drawn, on the environment's device.
        debug: look at every step of the environment, as in :func:`sample`.

    Raises:
        ValueError: a forward-looking loss without ``env.energy``; ``parity`` or ``length`` with a loss that has no such thing.

    Example:
        >>> env = SetEnv(torch.linspace(-1, 1, 30), k=20)
        >>> gfn = GFlowNet(env, loss="fl_db", eps=0.1, generator=torch.Generator().manual_seed(0))
        >>> losses = gfn.fit(1000)
        >>> sets, log_z = gfn.sample(64), gfn.log_z
    """

    @checks.arguments(
        env=ENV, net=checks.module | None, loss=checks.Choice(*LOSSES), lam=checks.positive, fixed_pb=checks.flag,
        eps=checks.fraction, temperature=checks.positive, batch=checks.Integer(1), lr=checks.positive,
        z_lr=checks.positive, length=checks.Integer(1) | None, floor=checks.real, parity=PARITY,
        replay=checks.Instance(PrioritizedReplay, words="a PrioritizedReplay") | None,
        generator=checks.generator | None, debug=checks.flag,
    )  # fmt: skip
    def __init__(
        self,
        env: Env,
        net: nn.Module | None = None,
        loss: str = "fl_db",
        *,
        lam: float = 0.9,
        fixed_pb: bool = False,
        eps: float = 0.0,
        temperature: float = 1.0,
        batch: int = 16,
        lr: float = 1e-3,
        z_lr: float = 0.1,
        length: int | None = None,
        floor: float = -100.0,
        replay: PrioritizedReplay | None = None,
        parity: str | None = None,
        generator: torch.Generator | None = None,
        debug: bool = False,
    ) -> None:
        self.forward_looking = loss.startswith("fl_")
        if self.forward_looking and not hasattr(env, "energy"):
            raise ValueError(f"env must have energy(s) for the loss {loss!r}; without it use 'db', 'tb' or 'subtb'")
        if parity is not None and loss != "fl_db":
            raise ValueError(f"parity is of the loss 'fl_db' alone, got {parity!r} with {loss!r}")
        if length is not None and loss == "tb":
            raise ValueError(f"length must be None for the loss 'tb', which needs complete trajectories, got {length}")
        self.env, self.net = env, FlowNet(env) if net is None else net
        self.name, self.lam, self.fixed_pb, self.parity = loss, lam, fixed_pb, parity
        self.eps, self.temperature, self.batch, self.length, self.floor = eps, temperature, batch, length, floor
        self.replay, self.generator, self.debug = replay, generator, debug
        groups: list[dict[str, Any]] = [{"params": list(self.net.parameters()), "lr": lr}]
        source = env.reset(1)
        self._log_z: Tensor | None = None
        if loss == "tb":
            self._log_z = torch.zeros((), device=source.device, requires_grad=True)
            groups.append({"params": [self._log_z], "lr": z_lr})
        self.optimizer = torch.optim.Adam(groups)
        self.steps = 0
        self._floored = torch.zeros((), dtype=torch.int64, device=source.device)

    def policy(self, s: Tensor) -> Tensor:
        """Forward logits of states [n, ...], [n, A], before the environment's mask."""
        return self.net(s)[:, : self.env.n_actions]

    @property
    def log_z(self) -> Tensor:
        """The learned log Z, a scalar: of "tb" its parameter, else the source's log-flow."""
        if self._log_z is not None:
            return self._log_z.detach().clone()
        with torch.no_grad():
            source = self.env.reset(1)
            flow = self.net(source)[0, -1]
            return flow - self._energy(source)[0] if self.forward_looking else flow

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n finished objects of the policy, without exploration: [n, ...]."""
        return sample(self.env, self.policy, n, generator=generator or self.generator).last

    def log_probs(self, traj: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
        """log P_F and log P_B of each step, [B, T], and the log-flow of each state, [B, T + 1], by one call of the network."""
        b, t = traj.actions.shape
        flat = traj.states.flatten(0, 1)
        out = self.net(flat)
        out = out.to(torch.promote_types(out.dtype, torch.float32)).unflatten(0, (b, t + 1))
        a = self.env.n_actions
        back = self.env.backward_mask(flat).unflatten(0, (b, t + 1))[:, 1:]
        ahead = self.env.forward_mask(flat).unflatten(0, (b, t + 1))[:, :-1]
        logits = torch.zeros_like(out[:, 1:, :a]) if self.fixed_pb else out[:, 1:, a : 2 * a]
        log_pf = _chosen(out[:, :-1, :a], ahead, traj)
        return log_pf, _chosen(logits, back, traj), out[..., -1]

    def loss(self, traj: Trajectories) -> Tensor:
        """The loss of some trajectories, of whatever policy: a scalar with gradients."""
        log_pf, log_pb, log_flow = self.log_probs(traj)
        worth = self._energies(traj) if self.forward_looking else self._log_rewards(traj)
        options: dict[str, Any] = {"lam": self.lam} if "subtb" in self.name else {}
        if self.parity is not None:
            options["parity"] = self.parity
        return LOSSES[self.name](traj, log_pf, log_pb, log_flow, worth, self._log_z, **options)

    @checks.arguments(
        steps=checks.Integer(0), data=checks.Stream("an iterable of Trajectories") | None,
        callback=checks.Function("a function (step, loss)", 2) | None,
    )  # fmt: skip
    def fit(
        self,
        steps: int,
        *,
        data: Iterable[Trajectories] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Train for some steps, more of which may follow.

        Args:
            data: what to train on in place of the policy's own trajectories, one batch for each step: incomplete ones, those of
                others. It is used as far as it reaches.
            callback: told the number of steps since the beginning, and the loss as a tensor.

        Returns:
            The loss of each step.

        Raises:
            ValueError: ``env.energy`` and ``env.log_reward`` do not agree on what was built, or rewards, energies or the loss are
                NaN. (On an accelerator they are looked at in the end.)
        """
        losses: list[Tensor] = []
        batches = None if data is None else iter(data)
        self._floored.zero_()
        for _ in range(steps):
            if (traj := self._batch(batches)) is None:
                break
            if not losses:
                self._agree(traj)
            loss = self.loss(traj)
            if loss.device.type == "cpu":
                _finite(loss)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.steps += 1
            losses.append(loss.detach())
            if callback is not None:
                callback(self.steps, losses[-1])
        if not losses:
            return torch.zeros(0)
        done = torch.stack(losses)
        _finite(done)
        if floored := int(self._floored):
            warnings.warn(f"{floored} log-rewards were below floor={self.floor:g} and were raised to it", stacklevel=3)
        return done

    def _batch(self, batches: Iterator[Trajectories] | None) -> Trajectories | None:
        if batches is not None:
            return next(batches, None)
        traj = sample(
            self.env,
            self.policy,
            self.batch,
            self.eps,
            self.temperature,
            self.generator,
            length=self.length,
            debug=self.debug,
        )
        if self.replay is None:
            return traj
        old = self.replay.sample(self.batch, generator=self.generator) if len(self.replay) else None
        self.replay.add(traj, self._log_rewards(traj))
        return traj if old is None else concatenate([traj, old])

    def _log_rewards(self, traj: Trajectories) -> Tensor:
        """Of the last states, [B], at least the floor; of those that are not terminal, the floor."""
        if traj.complete:
            given = self.env.log_reward(traj.last)
            return self._raised("env.log_reward", given)
        worth = torch.full(traj.done.shape, self.floor, device=traj.done.device)
        ends = traj.last[traj.done]
        if not len(ends):
            return worth
        given = self._raised("env.log_reward", self.env.log_reward(ends))
        return worth.to(given.dtype).masked_scatter(traj.done, given)

    def _energy(self, s: Tensor) -> Tensor:
        return -self._raised("env.energy", -self.env.energy(s))  # type: ignore[attr-defined]

    def _energies(self, traj: Trajectories) -> Tensor:
        return self._energy(traj.states.flatten(0, 1)).unflatten(0, traj.states.shape[:2])

    def _raised(self, name: str, worth: Tensor) -> Tensor:
        if worth.device.type == "cpu" and bool(worth.isnan().any()):
            raise ValueError(f"{name} must return no NaN, got some")
        self._floored += (worth < self.floor).sum()
        return worth.detach().clamp(min=self.floor)

    def _agree(self, traj: Trajectories) -> None:
        ends = traj.last[traj.done]
        if not (self.forward_looking and len(ends)):
            return
        energy, worth = self.env.energy(ends).double(), self.env.log_reward(ends).double()  # type: ignore[attr-defined]
        apart = (energy + worth).abs() > 1e-3 * (1 + worth.abs())
        if bool(apart.any()):
            a, b = (v[apart][0].item() for v in (energy, worth))
            raise ValueError(
                f"env.energy must be -env.log_reward at terminal states, got {a:g} and a log-reward of {b:g}"
            )

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: weights, log Z, Adam's state, steps, the generator's state and the replay."""
        return {
            "net": self.net.state_dict(),
            "log_z": None if self._log_z is None else self._log_z.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "generator": None if self.generator is None else self.generator.get_state(),
            "replay": None if self.replay is None else self.replay.state_dict(),
        }

    @checks.arguments(state=checks.state_dict)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a GFlowNet that was made in the same way.

        Raises:
            ValueError: it is of another loss, or has no replay or generator where this one has, or the other way round.
        """
        for name, own in (("log_z", self._log_z), ("generator", self.generator), ("replay", self.replay)):
            if (state[name] is None) != (own is None):
                one, other = ("none", "one") if own is None else ("one", "none")
                raise ValueError(f"state must fit this GFlowNet, which has {one} for {name!r}; it has {other}")
        self.net.load_state_dict(state["net"])
        if self._log_z is not None:
            with torch.no_grad():
                self._log_z.copy_(state["log_z"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])


def _chosen(logits: Tensor, mask: Tensor, traj: Trajectories) -> Tensor:
    """The log-probability of the action that was taken, 0 where there is no step."""
    mask = mask | ~traj.valid[..., None]  # rows without any action would have gradients that are NaN
    logits = logits.masked_fill(~mask, -torch.inf)
    taken = logits.gather(2, traj.actions[..., None])[..., 0] - logits.logsumexp(2)
    return torch.where(traj.valid, taken, 0)


def _finite(loss: Tensor) -> None:
    if not bool(loss.isfinite().all()):
        raise ValueError(
            "loss must stay finite; the network, env.energy or env.log_reward returned NaN or too large numbers"
        )
