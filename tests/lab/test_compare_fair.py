"""What an arm cannot gain or lose by: random numbers, the warm-up, what a task keeps, the process that a trial runs in."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from polyak.lab.claim import Trial
from polyak.lab.compare import arms, main
from polyak.lab.compare.sampling import Draw
from polyak.lab.workers import call_apart

from .tasks_for_tests import write
from .test_compare import trial

BEFORE = os.environ.get("PYTHONHASHSEED")
SEEN = "import torch\nfrom torch import nn\nSEEN = []\n"


def seen(folder: Path, name: str, text: str, optimizer: str = "torch.optim:SGD", **options: Any) -> tuple[Any, Any]:
    """What a task has noted in a trial, and the trial's curve."""
    curve, _ = trial(write(folder, SEEN + text, f"{name}.py"), optimizer, **options)
    return sys.modules[name].SEEN, curve


# ---------------------------------------------------------------------------------------------------------- random numbers

ALL_FROM_THE_GLOBAL_ONES = """
def task(seed, device):
    model = nn.Linear(3, 3)

    def draw(what):
        x = torch.randn(8, 3)
        SEEN.append((what, x))
        return x

    def batches():
        while True:
            yield draw("batch")

    def loss(model, x):
        return (model(x + draw("noise")) - x).square().mean()

    def evaluate(model):
        x = draw("evaluation")
        return {"distance": (model(x) - x).norm()}

    return {"model": model, "batches": batches(), "loss": loss, "evaluate": evaluate}
"""


def test_batches_noise_and_evaluations_do_not_share_numbers(tmp_path: Path) -> None:
    """Where all are drawn from the global generators, as in a denoiser's loss, the noise must not be the data."""
    found, _ = seen(tmp_path, "denoise", ALL_FROM_THE_GLOBAL_ONES)
    drawn = {what: {x[0, 0].item() for w, x in found if w == what} for what in ("batch", "noise", "evaluation")}
    assert len(drawn["batch"]) == 13
    assert not drawn["batch"] & drawn["noise"]
    assert not drawn["batch"] & drawn["evaluation"]
    assert not drawn["noise"] & drawn["evaluation"]


def test_evaluations_draw_the_same_numbers_however_many_there_were(tmp_path: Path) -> None:
    """An arm with long steps misses points: its last evaluation is not to be another than the others'."""
    ends = []
    for points in (2, 6):
        found, _ = seen(tmp_path, f"evaluated_{points}", ALL_FROM_THE_GLOBAL_ONES, points=points)
        evaluations = [x for what, x in found if what == "evaluation"]
        assert len(evaluations) == points + 1
        ends.append(evaluations[-1].tolist())
    assert ends[0] == ends[1]


def test_what_is_drawn_at_import_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Workers import the file before different trials."""
    text = (
        "DATA = torch.randn(3)\n\ndef task(seed, device):\n    SEEN.append((DATA.tolist(), torch.rand(2).tolist()))\n"
    )
    text += '    return {"model": nn.Linear(3, 1), "batches": [DATA], "loss": lambda m, b: m(b).sum(), "evaluate": evaluate}\n'
    text += '\ndef evaluate(model):\n    return {"distance": model.weight.norm()}\n'
    (first, *_), _ = seen(tmp_path, "early", text, seed=1)
    (other, *_), _ = seen(tmp_path, "late", text, seed=2)
    assert first[0] == other[0]
    assert first[1] != other[1]
    path = tmp_path / "late.py"
    trial(path, "torch.optim:SGD", seed=1)
    assert sys.modules["late"].SEEN[2][1] == first[1], "an import takes nothing from its trial's numbers"


# ------------------------------------------------------------------------------------------------------------- the warm-up

NORMALIZED = """
def task(seed, device):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    x = torch.randn(16, 3)
    passes = []

    def loss(model, batch):
        passes.append(0)
        return (MODEL(batch) - 1).square().mean() + 0 * len(passes)

    def evaluate(model):
        SEEN.append((len(passes), net[1].num_batches_tracked.item(), net[0].weight.tolist()))
        return {"distance": net(x).norm()}

    return {"model": net, "batches": [x], "loss": loss, "evaluate": evaluate, "params": lambda model: MODEL.parameters()}
"""


@pytest.mark.parametrize("used", ["model", "net"])
@pytest.mark.parametrize("optimizer", ["torch.optim:SGD", "torch.optim:LBFGS"])
def test_the_warm_up_leaves_no_trace(tmp_path: Path, used: str, optimizer: str) -> None:
    """In weights, buffers, and what the loss keeps; also where a task's functions hold the model themselves."""
    name = f"warm_{used}_{optimizer[-3:].lower()}"
    found, _ = seen(tmp_path, name, NORMALIZED.replace("MODEL", used), optimizer, lr=0.1)
    assert found[0][:2] == (0, 0)
    plain, _ = seen(tmp_path, f"{name}_plain", NORMALIZED.replace("MODEL", "model"), lr=1e-30)
    assert found[0][2] == plain[0][2]
    if optimizer == "torch.optim:SGD":
        assert [passes for passes, *_ in found] == [tracked for _, tracked, _ in found] == [0, 3, 6, 9, 12]


CHANGED = """
def task(seed, device):
    def batches():
        while True:
            yield {"x": torch.full((4, 3), 255.0), "y": torch.ones(4, 1)}

    def loss(model, batch):
        x, y = batch["x"].div_(255), batch.pop("y")
        SEEN.append(x.max().item())
        return (model(x) - y).square().mean()

    return {"model": nn.Linear(3, 1), "batches": batches(), "loss": loss, "evaluate": lambda m: {"distance": m.bias.norm()}}
"""


def test_a_loss_may_change_its_batch(tmp_path: Path) -> None:
    found, _ = seen(tmp_path, "changed", CHANGED)
    assert set(found) == {1.0}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_copied_trains(tmp_path: Path) -> None:
    text = """
def task(seed, device):
    x = torch.randn(16, 3)
    model = nn.utils.weight_norm(nn.Linear(3, 1))
    size = lambda m, x: m(x).square().mean()
    return {"model": model, "batches": [x], "loss": size, "evaluate": lambda m: {"distance": size(m, x)}}
"""
    _, curve = seen(tmp_path, "weight_norm", text)
    assert curve[-1][1]["distance"] < curve[0][1]["distance"]


def test_a_trial_has_one_thread_whatever_the_file_says(tmp_path: Path) -> None:
    """Said at import it would be for the first trial in a process alone."""
    text = "torch.set_num_threads(2)\n" + CHANGED.replace(
        "SEEN.append(x.max().item())", "SEEN.append(torch.get_num_threads())"
    )
    found, _ = seen(tmp_path, "threads", text)
    assert set(found) == {1}


# -------------------------------------------------------------------------------------------------------------- processes


def test_what_is_made_from_a_set_is_the_same_in_every_process() -> None:
    """A vocabulary, for one; else arms whose trials run in different workers would have other data."""
    words = 'list({f"word {i}" for i in range(50)})'
    assert call_apart(eval, words, timeout=3000) == call_apart(eval, words, timeout=3000)
    assert os.environ.get("PYTHONHASHSEED") == BEFORE


def test_the_workers_of_a_loader_start_as_they_do_in_a_script() -> None:
    """Where these are forked, spawned ones would import torch at every epoch, on the clock, and could take no lambda."""
    assert call_apart(multiprocessing.get_start_method, timeout=3000) == multiprocessing.get_all_start_methods()[0]


def test_the_code_of_what_an_arm_is_made_around_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "inner_optimizer.py"
    inner.write_text("import torch\n\n\nclass Inner(torch.optim.SGD):\n    pass\n")
    arm, _ = arms.parse("mkor:base=inner_optimizer/Inner,sgd", "training")
    before = main._codes(arm)
    inner.write_text(inner.read_text() + "    x = 1\n")
    assert main._codes(arm) != before


# ------------------------------------------------------------------------------------------------------------- divergence

REFUSES_NAN = """
def task(seed, device):
    x = torch.randn(64, 3)
    y = (x.sum(1, keepdim=True) > 0).float()
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Sigmoid())

    def refusing(model):
        given = model(x)
        if given.isnan().any():
            raise ValueError("Input contains NaN.")
        return {"distance": (given - y).norm()}

    losses = {
        "loss": lambda model, b: nn.functional.binary_cross_entropy(model(b[0]), b[1]),
        "evaluate": lambda model, b: (model[:3](b[0]) - b[1]).square().mean(),
    }
    return {"model": net, "batches": [[x, y]], "loss": losses["WHERE"], "evaluate": refusing, "schedule": "constant"}
"""
RAISES = """
import torch


class Decomposes(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2:
                torch.linalg.eigh(p.grad.T @ p.grad)
        return super().step()


class Fails(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps > 3:
            raise ValueError("a mistake")
        return super().step()
"""


@pytest.mark.parametrize("where", ["loss", "evaluate", "step"])
def test_an_error_of_a_model_that_diverged_is_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Losses, metrics and decompositions refuse NaN, which would end the whole comparison for one large learning rate."""
    (tmp_path / "raising.py").write_text(RAISES)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SEEN + REFUSES_NAN.replace("WHERE", "loss" if where == "loss" else "evaluate")
    optimizer = "raising:Decomposes" if where == "step" else "torch.optim:SGD"
    options: dict[str, Any] = {"lr": 1e17 if where == "loss" else 1e5, "points": 12 if where == "evaluate" else 1}
    _, outcome = trial(write(tmp_path, text, f"refuses_{where}.py"), optimizer, **options)
    assert outcome.diverged
    said = {"loss": "RuntimeError at step ", "evaluate": "ValueError at step ", "step": "_LinAlgError at step "}
    assert outcome.message.startswith(said[where])


def test_an_error_of_a_model_that_did_not_diverge_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_too.py").write_text(RAISES)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SEEN + REFUSES_NAN.replace("WHERE", "loss")
    with pytest.raises(ValueError, match="a mistake"):
        trial(write(tmp_path, text, "mistaken.py"), "raising_too:Fails")


# --------------------------------------------------------------------------------------------------------------- samplers

GUIDED = """
from polyak.generate import VP, Denoiser


def task(seed, device):
    def network(x, t, **given):
        SEEN.append(len(x))
        gaps.append((x - start).abs().max().item())
        return 0.1 * x

    start, gaps = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)), []

    def metric(x):
        SEEN.append((torch.rand(3).tolist(), min(gaps)))
        return {"distance": x.norm()}

    denoiser = Denoiser(network, VP(), unconditional=network)
    return {"denoiser": denoiser, "shape": (4, 2), "metric": metric, "better": "lower"}
"""


def sampled(folder: Path, name: str, budget: int, **fixed: Any) -> list[Any]:
    target = "polyak.generate:DDIM"
    draw = Draw(str(write(folder, SEEN + GUIDED, f"{name}.py")))
    options = {"class": target, "fixed": fixed, "tuned": [], "budget": {"evaluations": budget}, "points": 4}
    one = Trial(claim="c", scale="s", task="t", arm="a", seed=3, device="cpu", options=options)
    return [*draw(one)]


def test_every_call_of_the_network_counts(tmp_path: Path) -> None:
    guided = {"guidance": "polyak.generate:CFG", "guidance.scale": 3.0}
    for name, fixed in (("alone", {}), ("guided", guided)):
        measured = sampled(tmp_path, name, 12, **fixed)
        notes = sys.modules[name].SEEN
        rows = 0
        counts = iter([m.at["evaluations"] for m in measured if m.at])
        for note in notes:
            if isinstance(note, int):
                rows += note
            else:
                assert rows == 4 * next(counts)
                rows = 0
        assert measured[-1].values["evaluations"] == 12
    with pytest.raises(ValueError, match="takes at least 2 evaluations for a sample, and there are 1"):
        sampled(tmp_path, "little", 1, **guided)


def test_samplers_are_judged_with_the_same_numbers_and_start_at_a_noise_of_their_own(tmp_path: Path) -> None:
    """Also one that cannot be judged at a part of the budget; and a task may draw with the seed itself."""
    sampled(tmp_path, "four", 16)
    sampled(tmp_path, "three", 8, guidance="polyak.generate:CFG", **{"guidance.scale": 3.0})
    metrics = [[n for n in sys.modules[name].SEEN if not isinstance(n, int)] for name in ("four", "three")]
    assert [len(found) for found in metrics] == [4, 3]
    assert len({str(draws) for found in metrics for draws, _ in found}) == 1
    assert min(gap for found in metrics for _, gap in found) > 0.1
