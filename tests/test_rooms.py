"""What importing a room imports: one process for all of them, since torch alone takes it seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("rooms")  # one worker starts the process

# What only the lab needs, and what is imported where it is used.
HEAVY = (
    "typer", "rich", "optuna", "matplotlib", "sklearn", "scipy", "jinja2",
    "diffusers", "transformers", "peft", "trl", "accelerate", "safetensors", "cmaes",
)  # fmt: skip
ROOMS = (
    "polyak.optim", "polyak.optim.apo", "polyak.teachers", "polyak.particles", "polyak.generate", "polyak.generate.problems",
)  # fmt: skip
CODE = f"""
import importlib, json, sys
found = {{}}
for room in {ROOMS}:
    importlib.import_module(room)
    found[room] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps(found))
sys.modules["transformers"] = None
try:
    sys.modules["polyak.optim.apo"].iterate_dpo
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_light(said: list[str], room: str) -> None:
    assert json.loads(said[0])[room] == []


def test_a_library_that_is_missing_is_named_with_what_to_install(said: list[str]) -> None:
    assert said[1:] == ["polyak.optim.apo.trainers needs transformers: pip install 'polyak[preference]'"]
