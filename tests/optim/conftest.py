"""Triton's interpreter runs the kernels on the CPU. It has to be chosen before Triton is imported for the first time."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers that the tests share
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def interpreter():
    """Skips where Triton is absent, or was imported too early for its interpreter."""
    knobs = pytest.importorskip("triton").knobs
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1" or not knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What the engine does is tried through Triton's interpreter with one system of each kind of launch, and not with all."""
    from systems_for_tests import LAUNCHED, SYSTEMS

    def left_out(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        name, backend = (str(given.get(what, "")) for what in ("name", "backend"))
        engine = item.path.name in ("test_engine.py", "test_edges.py")
        return engine and backend == "kernel" and name in SYSTEMS and name not in LAUNCHED

    out = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


BACKENDS = {
    "eager": dict(foreach=False),
    "compiled": dict(),
    "foreach": dict(foreach=True),
    "kernel": dict(fused=True),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The options that choose a backend on the CPU."""
    if request.param == "kernel":
        request.getfixturevalue("interpreter")
    return BACKENDS[request.param]
