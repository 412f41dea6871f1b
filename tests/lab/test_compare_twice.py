"""What one trial leaves for the next is refused before the first trial, with its cause."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from polyak.lab import TaskError, compare
from polyak.lab.compare.examine import examine
from polyak.lab.compare.leaks import changed, held
from polyak.lab.compare.rehearsal import Again, twice
from polyak.lab.compare.task import Facts
from polyak.lab.compare.trial import Train

from .tasks_for_tests import DRAWING, REGRESSION, write

LOSS = '"loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),'
# What is kept outside of the function, how the loss uses it, and the cause that is named.
LEAKS = {
    "a global counter": (
        "STEP = 0\n\n\ndef weight():\n    global STEP\n    STEP += 1\n    return 1 / STEP\n",
        r"STEP \(8, then 12\) outside of task",
    ),
    "a count": (
        "import itertools\n\nSTEPS = itertools.count(1)\n\n\ndef weight():\n    return 1 / next(STEPS)\n",
        r"STEPS",
    ),
    "a list": ("SEEN = []\n\n\ndef weight():\n    SEEN.append(0)\n    return 1 / len(SEEN)\n", r"SEEN outside"),
    "a default": ("def weight(seen=[]):\n    seen.append(0)\n    return 1 / len(seen)\n", r"weight\.seen"),
    "an attribute": (
        "def weight():\n    weight.calls += 1\n    return 1 / weight.calls\n\n\nweight.calls = 0\n",
        r"weight\.calls \(8, then 12\)",
    ),
    "a class": (
        "class Weight:\n    calls = 0\n\n    def __call__(self):\n        Weight.calls += 1\n        return 1 / self.calls\n\n\n"
        "weight = Weight()\n",
        r"Weight\.calls \(8, then 12\)",
    ),
    "a generator": ("G = torch.Generator()\n\n\ndef weight():\n    return torch.rand((), generator=G)\n", r"G outside"),
    "a teacher": (
        "TEACHER = nn.Linear(1, 1)\n\n\ndef weight():\n    with torch.no_grad():\n        TEACHER.weight.mul_(0.9)\n"
        "    return TEACHER.weight.detach().abs().sum()\n",
        r"TEACHER outside",
    ),
    "no seed": (
        "import os\n\n\ndef weight():\n    return 1 + os.urandom(1)[0]\n",
        r"In new processes they differ, too",
    ),
    "what cannot be seen": (
        "import torch.cuda as hidden\n\n\ndef weight():\n    hidden.polyak_calls = getattr(hidden, 'polyak_calls', 0) + 1\n"
        "    return 1 / hidden.polyak_calls\n",
        r"Something is left from one trial to the next \(in an imported package",
    ),
}


def leaking(folder: Path, text: str, name: str) -> Path:
    path = write(folder, REGRESSION, name, replaced={LOSS: LOSS.replace(".mean()", ".mean() * weight()")})
    path.write_text(path.read_text().replace("def task(", f"{text}\n\ndef task("))
    return path


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("leak", LEAKS)
def test_what_a_loss_keeps_is_found_and_named(tmp_path: Path, leak: str) -> None:
    text, says = LEAKS[leak]
    found = examine(str(leaking(tmp_path, text, f"leak_{leak.replace(' ', '_')}.py")), "cpu")
    assert isinstance(found, str)
    assert (
        "the same steps, taken twice in one process, give different numbers: the training loss of step 1 is " in found
    )
    assert re.search(says, found), found


def test_what_is_beside_the_file_is_named_with_its_module(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text(LEAKS["a global counter"][0])
    found = examine(str(leaking(tmp_path, "from beside_it import weight\n", "leak_beside.py")), "cpu")
    assert isinstance(found, str)
    assert "beside_it.STEP (8, then 12) outside of task" in found


def test_what_an_evaluation_keeps_is_named(tmp_path: Path) -> None:
    far = "(model.weight - TRUTH).norm()"
    path = write(tmp_path, REGRESSION, "leak_evaluation.py", replaced={far: f"{far} * weight()"})
    path.write_text(path.read_text().replace("def task(", f"{LEAKS['a global counter'][0]}\n\ndef task("))
    found = examine(str(path), "cpu")
    assert isinstance(found, str)
    assert "STEP (2, then 3) outside of the function changes with each. Make it inside" in found


@pytest.mark.parametrize(
    "text",
    [
        "WORDS = {'a': 1}\n\n\ndef weight():\n    return 1.0\n",
        "CACHE = {}\n\n\ndef weight():\n    return CACHE.setdefault('w', torch.ones(()))\n",
        "def weight():\n    return torch.rand(()) + 0.5\n",  # of the global generator, which follows from the seed
    ],
    ids=["constant", "cache", "global generator"],
)
def test_what_is_the_same_again_is_no_leak(tmp_path: Path, text: str) -> None:
    name = f"no_leak_{abs(hash(text))}.py"
    assert isinstance(examine(str(leaking(tmp_path, text, name)), "cpu"), Facts)


# ------------------------------------------------------------------------------------------------------------ a whole trial

LATE = "STEP = 0\n\n\ndef weight():\n    global STEP\n    STEP += 1\n    return 1.0 if STEP < 50 else 0.5\n"
OPTIMIZER = """
import torch


class Forgetful(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        Forgetful.steps += 1
        for group in self.param_groups:
            group["lr"] /= Forgetful.steps
        return super().step(closure)
"""


def again(path: Path, target: str = "torch.optim:SGD", steps: int = 30) -> Again:
    options: dict[str, Any] = {
        "class": target,
        "fixed": {"lr": 0.01},
        "tuned": [],
        "budget": {"steps": steps},
        "points": 3,
    }
    metrics = ("distance", "train_loss", "steps", "evaluations", "seconds", "memory", "processor", "validation")
    return Again(Train(str(path)), "sgd", options, dict.fromkeys(metrics, math.inf))


def test_a_whole_trial_is_run_twice(tmp_path: Path) -> None:
    """What changes late is not in a few steps."""
    path = leaking(tmp_path, LATE, "late_leak.py")
    assert isinstance(examine(str(path), "cpu"), Facts)
    found = twice(str(path), "cpu", again(path))
    assert isinstance(found, TaskError)
    assert "late_leak.py: one trial of sgd, run twice in one process, gives different numbers: " in str(found)
    assert "STEP (" in str(found)
    assert twice(str(path), "cpu", again(path)) is None, "it has settled"


def test_an_optimizer_that_remembers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forgetful.py").write_text(OPTIMIZER)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, REGRESSION, "remembered.py")
    found = twice(str(path), "cpu", again(path, "forgetful:Forgetful", steps=4))
    assert isinstance(found, TaskError)
    assert "forgetful.Forgetful.steps (" in str(found)


@pytest.mark.parametrize("arm", ["sgd:lr=0.01:weight_decay=0", "forgetful_too:Forgetful:lr=0.01:weight_decay=0"])
def test_a_comparison_begins_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    """With the baseline's whole trial, and a few steps of each other arm's; nothing is stored."""
    (tmp_path / "forgetful_too.py").write_text(OPTIMIZER)
    main = __import__("polyak.lab.compare.main", fromlist=["main"])
    monkeypatch.setattr(main, "call_apart", lambda f, *given, timeout: f(*given))
    late = arm.startswith("sgd")
    path = leaking(tmp_path, LATE, "compared_late.py") if late else write(tmp_path, REGRESSION, "compared_early.py")
    arms = f"adamw:lr=0.01:weight_decay=0,{arm}"
    with pytest.raises(TaskError, match="adamw.*run twice" if late else "Forgetful.*run twice"):
        compare(path, arms, budget="30steps", seeds=1, trials=1, points=3, store=tmp_path / "home", progress=False)


def test_samplers_are_drawn_from_twice(tmp_path: Path) -> None:
    kept = {"self.scheduler = Scheduler()\n": "self.scheduler = Scheduler()\n        CALLS.append(0)\n"}
    path = write(
        tmp_path, DRAWING, "drawn_twice.py", replaced=kept | {"import torch\n": "import torch\n\nCALLS = []\n"}
    )
    text = path.read_text().replace(
        "return (x * 0.9**num_inference_steps,)", "return (x * 0.9**num_inference_steps * len(CALLS),)"
    )
    path.write_text(text)
    assert isinstance(examine(str(path), "cpu"), str)


def test_states_are_told_apart_and_long_ones_are_not_shown(tmp_path: Path) -> None:
    before = {"a": "1", "b": "x" * 30, "c": "same", "d": "1", "e": "2"}
    assert changed(before, {**before, "a": "2"}) == "a (1, then 2)"
    assert changed(before, {**before, "b": "y" * 30}) == "b"
    assert changed(before, before | {"new": "1"}) == ""
    assert (
        changed(before, {**before, "a": "0", "b": "z", "d": "0", "e": "0"})
        == "a (1, then 0), b, d (1, then 0) and 1 more"
    )
    assert held(str(tmp_path / "nothing.py")) == {}
