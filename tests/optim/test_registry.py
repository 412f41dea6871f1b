"""Optimizers by name."""

import inspect

import pytest
import torch
from references_for_tests import give, gradients, parameters, run

import polyak.optim
from polyak.optim import create, info, names

SHAPES = [(3,), (4, 2)]
NEEDED = {"lionk": {"kappa": "l2"}, "sgdp": {"lr": 0.1}}


def test_every_optimizer_of_the_room_has_a_name():
    public = {getattr(polyak.optim, name) for name in polyak.optim.__all__}
    optimizers = {c for c in public if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert {info(name).optimizer for name in names()} == optimizers


def test_names():
    assert names() == sorted(names())
    assert {"adan", "lion", "adamp", "sgdp", "spam"} <= set(names())
    assert names("ada*") == ["adamp", "adan"]
    assert names("nothing*") == []


@pytest.mark.parametrize("name", [n for n in names() if not info(n).wraps and n != "monna"])
def test_create_is_the_class(name):
    facts, options = info(name), NEEDED.get(name, {})
    ours, twins = parameters(SHAPES), parameters(SHAPES)
    made = run(create(name, ours, **options), ours, gradients(SHAPES, 3))
    run(facts.optimizer(twins, **options), twins, gradients(SHAPES, 3))
    assert type(made) is facts.optimizer
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    assert not torch.equal(ours[1], parameters(SHAPES)[1])


def test_a_module_gives_its_trainable_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    optimizer = create("lion", model, lr=0.1)
    [group] = optimizer.param_groups
    assert len(group["params"]) == 3
    assert group["lr"] == 0.1


def test_groups_keep_their_options():
    params = parameters(SHAPES)
    optimizer = create("adan", [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)
    give(params, gradients(SHAPES, 1)[0])
    optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]


def test_bad_names_and_options():
    with pytest.raises(ValueError, match=r"no optimizer 'adam'; did you mean 'adamp'"):
        create("adam", parameters(SHAPES))
    with pytest.raises(TypeError, match=r"adan has no option 'weigth_decay'; did you mean 'weight_decay'"):
        create("adan", parameters(SHAPES), weigth_decay=0.1)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        create("adan", parameters(SHAPES), lr=-1.0)
