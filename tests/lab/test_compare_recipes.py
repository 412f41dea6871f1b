"""Arms as people have them: schedules, warmup, clipping, averages, two optimizers as one, modes, gradients that are counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak.core.schedules import Constant, Cosine, Linear, Warmup
from polyak.lab import compare
from polyak.lab.compare.arms import parse
from polyak.lab.compare.budget import parse as parse_budget
from polyak.lab.compare.recipe import Average, Recipe, Routed, matrices, routed
from polyak.lab.compare.spec import ArmError, Range
from polyak.lab.compare.task import TrainingTask

from .tasks_for_tests import REGRESSION, made_up, write
from .test_compare import trial

TASK = TrainingTask(model=nn.Linear(1, 1), batches=[], loss=lambda m, b: b, evaluate=lambda m: 0.0)
A, B = [0.50, 0.52, 0.49, 0.51, 0.53], [0.41, 0.43, 0.38, 0.42, 0.42]


# ------------------------------------------------------------------------------------------------------------- from words


def test_a_recipe_is_options_of_an_arm() -> None:
    words = "adamw:schedule=linear:warmup=0.1:clip=1.0:ema=0.99,sgd:warmup=0..0.2:clip=1..4,mkor:schedule=constant"
    adamw, sgd, mkor = parse(words, "training")
    assert adamw.fixed == {"schedule": "linear", "warmup": 0.1, "clip": 1.0, "ema": 0.99}
    assert list(adamw.space) == ["lr", "weight_decay"]
    assert sgd.space["warmup"] == Range(0, 0.2)
    assert sgd.space["clip"] == Range(1, 4), "no range of whole numbers"
    assert next(iter(sgd.space)) == "lr", "which the grid is over"
    assert mkor.fixed["schedule"] == "constant"
    assert adamw.label == "AdamW (schedule linear, warmup 0.1, clip 1.0, ema 0.99)"


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ("adamw:schedule=cosin", "schedule must be one of cosine, linear, constant, got 'cosin'"),
        ("adamw:schedule=1..2", "schedule must be one of"),
        ("adamw:warmup=1", "warmup must be in [0, 1), got 1 (a share of the budget)"),
        ("adamw:warmup=100", "warmup must be in [0, 1), got 100"),
        ("adamw:warmup=0..2", "warmup must be in [0, 1), got 2"),
        ("adamw:warmup=long", "warmup must be a number, got 'long'"),
        ("adamw:clip=0", "clip must be > 0, got 0"),
        ("adamw:clip=-1..2", "clip must be > 0, got -1"),
        ("adamw:ema=1", "ema must be in (0, 1), got 1"),
        ("adamw:ema=True", "ema must be a number, got True"),
        ("torch.optim:Muon:rest=nothing", "no arm is called 'nothing'"),
        ("torch.optim:Muon:rest.betta=1", "AdamW has no option 'betta'; did you mean 'betas'?"),
        ("torch.optim:Muon:rest=mkor", "rest must be an optimizer by itself, got 'mkor'"),
    ],
)
def test_what_a_recipe_cannot_be(arm: str, says: str) -> None:
    with pytest.raises(ArmError) as caught:
        parse(f"sgd,{arm}", "training")
    assert says in str(caught.value)


def test_an_optimizers_own_option_of_that_name_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "warm.py").write_text(
        "import torch\n\n\nclass Warm(torch.optim.SGD):\n    def __init__(self, params, lr=0.1, warmup=100):\n"
        "        super().__init__(params, lr)\n        self.warmup = warmup\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    warm, _ = parse("warm:Warm:warmup=200,adamw", "training")
    assert warm.fixed == {"warmup": 200}
    _, outcome = trial(write(tmp_path, REGRESSION, "warmed.py"), "warm:Warm", fixed={"warmup": 200})
    assert not outcome.diverged


# --------------------------------------------------------------------------------------------------------------- schedules


def test_a_schedule_of_an_arm_is_in_place_of_the_tasks() -> None:
    usual, bare = Recipe(), [0.0, 0.01, 0.05, 0.1, 0.5, 0.999]
    assert [usual.factor(TASK, u) for u in bare] == [TASK.factor(u) for u in bare]
    assert [Recipe(schedule="constant").factor(TASK, u) for u in bare] == [1.0] * 6
    linear = Warmup(Linear(1.0, 0.0, 950), 50)
    assert [Recipe(schedule="linear").factor(TASK, u) for u in bare] == [linear(1000 * u) for u in bare]
    later = Warmup(Cosine(1.0, 0.0, 800), 200)
    assert [Recipe(warmup=0.2).factor(TASK, u) for u in bare] == [later(1000 * u) for u in bare]
    at_once = Cosine(1.0, 0.0, 1000)
    assert [Recipe(warmup=0.0).factor(TASK, u) for u in bare] == [at_once(1000 * u) for u in bare]
    own = TrainingTask(
        model=TASK.model, batches=[], loss=TASK.loss, evaluate=TASK.evaluate, schedule=lambda used: 2 - used
    )
    assert [Recipe().factor(own, u) for u in bare] == [2 - u for u in bare]
    rise = Warmup(Constant(1.0), 100)
    assert [Recipe(warmup=0.1).factor(own, u) for u in bare] == [rise(1000 * u) * (2 - u) for u in bare]


NOTES = """
import torch

RATES = []


class Noted(torch.optim.SGD):
    def step(self, closure=None):
        RATES.append(self.param_groups[0]["lr"])
        return super().step()
"""


def test_a_trial_trains_at_its_arms_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noted.py").write_text(NOTES)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, REGRESSION, "rates.py")
    trial(path, "noted:Noted", lr=0.1, fixed={"schedule": "linear", "warmup": 0.5})
    rates = __import__("noted").RATES[2:]  # two to warm up
    ramp = Warmup(Linear(1.0, 0.0, 500), 500)
    assert rates == pytest.approx([0.1 * ramp(1000 * i / 12) for i in range(12)])


# ------------------------------------------------------------------------------------------------- clipping, averages, modes

LINE = """
import torch
from torch import nn


def task(seed, device):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 3, generator=g)
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return {
        "model": model,
        "batches": [x],
        "loss": lambda m, b: (m(b) ** 2).mean(),
        "evaluate": lambda m: {"distance": m.weight.norm()},
        "schedule": "constant",
    }
"""


def by_hand(seed: int, lr: float, clip: float | None = None, ema: float | None = None) -> list[float]:
    g = torch.Generator().manual_seed(seed)
    x, w, b = torch.randn(64, 3, generator=g), torch.randn(1, 3, generator=g), torch.randn(1, generator=g)
    mean, found = None, [w.norm().item()]
    for step in range(12):
        w, b = w.requires_grad_(), b.requires_grad_()
        gw, gb = torch.autograd.grad(((x @ w.T + b) ** 2).mean(), (w, b))
        norm = (gw.square().sum() + gb.square().sum()).sqrt()
        scale = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        w, b = (w - lr * scale * gw).detach(), (b - lr * scale * gb).detach()
        decay = min(ema, step / (step + 1)) if ema else 0.0
        mean = w if mean is None else decay * mean + (1 - decay) * w
        if step % 3 == 2:
            found.append((mean if ema else w).norm().item())
    return found


@pytest.mark.parametrize("recipe", [{}, {"clip": 0.5}, {"ema": 0.8}, {"ema": 0.999}, {"clip": 0.5, "ema": 0.5}])
def test_a_trial_is_what_one_would_write(tmp_path: Path, recipe: dict[str, float]) -> None:
    path = write(tmp_path, LINE, "line_by_hand.py")
    curve, _ = trial(path, "torch.optim:SGD", seed=3, lr=0.1, fixed=recipe)
    assert [v["distance"] for _, v in curve] == pytest.approx(by_hand(3, 0.1, **recipe), rel=2e-5)


def test_an_average_is_in_place_for_evaluations_alone() -> None:
    model = nn.Linear(2, 1)
    average = Average(model, 0.5)
    weights = [torch.full((1, 2), v) for v in (1.0, 3.0, 5.0)]
    for w in weights:
        with torch.no_grad():
            model.weight.copy_(w)
        average.update()
    with average.in_place():
        assert model.weight.tolist() == [[3.5, 3.5]]  # 1; (1 + 3) / 2; (2 + 5) / 2
    assert model.weight.tolist() == [[5.0, 5.0]]
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert model.weight.tolist() == [[5.0, 5.0]], "an evaluation that fails leaves the weights, too"


MODAL = """
import torch

SAID = []


class Modal(torch.optim.SGD):
    mode = None

    def train(self):
        Modal.mode = "train"

    def eval(self):
        Modal.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train", "step() in evaluation mode"
        return super().step()
"""


def test_an_optimizer_with_modes_is_told_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modal.py").write_text(MODAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    says = '"evaluate": lambda m: SAID.append(Modal.mode) or'
    text = {'"evaluate": lambda m:': says, "import torch\n": "import torch\nfrom modal import SAID, Modal\n"}
    curve, outcome = trial(write(tmp_path, LINE, "modes.py", replaced=text), "modal:Modal", lr=0.1)
    assert not outcome.diverged
    assert ["eval"] * len(curve) == __import__("modal").SAID
    assert __import__("modal").Modal.mode == "train"


def test_a_schedule_free_optimizer_is_evaluated_at_its_average(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    path = write(tmp_path, LINE, "free.py")
    target = "pytorch_optimizer:ScheduleFreeSGD"
    curve, _ = trial(path, target, seed=3, lr=0.1, fixed={"momentum": 0.9, "weight_decay": 0.0})
    from pytorch_optimizer import ScheduleFreeSGD

    module = __import__("free")
    torch.manual_seed(3)
    made = module.task(3, "cpu")
    optimizer = ScheduleFreeSGD(made["model"].parameters(), lr=0.1, momentum=0.9, weight_decay=0.0)
    optimizer.train()
    for _ in range(12):
        optimizer.zero_grad()
        made["loss"](made["model"], made["batches"][0]).backward()
        optimizer.step()
    training = made["model"].weight.norm().item()
    optimizer.eval()
    assert curve[-1][1]["distance"] == pytest.approx(made["model"].weight.norm().item(), rel=1e-6)
    assert curve[-1][1]["distance"] != pytest.approx(training, rel=1e-4), (
        "not at the weights that gradients are taken at"
    )


# ---------------------------------------------------------------------------------------------------- two optimizers as one


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)


def test_matrices_are_those_between_embedding_and_head() -> None:
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[i] for i in matrices(net)} == {"first.weight", "second.weight"}
    net.first.weight.requires_grad_(False)
    assert {names[i] for i in matrices(net)} == {"second.weight"}
    alone = nn.Linear(3, 2)
    assert matrices(alone) == {id(alone.weight)}, "where there is one alone it is that"


@pytest.mark.parametrize("form", ["parameters", "named", "groups"])
def test_groups_keep_their_options(form: str) -> None:
    net = Net()
    groups = [
        {"params": [*net.first.parameters(), net.second.weight], "lr": 0.5},
        {"params": net.head.weight, "weight_decay": 0.0},
    ]
    given: Any = {"parameters": net.parameters(), "named": net.named_parameters(), "groups": groups}[form]
    hidden, rest = routed(given, matrices(net))
    if form == "groups":
        assert [{k: v for k, v in g.items() if k != "params"} for g in (*hidden, *rest)] == [
            {"lr": 0.5}, {"lr": 0.5}, {"weight_decay": 0.0},
        ]  # fmt: skip
    assert [
        p is q for g in hidden for p, q in zip(g["params"], (net.first.weight, net.second.weight), strict=True)
    ] == [True] * 2
    held = [p for g in (*hidden, *rest) for p in g["params"]]
    assert len(held) == (4 if form == "groups" else len(list(net.parameters())))


def test_muon_has_the_matrices_and_adamw_the_rest() -> None:
    muon, sgd = parse("torch.optim:Muon,sgd:rest=adamw:rest.lr=0.01:lr=0.1:rest.weight_decay=0.0..0.1", "training")
    assert muon.fixed == {"rest": "torch.optim:AdamW"}
    assert list(muon.space) == ["lr", "weight_decay", "rest.lr"]
    assert muon.space["rest.lr"].centre == pytest.approx(1e-3, rel=0.01)
    assert sgd.fixed == {"lr": 0.1, "rest": "torch.optim:AdamW", "rest.lr": 0.01}
    assert "rest.weight_decay" in sgd.space


TWO = """
import torch
from torch import nn


def task(seed, device):
    torch.manual_seed(seed)
    x = torch.randn(32, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    size = lambda m, b: (m(b) - b.sum(1, keepdim=True)).square().mean()
    return {"model": model, "batches": [x], "loss": size, "evaluate": lambda m: {"distance": size(m, x)}, "schedule": "constant"}
"""


def test_two_optimizers_step_as_they_would_alone(tmp_path: Path) -> None:
    path = write(tmp_path, TWO, "two_optimizers.py")
    fixed = {"weight_decay": 0.1, "rest": "torch.optim:AdamW", "rest.lr": 0.02}
    curve, _ = trial(path, "torch.optim:Muon", seed=1, lr=0.05, fixed=fixed)
    made = __import__("two_optimizers").task(1, "cpu")
    model = made["model"]
    muon = torch.optim.Muon([model[0].weight], lr=0.05, weight_decay=0.1)
    adamw = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=0.02, weight_decay=0.1)
    for _ in range(12):
        model.zero_grad()
        made["loss"](model, made["batches"][0]).backward()
        muon.step()
        adamw.step()
    assert curve[-1][1]["distance"] == pytest.approx(made["evaluate"](model)["distance"].item(), rel=1e-6)


def test_both_are_scheduled_and_told_their_modes() -> None:
    told: list[str] = []

    class Told(torch.optim.SGD):
        def train(self) -> None:
            told.append("train")

        def eval(self) -> None:
            told.append("eval")

    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    both = Routed(Told([p], lr=1.0, momentum=0.9), torch.optim.SGD([q], lr=2.0))
    assert [g["lr"] for g in both.param_groups] == [1.0, 2.0]
    (p + q).sum().backward()
    for group in both.param_groups:
        group["lr"] *= 0.1
    both.step()
    assert (p.item(), q.item()) == pytest.approx((0.9, 0.8))
    assert list(both.state) == [p]
    both.eval()
    both.train()
    assert told == ["eval", "train"]
    both.zero_grad()
    assert p.grad is None
    assert q.grad is None


# --------------------------------------------------------------------------------------------------------------- gradients

GREEDY = """
import torch


class Greedy(torch.optim.SGD):
    def step(self, closure=None):
        for _ in range(4):
            with torch.enable_grad():
                loss = closure()
            super().step()
        return loss
"""


def test_gradients_are_counted_and_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy_steps.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, LINE, "charged.py")
    spent = {}
    for target in ("greedy_steps:Greedy", "torch.optim:SGD"):
        curve, outcome = trial(path, target, budget={"gradients": 24}, points=3)
        spent[target] = (outcome.values["steps"], outcome.values["evaluations"], [at["gradients"] for at, _ in curve])
    assert spent == {"greedy_steps:Greedy": (6, 24, [0, 8, 16, 24]), "torch.optim:SGD": (24, 24, [0, 8, 16, 24])}
    _, outcome = trial(path, "greedy_steps:Greedy", budget={"gradients": 21})
    assert outcome.values["steps"] == 6, "a step is not broken off"


def test_a_budget_of_gradients() -> None:
    for text in ("2000grads", "2000 gradients"):
        budget = parse_budget(text, 7)
        assert (budget.unit, budget.amount, budget.equal) == ("gradients", 2000, "equal gradients")
    assert budget.words == "2,000 gradients for each trial"


def test_uneven_gradients_are_said() -> None:
    def took(times: float, unit: str = "steps") -> Any:
        t = made_up({"adamw": A, "adan": B}, unit=unit)
        trials = [
            trial if trial.arm == "adamw" else replace(trial, values={**trial.values, "evaluations": 4 * times})
            for trial in t.result.trials
        ]
        return replace(t, result=replace(t.result, trials=tuple(trials)))

    [said] = took(8).warnings
    assert said.startswith(
        "gradients for each step: Adan 8; all others 1: at equal steps that is so many times the work."
    )
    assert "--budget 4grads" in said
    assert "Adan beats AdamW by 0.08 to 0.11 in loss with 8 times the gradients" in took(8).answer
    assert took(1).warnings == took(8, "gradients").warnings == ()
    assert "gradients" not in took(1).answer


@pytest.mark.usefixtures("here")
def test_recipes_from_end_to_end(tmp_path: Path) -> None:
    """In one comparison, also by gradients, whose command names the budget as it was given."""
    path = write(tmp_path, TWO, "ends.py")
    arms = "adamw:schedule=constant,torch.optim:Muon,adamw:warmup=0.1:clip=1.0,adamw:ema=0.5..0.9"
    found = compare(path, arms, budget="12grads", seeds=1, trials=2, points=3, store=tmp_path / "home", progress=False)
    rows = found.task().rows
    assert [row.spent for row in rows] == [12] * 4
    assert set(rows[3].point) == {"lr", "weight_decay", "ema"}
    assert all(math.isfinite(row.final) for row in rows)
    assert "at equal gradients" in found.answer
    page = found.save(tmp_path / "page.html").read_text()
    assert "gradients" in page
    assert "torch.optim:AdamW" in page.replace("<wbr>", "")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    main = __import__("polyak.lab.compare.main", fromlist=["main"])
    monkeypatch.setattr(main, "call_apart", lambda f, *given, timeout: f(*given))
