"""Compiling C with the machine's own compiler: each source once, kept in the user's cache; and threads that run the result.

Without a compiler everything runs, slower. One that fails is reported once. ``POLYAK_NO_COMPILER=1`` does without it,
``CC`` and ``CXX`` choose it, and ``POLYAK_CFLAGS`` adds flags (a sanitizer's, say).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)
SPLIT = 65536  # elements below which one thread does it all


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "polyak"


@cache
def _processor() -> str:
    """What native code depends on."""
    processor = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return processor


def _compiler(variable: str, *names: str) -> list[str] | None:
    """A compiler with its flags; None where there is none."""
    if sys.platform == "win32" or os.environ.get("POLYAK_NO_COMPILER"):
        return None
    found = next((path for name in (os.environ.get(variable), *names) if name and (path := shutil.which(name))), None)
    if found is None:
        return None
    # The interpreter's own functions are found when the library is loaded: Linux does so by itself.
    late = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
    return [found, *FLAGS, *late, *os.environ.get("POLYAK_CFLAGS", "").split()]


_reported: list[str] = []  # the compiler's first error


def _report(error: Exception) -> None:
    if _reported:
        return
    told = getattr(error, "stderr", None) or b""
    text = f"{error}\n{told.decode(errors='replace')}".strip()[:2000]
    _reported.append(text)
    warnings.warn(f"polyak does without some compiled code, which is slower: {text}", stacklevel=2)


@cache
def library(code: str, kind: type[ctypes.CDLL] = ctypes.CDLL, plus: tuple[str, ...] = ()) -> Any:
    """A text's compiled library, None where it cannot be made.

    Args:
        kind: ``ctypes.PyDLL`` keeps the interpreter's lock in calls.
        plus: further arguments of the compiler, for which the text is C++.
    """
    tool = _compiler("CXX", "c++", "g++", "clang++") if plus else _compiler("CC", "cc", "gcc", "clang")
    if tool is None:
        return None
    command = [*tool, *plus]
    name = hashlib.sha256("\n".join([code, _processor(), *command]).encode()).hexdigest()[:32] + ".so"
    try:
        folder = _folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="polyak-"))
        path = folder / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                built = Path(work) / name
                text = Path(work) / ("rule.cpp" if plus else "rule.c")
                text.write_text(code)
                # Libraries stand behind what needs them.
                subprocess.run([*command, str(text), "-o", str(built), "-lm", *(a for a in plus if a.startswith("-l"))],
                               check=True, capture_output=True, timeout=60)  # fmt: skip
                os.replace(built, path)  # whole or not at all, whoever else is building it
        return kind(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _report(error)
        return None


def function(made: Any, name: str, arguments: int, result: Any = None) -> Any:
    """A function of a library whose arguments are addresses and 64-bit integers."""
    found = getattr(made, name)
    found.argtypes = [ctypes.c_void_p] * arguments
    found.restype = result
    return found


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="polyak")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of these threads


def parallel(run: Callable[[int, int], Any], edges: Sequence[int]) -> None:
    """``run(begin, end)`` between each two successive edges, in a thread each.

    Foreign calls let go of the interpreter, so that plain threads share the work.
    """
    if len(edges) == 2:
        run(edges[0], edges[1])
        return
    others = [_threads(len(edges) - 2).submit(run, *pair) for pair in pairwise(edges[1:])]
    run(edges[0], edges[1])
    for other in others:
        other.result()
