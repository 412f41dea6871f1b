"""Arms and budgets from words."""

from __future__ import annotations

import pytest

from polyak.lab.compare import budget
from polyak.lab.compare.arms import parse
from polyak.lab.compare.experiment import _labels
from polyak.lab.compare.samplers import split_options
from polyak.lab.compare.spec import ArmError, Range, names


def test_names_are_found_in_polyak_first_then_in_torch() -> None:
    adamw, adan, muon = parse("adamw, Adan, pytorch_optimizer:Muon", "training")
    assert [a.target for a in (adamw, adan, muon)] == [
        "torch.optim:AdamW",
        "polyak.optim:Adan",
        "pytorch_optimizer:Muon",
    ]
    assert names("training")["sgd"] == "torch.optim:SGD"
    assert "optimizer" not in names("training")
    ddim, heun, euler = parse(["ddim", "heun", "EulerDiscreteScheduler"], "sampling")
    assert [a.target for a in (ddim, heun)] == ["polyak.generate:DDIM", "polyak.generate:Heun"]
    assert euler.target == "diffusers:EulerDiscreteScheduler"


def test_options_are_fixed_tuned_or_left_to_their_defaults() -> None:
    adan, sgd = parse(
        "adan:weight_decay=0.02,betas=(0.98, 0.92, 0.99),sgd:lr=0.1..10:momentum=0..0.9:nesterov=True", "training"
    )
    assert adan.text == "adan:weight_decay=0.02:betas=(0.98, 0.92, 0.99)"
    assert adan.fixed == {"weight_decay": 0.02, "betas": (0.98, 0.92, 0.99)}
    assert list(adan.space) == ["lr"]
    assert sgd.fixed == {"nesterov": True}
    assert list(sgd.space) == ["lr", "weight_decay", "momentum"], (
        "the learning rate, which the grid is over, comes first"
    )
    assert (sgd.space["lr"], sgd.space["momentum"]) == (Range(0.1, 10), Range(0, 0.9))
    assert sgd.label == "SGD (lr 0.1 to 10, momentum 0 to 0.9, nesterov True)"


def test_a_range_of_what_is_declared_a_float_is_not_of_whole_numbers() -> None:
    """PyTorch's momentum and weight decay have the default 0, an integer."""
    [sgd, _] = parse("torch.optim:SGD:momentum=0..1:weight_decay=0..3,adamw", "training")
    assert (sgd.space["momentum"], sgd.space["weight_decay"]) == (Range(0, 1), Range(0, 3))
    assert sgd.space["momentum"].centre == 0.5
    [solver, _] = parse("dpmsolver:order=1..3,ddim", "sampling")
    assert solver.space["order"].whole


def test_long_labels_keep_the_first_options_and_say_that_there_are_more() -> None:
    """Without its guidance an arm would look like its class with nothing said."""
    given = "ddim,heun:guidance=CFG:guidance.scale=2,dpmsolver:order=3:form=data:method=multistep,euler:guidance=CFG"
    assert list(_labels(parse(given, "sampling")).values()) == [
        "DDIM", "Heun (guidance CFG, …)", "DPMSolver (order 3, form data, …)", "Euler (guidance CFG)",
    ]  # fmt: skip
    alike = "dpmsolver:order=2:form=data:method=multistep,dpmsolver:order=2:form=data:method=singlestep"
    assert list(_labels(parse(alike, "sampling")).values()) == [
        "DPMSolver (order 2, form data, method multistep)", "DPMSolver (order 2, form data, method singlestep)",
    ]  # fmt: skip
    [_, mine] = _labels(parse("torch.optim:AdamW,adamw", "training")).values()
    assert mine == "adamw"
    one = "adamw:betas=(0.90000000001,0.99900000000000001)"
    assert _labels(parse(f"sgd,{one}", "training"))[one] == "AdamW (betas (0.90000000001,0.99900000000000001))"


def test_ranges_are_centred_where_the_papers_say() -> None:
    arms = {a.class_name: a.space for a in parse("adamw,adan,lion,sgd,adadelta", "training")}
    centres = {name: (space["lr"].centre, space["weight_decay"].centre) for name, space in arms.items()}
    lr, decay = centres["AdamW"]
    assert (lr, decay) == pytest.approx((1e-3, 1e-2), rel=0.01)
    assert 5 <= centres["Adan"][0] / lr <= 10
    assert 1 / 10 <= centres["Lion"][0] / lr <= 1 / 3
    assert 3 <= centres["Lion"][1] / decay <= 10
    assert centres["SGD"][0] == pytest.approx(0.1, rel=0.01)
    assert centres["Adadelta"][0] == pytest.approx(1.0, rel=0.01), "an unknown one's: its default"
    widths = {round(space["lr"].high / space["lr"].low) for space in arms.values()}
    assert max(widths) - min(widths) <= 10, "all ranges are equally wide, a thousandfold"
    assert 990 <= min(widths) <= 1010


def test_polyak_says_itself_what_its_rates_are() -> None:
    from polyak import optim

    for name in optim.names():
        facts = optim.info(name)
        if facts.lr is None or facts.weight_decay is None:
            continue
        [arm, _] = parse(
            [f"{name}:f=1" if name == "monna" else f"{name}:kappa=l2" if name == "lionk" else name, "adamax"],
            "training",
        )
        slack = 1.01  # ends of ranges have three digits
        assert facts.lr[0] / slack <= arm.space["lr"].centre / 1e-3 <= facts.lr[1] * slack, name
        if decay := arm.space.get("weight_decay"):
            assert facts.weight_decay[0] / slack <= decay.centre / 1e-2 <= facts.weight_decay[1] * slack, name
        assert arm.says == facts.relation


def test_one_that_is_around_another() -> None:
    plain, own, _ = parse("mkor,mkor:base=adamw:base.eps=1e-6:inv_freq=5..20:lr=1e-3,adamw", "training")
    assert plain.fixed == {"base": "torch.optim:SGD", "base.momentum": 0.9}
    assert list(plain.space) == ["lr", "weight_decay"]
    assert plain.space["lr"].centre == pytest.approx(0.1, rel=0.01)
    assert own.fixed == {"base": "torch.optim:AdamW", "base.eps": 1e-6, "lr": 1e-3}
    assert list(own.space) == ["weight_decay", "inv_freq"]
    assert own.space["inv_freq"].whole


def test_samplers_have_guidance_and_integers() -> None:
    solver, guided = parse("dpmsolver:order=1..3,ddim:guidance=CFG:guidance.scale=1..8:grid=time_uniform", "sampling")
    assert solver.space == {"order": Range(1, 3, whole=True)}
    assert guided.space == {"guidance.scale": Range(1, 8)}, "its default is no integer"
    parts = split_options({**guided.fixed, "guidance.scale": 2.0, "call.prompt": "a cat", "eta": 1.0})
    assert parts == {
        "": {"eta": 1.0},
        "guidance": {"": "polyak.generate:CFG", "scale": 2.0},
        "steering": {},
        "sample": {"grid": "time_uniform"},
        "call": {"prompt": "a cat"},
    }


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ("adamw,lionn", "training", "no arm is called 'lionn'; did you mean 'lion'?"),
        ("adamw,lionk", "training", "arm 'lionk': LionK needs kappa: lionk:kappa=..."),
        ("adamw,monna", "training", "arm 'monna': MoNNA needs f: monna:f=..."),
        ("adamw,sgd:lr=abc", "training", "arm 'sgd:lr=abc': lr must be a number, got 'abc'"),
        ("adamw,adam:betas=0.9/0.98", "training", "betas must be a tuple like (0.9,0.999), got '0.9/0.98'"),
        ("adamw,mkor:invfreq=3", "training", "MKOR has no option 'invfreq'; did you mean 'inv_freq'?"),
        ("adamw,mkor:base=nosuch", "training", "no arm is called 'nosuch'"),
        ("adamw,mkor:base.momentun=1", "training", "SGD has no option 'momentun'; did you mean 'momentum'?"),
        ("adamw,adan:weight_deacy=1", "training", "Adan has no option 'weight_deacy'; did you mean 'weight_decay'?"),
        ("adamw,adan:lr", "training", "module 'adan' cannot be imported"),
        ("adamw,nowhere:Opt", "training", "module 'nowhere' cannot be imported"),
        ("adamw,torch.optim:AdamX", "training", "torch.optim has no 'AdamX'; did you mean 'Adam"),
        ("adamw,torch.optim:lr_scheduler", "training", "is no optimizer class"),
        ("adamw", "training", "two arms or more to compare, got adamw"),
        ("", "training", "got none"),
        ("adamw,adamw", "training", "'adamw' is given twice"),
        ("adamw,adan:lr=1:lr=2", "training", "lr is given twice"),
        ("adamw,adan:lr=1..x", "training", "lr must be low..high, two numbers, got '1..x'"),
        ("adamw,adan:lr=2..1", "training", "low end must be below the high end"),
        ("adamw,:lr=1", "training", "an arm is a name or module:Class"),
        ("ddim,dpmsolvr", "sampling", "did you mean 'dpmsolver'?"),
        ("ddim,dpmsolver:ordr=2", "sampling", "no option 'ordr'; did you mean 'order'?"),
        ("ddim,heun:guidance=CGF", "sampling", "has no 'CGF'; did you mean 'CFG'?"),
        ("ddim,heun:guidance=cfg", "sampling", "has no 'cfg'; did you mean 'CFG'?"),
        ("ddim,heun:guidance=CFG:guidance.scal=2", "sampling", "CFG has no option 'scal'; did you mean 'scale'?"),
        ("ddim,heun:guidance.scale=2", "sampling", "guidance.scale needs guidance="),
        ("ddim,torch.optim:AdamW", "sampling", "torch.optim:AdamW is no class of solvers or schedulers"),
    ],
)
def test_arms_that_are_not_understood(words: str, kind: str, says: str) -> None:
    with pytest.raises(ArmError) as caught:
        parse(words, kind)  # pyright: ignore[reportArgumentType]
    assert says in str(caught.value)


def test_ranges_are_even_in_their_own_scale() -> None:
    assert [Range(0.001, 0.1).at(p) for p in (0, 0.5, 1)] == pytest.approx([0.001, 0.01, 0.1])
    assert [Range(-1, 1).at(p) for p in (0, 0.5, 1)] == [-1, 0, 1]
    assert [Range(1, 3, whole=True).at(p) for p in (0, 0.4, 1)] == [1, 2, 3]
    assert Range(1, 4, whole=True).centre == 2


# ----------------------------------------------------------------------------------------------------------------- budgets


def test_budgets() -> None:
    whole = budget.parse("5m", 45)
    assert (whole.unit, whole.amount, whole.total) == ("seconds", 6.7, 300)
    assert whole.words == "6.7 s for each trial (5 min 00 s for the whole comparison)"
    each = budget.parse(" 1.5 min / trial", 45)
    assert (each.amount, each.total, each.label) == (90, None, "90 seconds")
    steps = budget.parse("500steps", 45)
    assert (steps.unit, steps.amount, steps.equal, steps.words) == (
        "steps",
        500,
        "equal steps",
        "500 steps for each trial",
    )
    assert budget.parse("20 nfe", 1).unit == "evaluations"
    assert budget.seconds("deadline", "2h") == 7200


@pytest.mark.parametrize(
    "words", ["5", "m", "5 parsecs", "0m", "0steps", "1.5steps", "-3m", "500steps/trial/trial", ""]
)
def test_budgets_that_are_none(words: str) -> None:
    with pytest.raises(ValueError, match="budget must be"):
        budget.parse(words, 3)


@pytest.mark.parametrize("words", ["5", "20nfe", "5m/trial", "0s"])
def test_times_that_are_none(words: str) -> None:
    with pytest.raises(ValueError, match="deadline must be a time such as 90s"):
        budget.seconds("deadline", words)
