"""LCSC with tied weights, which files of safetensors hold once and models twice; and copies of its objects."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from polyak.teachers.lcsc import LCSC, CheckpointBank, CheckpointSaver, combine, landscape, metric_to, sample_metric


class Tied(nn.Module):
    """Two pairs of tied weights, one of them three times; tied buffers, one of integers; and a BatchNorm with two names."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head, self.third = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.Linear(5, 7)
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.head.weight = self.third.weight = self.embed.weight
        self.outer.weight = self.inner.weight
        for name, value in (("shift", torch.randn(5)), ("count", torch.tensor([seed]))):
            self.inner.register_buffer(name, value)
            self.outer.register_buffer(name, value)
        self.to(dtype)
        self.outer.shift, self.outer.count = self.inner.shift, self.inner.count

    def forward(self, x):
        h = self.outer(self.inner(self.embed(x)).tanh() + self.outer.shift)
        return self.head(h) + self.third(h)


ONCE = ["embed.weight", "inner.bias", "inner.count", "inner.shift", "inner.weight", "third.bias"]
X = torch.arange(7)


def loss(model):
    return nn.functional.cross_entropy(model(X).float(), X).item()


def _save(how, model, path):
    full = {k: v.detach().clone() for k, v in model.state_dict().items()}
    once = {k: full[k] for k in ONCE}
    if how == "other names":  # those that come last; which one is kept is the writer's choice
        once = {"head.weight": full["head.weight"], "third.bias": full["third.bias"], "inner.bias": full["inner.bias"]}
        once |= {f"outer.{k}": full[f"outer.{k}"] for k in ("weight", "shift", "count")}
    if how in ("safetensors", "other names"):
        save_file(once, path / "model.safetensors")
    elif how == "save_model":
        save_model(model, str(path / "model.safetensors"))
    elif how == "shards":
        names, where = sorted(once), {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"model-{i}.safetensors"
            save_file({k: once[k] for k in part}, path / file)
            where |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(once if how == "torch, once" else model.state_dict(), path / "pytorch_model.bin")
    return path


WAYS = ["safetensors", "other names", "save_model", "shards", "torch", "torch, once"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_once_is_found_by_its_other_name(how, dtype, tmp_path):
    models = [Tied(i, dtype) for i in range(3)]
    for i, model in enumerate(models):
        (tmp_path / f"checkpoint-{i}").mkdir()
        _save(how, model, tmp_path / f"checkpoint-{i}")
    model, twin = Tied(9, dtype), Tied(9, dtype)
    full = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    found = LCSC(tmp_path, model=model, objective=loss, evals=12, population=4).run()
    wanted = LCSC(full, model=twin, objective=loss, evals=12, population=4).run()
    assert torch.equal(found.history, wanted.history)
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert model.head.weight is model.embed.weight
    assert int(model.outer.count) == 2  # of the last checkpoint


@pytest.mark.parametrize("how", WAYS)
def test_a_combination_is_applied_to_all_names(how, tmp_path):
    for i in range(3):
        (tmp_path / f"checkpoint-{i}").mkdir()
        _save(how, Tied(i), tmp_path / f"checkpoint-{i}")
    a = [0.5, -0.25, 0.75]
    lcsc = LCSC(tmp_path, model=Tied(8), objective=loss)
    for model in (lcsc.apply_(Tied(9), a), lcsc.apply_(copy.deepcopy(Tied(9)), a)):
        expected = combine([Tied(i).state_dict() for i in range(3)], a)
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), key
    values = landscape(*(tmp_path / f"checkpoint-{i}" for i in range(3)), ([0.0], [0.0]), objective=loss, model=Tied(9))
    assert values.item() == pytest.approx(loss(Tied(0)))


def test_what_is_not_tied_is_still_missing():
    model = Tied(3)
    given = [{k: v.clone() for k, v in Tied(i).state_dict().items() if k in ONCE} for i in range(2)]
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())  # equal, and not the same
    with pytest.raises(ValueError, match=r"the checkpoints lack 'head\.weight', which the model has"):
        LCSC(given, model=model, objective=loss).run()
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        LCSC(given, objective=loss).apply_(model, [0.5, 0.5])
    model.head.weight = nn.Parameter(model.embed.weight.detach()[:, :])  # another object of the same memory
    LCSC(given, model=model, objective=loss, evals=3, population=2).run()
    assert torch.equal(model.head.weight, model.embed.weight)


def test_statistics_of_a_batch_norm_with_two_names_are_collected_anew():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(3)

    states = [{k: v.clone() for k, v in Net().state_dict().items() if k.startswith("second")} for _ in range(2)]
    states[1]["second.running_mean"] += 1
    lcsc = LCSC(states, model=Net(), objective=lambda m: 0.0, reestimate=lambda m: None)
    assert sorted(lcsc.bank.keys) == ["second.bias", "second.weight"]


# Copies.


def of_samples(model, n, generator):
    return torch.randn(n, 5, generator=generator) @ model.inner.weight.T


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", ["energy", "fid", "kid", "mmd", "sliced_w2"])
def test_copies_of_a_search_go_on_as_the_original(way, kind, tmp_path):
    reference = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    objective = sample_metric(of_samples, metric_to(reference, kind), 16, seed=1)
    saver = CheckpointSaver(tmp_path, every=1)
    for i in range(3):
        way(saver)({k: v for k, v in Tied(i).state_dict().items() if k in ONCE}, i + 1)
    lcsc = LCSC(way(saver).bank(), model=Tied(9), objective=objective, evals=8, population=4)
    before = way(lcsc)
    expected = lcsc.run()
    after = way(lcsc)
    for one in (before, after, way(before)):
        found = one.run()
        assert torch.equal(found.history, expected.history)
        assert torch.equal(one.model.inner.weight, lcsc.model.inner.weight)
        assert one.model.head.weight is one.model.embed.weight
    assert torch.equal(way(expected).coefficients, expected.coefficients)
    bank = lcsc.bank
    bank.keep(10**6, "cpu")
    assert torch.equal(
        combine(way(bank), [0.2, 0.3, 0.5])["inner.weight"], combine(bank, [0.2, 0.3, 0.5])["inner.weight"]
    )
    assert isinstance(way(bank), CheckpointBank)


def test_a_callback_of_transformers_is_copied(tmp_path):
    pytest.importorskip("transformers")
    callback = CheckpointSaver(tmp_path, every=1).transformers()
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):

        class State:
            is_world_process_zero, global_step = True, 3

        other.on_step_end(None, State, None, model=nn.Linear(2, 1))
        assert (tmp_path / "step-00000003.safetensors").is_file()
