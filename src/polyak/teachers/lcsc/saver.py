"""Saving the checkpoints that a combination needs: raw weights, at a fixed interval, only the last ones kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.teachers.lcsc.bank import CheckpointBank

_SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # by DistributedDataParallel and torch.compile


class CheckpointSaver:
    """Saves a model's state every so many steps; :meth:`bank` is what :class:`LCSC` wants.

    Call it after each optimizer step, in any loop; of several processes in one only. Save the model that is trained, not its
    EMA. A sharded model (FSDP, DeepSpeed) is given as its gathered state dict, as ``accelerator.get_state_dict(model)``
    returns it. The training scripts of accelerate and diffusers call it in their loop; transformers' Trainer takes
    :meth:`transformers`; with Lightning call it in ``on_train_batch_end``, with ``trainer.global_step``.

    Args:
        folder: where ``step-00000100.safetensors`` and so on are put. What is there already counts.
        every: steps between two checkpoints.
        keep: how many are kept, the oldest is deleted first. Default: all.
        start: the first step that may be saved.
        format: "safetensors", or "torch" for state dicts that hold more than tensors.

    Raises:
        ValueError: a number out of range, or an unknown format; (from a call) entries that safetensors cannot hold.

    Example:
        >>> saver = CheckpointSaver("checkpoints", every=50, keep=30)
        >>> for step in range(1, 3001):
        ...     train_step(model)
        ...     saver(model, step)
    """

    @checks.arguments(
        folder=checks.path, every=checks.Integer(1), keep=checks.Integer(2) | None, start=checks.Integer(0),
        format=checks.Choice(*_SUFFIXES),
    )  # fmt: skip
    def __init__(
        self,
        folder: str | Path,
        *,
        every: int,
        keep: int | None = None,
        start: int = 0,
        format: str = "safetensors",
    ) -> None:
        self.folder = Path(folder)
        self.every, self.keep, self.start, self.suffix = every, keep, start, _SUFFIXES[format]
        self._steps = 0

    def __call__(self, model: nn.Module | Mapping[str, Any], step: int | None = None) -> Path | None:
        """Save, if it is time.

        Args:
            model: the model, or its state dict.
            step: number of optimizer steps taken. Default: calls are counted.

        Returns:
            The file, or None where it was not time.
        """
        self._steps = self._steps + 1 if step is None else checks.integer("step", step, least=0)
        if self._steps % self.every or self._steps < self.start:
            return None
        state = model.state_dict() if isinstance(model, nn.Module) else model
        # Copies, since tied weights share memory, which safetensors refuses.
        copies = {
            _WRAPPED.sub("", key): value.detach().cpu().clone(memory_format=torch.contiguous_format)
            if isinstance(value, Tensor)
            else value
            for key, value in state.items()
        }
        path = self.folder / f"step-{self._steps:08d}{self.suffix}"
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._write(copies, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        if self.keep is not None:
            for old in self.paths()[: -self.keep]:
                old.unlink()
        return path

    def _write(self, state: dict[str, Any], path: Path) -> None:
        if self.suffix == ".pt":
            torch.save(state, path)
            return
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError("format='safetensors' needs safetensors: pip install 'polyak[teachers]'") from error
        if other := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
            raise ValueError(f"{other!r} is no tensor, which safetensors cannot hold; use format='torch'")
        save_file(state, path)

    def paths(self) -> list[Path]:
        """The files, the oldest first."""
        return sorted(self.folder.glob(f"step-????????{self.suffix}"))

    def bank(self, **options: Any) -> CheckpointBank:
        """The checkpoints as a :class:`CheckpointBank`, with its options."""
        return CheckpointBank(self.paths(), **options)

    def hook(self, model: nn.Module) -> Callable[..., None]:
        """For ``optimizer.register_step_post_hook``: every step of that optimizer counts."""

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self(model)

        return after_step

    def transformers(self) -> Any:
        """A ``transformers.TrainerCallback``: ``Trainer(..., callbacks=[saver.transformers()])``."""
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError(
                "CheckpointSaver.transformers() needs transformers: pip install 'polyak[transformers]'"
            ) from error
        saver = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    saver(model, state.global_step)

            def __reduce__(self) -> Any:  # a class that is made in a function is found by nobody
                return CheckpointSaver.transformers, (saver,)

        return Callback()
