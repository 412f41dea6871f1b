"""Triton kernels from generated text, launched with little work on the host."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch

_HEAD = "import triton\nimport triton.language as tl\n\n\n"


@cache
def _runtime() -> Any:
    """Triton's options of running; None where there is no Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime


def available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device (CUDA or ROCm; the CPU in Triton's interpreter mode)."""
    runtime = _runtime()
    return runtime is not None and (device.type == "cuda" or (device.type == "cpu" and bool(runtime.interpret)))


_devices = cache(torch.cuda.device_count)


def is_elsewhere(place: int) -> bool:
    """Whether a launch on tensors of a device (its number; -1: the CPU) needs another current one.

    Triton launches on the current device, whatever its arguments are on.
    """
    return place >= 0 and _devices() > 1 and place != torch.cuda.current_device()


def function(name: str, arguments: Sequence[str], lines: Sequence[str]) -> str:
    """A kernel's text."""
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)


@cache
def build(source: str) -> dict[str, Any]:
    """The kernels of a text by name; made once."""
    text = _HEAD + source
    # Triton reads a kernel's source through inspect: linecache is where generated code is found.
    name = f"<polyak kernel {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "polyak.core.generated"}
    exec(compile(text, name, "exec"), scope)
    return scope


class Launcher:
    """Launches of kernels on always the same kinds of arguments.

    From the second launch of one on, Triton's own look at every argument is skipped, and pointers are handed over as numbers:
    most of a small step's time on the host.
    """

    def __init__(self) -> None:
        self._ready: dict[Any, Any] = {}

    def __call__(
        self,
        kernel: Callable[[], Any],
        grid: int,
        arguments: Sequence[Any],
        warps: int,
        key: Hashable | None,
        **options: Any,
    ) -> None:
        """Launch.

        Args:
            kernel: makes the kernel, or finds it.
            key: tells which kernel, which grid, and all that Triton specializes on in the arguments: types, alignment of
                addresses, divisibility of integers. None: launch as Triton does, with a look at everything.
            options: further ones of Triton's compiler, the same for one key.
        """
        ready = self._ready.get(key) if key is not None else None
        if ready is not None:
            ready(*[a.data_ptr() if type(a) is torch.Tensor else a for a in arguments])
            return
        made = kernel()[(grid,)](*arguments, num_warps=warps, **options)
        if key is not None and made is not None and hasattr(type(made), "__getitem__"):  # the interpreter makes nothing
            self._ready[key] = made[(grid, 1, 1)]
