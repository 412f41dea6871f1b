"""Checkpoints from memory and from files of every kind, and their linear combinations."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from lcsc_cases import Counting, states
from safetensors.torch import save_file

from polyak.teachers import CheckpointBank, combine, ema_coefficients
from polyak.teachers.lcsc.bank import Combination

A = torch.tensor([0.7, -1.3, 0.9, 0.7], dtype=torch.float64)


def bits(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, bytes]]:
    return [(k, v.dtype, v.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for k, v in state.items()]


# -- combinations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("i", [0, 2, 3])
def test_a_single_one_gives_that_checkpoint_bitwise(dtype, i):
    given = states(dtype=dtype)
    made = combine(given, torch.eye(4, dtype=torch.float64)[i])
    expected = {**given[i], "steps": given[-1]["steps"]}  # with its minus zero
    assert bits(made) == bits(expected)


def test_a_combination_is_the_sum_in_float64():
    given = states()
    made = combine(given, A)
    for key in ("net.weight", "net.bias"):
        exact = sum(a * s[key].double() for a, s in zip(A.tolist(), given, strict=True))
        size = sum(abs(a) * s[key].double().abs() for a, s in zip(A.tolist(), given, strict=True))
        # Four products and three sums, each rounded to float32.
        assert bool(((made[key].double() - exact).abs() <= 7 * 2.0**-24 * size + 1e-12).all())


def test_combinations_are_affine_in_the_coefficients():
    given = states(dtype=torch.float64)
    b = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    left, right = combine(given, A), combine(given, b)
    mixed = combine(given, 0.3 * A + 0.7 * b)
    summed = combine(given, A + b, affine=False)
    for key in ("net.weight", "net.bias"):
        torch.testing.assert_close(mixed[key], 0.3 * left[key] + 0.7 * right[key], rtol=0, atol=1e-14)
        torch.testing.assert_close(summed[key], left[key] + right[key], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_cast_at_the_end(dtype):
    given = states(dtype=dtype)
    made = combine(given, A)
    wide = combine([{k: v.float() if v.is_floating_point() else v for k, v in s.items()} for s in given], A)
    assert made["net.weight"].dtype == dtype
    assert torch.equal(made["net.weight"], wide["net.weight"].to(dtype))


def test_what_is_no_float_comes_from_the_last_checkpoint():
    given = [{**s, "extra": f"text {i}"} for i, s in enumerate(states())]
    made = combine(given, A)
    assert made["steps"].item() == 30
    assert made["extra"] == "text 3"
    assert list(made) == list(given[-1])


def test_inputs_are_neither_changed_nor_shared():
    given = states()
    before = [{k: v.clone() for k, v in s.items()} for s in given]
    made = combine(given, [0, 0, 0, 1])
    for value in made.values():
        value.zero_()
    assert all(torch.equal(s[k], b[k]) for s, b in zip(given, before, strict=True) for k in s)


def test_keys_choose_what_is_combined():
    given = states()
    made = combine(CheckpointBank(given, keys=["net.bias"]), A)
    assert torch.equal(made["net.weight"], given[-1]["net.weight"])
    assert not torch.equal(made["net.bias"], given[-1]["net.bias"])
    assert CheckpointBank(given, keys=lambda k: k.endswith("weight")).keys == ["net.weight"]
    with pytest.raises(ValueError, match=r"keys must be one of .*got 'net\.weigh'; did you mean 'net\.weight'"):
        CheckpointBank(given, keys=["net.weigh"])
    with pytest.raises(ValueError, match="keys must leave something to combine"):
        CheckpointBank(given, keys=lambda k: False)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("start", [0, 3, 7])
def test_ema_coefficients_are_the_recurrence(rate, start):
    g = torch.Generator().manual_seed(0)
    thetas = torch.randn(8, 6, dtype=torch.float64, generator=g)
    m = thetas[start]
    for theta in thetas[start + 1 :]:
        m = rate * m + (1 - rate) * theta
    a = ema_coefficients(8, rate, start=start)
    assert abs(float(a.sum()) - 1) < 1e-12
    assert float((thetas.T @ a - m).abs().max()) < 1e-12


def test_moves_equal_combining_anew():
    bank = CheckpointBank(states(dtype=torch.float32))
    combination, fresh = Combination(bank), Combination(bank)
    g = torch.Generator().manual_seed(1)
    a = ema_coefficients(4, 0.5)
    combination.set(a)
    largest = {key: w.abs().clone() for key, w in combination.weights.items()}
    for n in range(1, 100):  # until the next combination from the start
        i, j = torch.randperm(4, generator=g)[:2].tolist()
        a = a.clone()
        step = 0.05 * torch.randn((), dtype=torch.float64, generator=g)
        a[i] += step
        a[j] -= step
        combination.move(a)
        fresh.set(a)
        for key, w in combination.weights.items():
            off = (w - fresh.weights[key]).abs()
            largest[key] = torch.maximum(largest[key], w.abs() + 1)  # intermediate sums are at most this
            # Two additions a move and eight roundings of a combination, each of half a unit in the last place.
            assert bool((off <= (2 * n + 8) * 2.0**-24 * largest[key]).all())
            if n == 1:
                assert bool((off <= 1e-6).all())


def test_a_move_reads_only_what_changes():
    given = [Counting(s, str(i)) for i, s in enumerate(states())]
    combination = Combination(CheckpointBank(given))
    combination.set(A)
    Counting.reads = 0
    combination.move(A + torch.tensor([0.0, 0.5, 0.0, -0.5], dtype=torch.float64))
    assert Counting.reads == 4  # two entries of two checkpoints


def test_a_combination_must_be_set_before_it_is_moved():
    with pytest.raises(RuntimeError, match="set before it can be moved"):
        Combination(CheckpointBank(states())).move(A)


@pytest.mark.parametrize(("budget", "count"), [(0, 0), (100, 1), (160, 2), (10**6, 3)])
def test_checkpoints_that_are_kept_give_the_same_weights(budget, count):
    bank = CheckpointBank(states())
    assert bank.keep(budget, "cpu") == count
    combination = Combination(bank)
    combination.set(ema_coefficients(4, 0.5))
    combination.move(A)
    made = combine(states(), A)
    for key, w in combination.weights.items():
        torch.testing.assert_close(w, made[key], rtol=0, atol=1e-6)


def test_differences_in_half_precision_are_close_and_read_once():
    given = [Counting(s, str(i)) for i, s in enumerate(states())]
    bank = CheckpointBank(given, dtype=torch.float16)
    assert bank.keep(3 * 40, "cpu") == 3
    combination = Combination(bank)
    combination.set(ema_coefficients(4, 0.5))
    Counting.reads = 0
    combination.move(A)
    assert Counting.reads == 0
    made = combine(states(), A)
    for key, w in combination.weights.items():
        torch.testing.assert_close(w, made[key], rtol=0, atol=2.0**-11 * 20)


def test_no_more_than_one_tensor_of_one_checkpoint_is_read_at_a_time():
    g = torch.Generator().manual_seed(0)
    made = [{f"w{j}": torch.randn(1000, generator=g) for j in range(5)} for _ in range(12)]
    bank = CheckpointBank([Counting(s, str(i)) for i, s in enumerate(made)])
    Counting.alive = Counting.most = 0
    combination = Combination(bank)
    combination.set(ema_coefficients(12, 0.5))
    combination.move(ema_coefficients(12, 0.8))
    assert 4000 <= Counting.most <= 8000  # the tensor at hand and the one before it, of a checkpoint's 20000
    assert not bank.identical()
    assert Counting.most <= 16000


# -- where checkpoints lie -------------------------------------------------------------------------------------------------


def written(folder, form):
    given = states()
    paths = []
    for i, state in enumerate(given):
        at = folder / f"checkpoint-{(i + 8) * 100}"  # 800, 900, 1000, 1100: not in the order of letters
        if form == "safetensors":
            save_file(state, path := at.with_suffix(".safetensors"))
        elif form == "torch":
            torch.save(state, path := at.with_suffix(".pt"))
        elif form == "nested":
            torch.save({"epoch": 3, "model": state}, path := at.with_suffix(".pth"))
        elif form == "old":
            torch.save(state, path := at.with_suffix(".pt"), _use_new_zipfile_serialization=False)
        elif form == "distributed":
            import torch.distributed.checkpoint as dcp

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save({"model": state}, checkpoint_id=at, no_dist=True)
            path = at
        elif form == "trainer":
            at.mkdir()
            save_file(state, at / "model.safetensors")
            torch.save({"state": {}}, at / "optimizer.pt")
            torch.save({"step": 3}, at / "other.pt")
            path = at
        else:
            at.mkdir()
            first, second = {"net.weight": state["net.weight"]}, {k: state[k] for k in ("steps", "net.bias")}
            suffix = "safetensors" if form == "sharded_safetensors" else "bin"
            stem = "model" if suffix == "safetensors" else "pytorch_model"
            names = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
            for name, part in zip(names, (first, second), strict=True):
                (save_file if suffix == "safetensors" else torch.save)(part, at / name)
            where = {**dict.fromkeys(first, names[0]), **dict.fromkeys(second, names[1])}
            (at / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
            path = at
        paths.append(path)
    return given, paths


FORMS = [
    "safetensors", "torch", "nested", "old", "distributed", "trainer", "sharded_safetensors", "sharded_torch",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_files_give_what_state_dicts_give(tmp_path, form):
    given, paths = written(tmp_path, form)
    entry = "model" if form in ("nested", "distributed") else None
    expected = combine(given, A)
    for checkpoints in (tmp_path, paths, [str(p) for p in paths]):
        bank = CheckpointBank(checkpoints, entry=entry)
        assert len(bank) == 4
        made = combine(bank, A)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[k], expected[k]) for k in expected)


def test_kinds_may_be_mixed(tmp_path):
    given, paths = written(tmp_path, "safetensors")
    torch.save(given[3], tmp_path / "last.pt")
    index = written(tmp_path, "sharded_torch")[1][1] / "pytorch_model.bin.index.json"
    made = combine([given[0], index, paths[2], tmp_path / "last.pt"], A)
    assert all(torch.equal(v, combine(given, A)[k]) for k, v in made.items())


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_fewer_than_two_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="checkpoints must be at least 2, got 1"):
        CheckpointBank(states(1))
    save_file(states(1)[0], tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="at least 2, got 1 in"):
        CheckpointBank(tmp_path)
    with pytest.raises(TypeError, match="several state dicts in a list"):
        CheckpointBank(states(1)[0])


def test_entries_and_shapes_that_differ_are_named():
    one, two, three = states(3)
    with pytest.raises(ValueError, match=r"number 1 lacks 'net\.bias', which number 0 has"):
        CheckpointBank([one, {k: v for k, v in two.items() if k != "net.bias"}])
    with pytest.raises(ValueError, match="number 2 has 'more', which number 0 lacks"):
        CheckpointBank([one, two, {**three, "more": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"'net\.bias' has shape \(7,\) in number 1, shape \(5,\) in number 0"):
        CheckpointBank([one, {**two, "net.bias": torch.ones(7)}])
    with pytest.raises(ValueError, match="'steps' has no tensor in number 1"):
        CheckpointBank([one, {**two, "steps": 3}])


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.5, 0.5], r"shape \(4,\), one for each checkpoint, got \(2,\)"),
        ([0.5, 0.5, 0.5, 0.5], "must sum to 1, got 2.0"),
        ([float("nan"), 0, 0, 1], "must be finite"),
    ],
)
def test_coefficients_are_checked(coefficients, message):
    with pytest.raises(ValueError, match=message):
        combine(states(), coefficients)


def test_lora_factors_are_warned_of():
    given = [{"layer.lora_A.weight": torch.randn(2, 3)} for _ in range(2)]
    with pytest.warns(UserWarning, match="'layer.lora_A.weight' is a factor of a LoRA update"):
        CheckpointBank(given)


def test_paths_that_cannot_be_read_say_why(tmp_path):
    one = states(1)[0]
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        CheckpointBank([one, tmp_path / "none.pt"])
    with pytest.raises(FileNotFoundError, match="a folder that holds several"):
        CheckpointBank(tmp_path / "none")
    with pytest.raises(TypeError, match=r"checkpoints\[1\] must be a state dict, a path or a Source, got 3"):
        CheckpointBank([one, 3])
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a safetensors file"):
        CheckpointBank([one, tmp_path / "bad.safetensors"])
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        CheckpointBank([one, tmp_path / "bad.pt"])
    (tmp_path / "bad.txt").write_text("nonsense")
    with pytest.raises(ValueError, match="suffix"):
        CheckpointBank([one, tmp_path / "bad.txt"])
    torch.save({"epoch": 1, "model": one}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match=r"no tensors at its top level; say .* entry='model'"):
        CheckpointBank([one, tmp_path / "nested.pt"])
    with pytest.raises(ValueError, match=r"no state dict under entry='net'; it has \['epoch', 'model'\]"):
        CheckpointBank([one, tmp_path / "nested.pt"], entry="net")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        CheckpointBank([one, tmp_path / "list.pt"])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not a shard index"):
        CheckpointBank([one, tmp_path / "model.safetensors.index.json"])
    with pytest.raises(ValueError, match="one checkpoint in shards"):
        CheckpointBank(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        CheckpointBank([one, tmp_path / "model.safetensors.index.json"])


def test_a_folder_must_hold_one_checkpoint_where_one_is_meant(tmp_path):
    one = states(1)[0]
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        CheckpointBank([one, folder])
    save_file(one, folder / "x.safetensors")
    save_file(one, folder / "y.safetensors")
    with pytest.raises(ValueError, match=r"one checkpoint, it has x\.safetensors, y\.safetensors"):
        CheckpointBank([one, folder])


class Unsafe:
    pass


def test_torch_files_with_more_than_weights_are_refused(tmp_path):
    torch.save({"w": torch.ones(2), "config": Unsafe()}, tmp_path / "unsafe.pt")
    with pytest.raises(ValueError, match=r"cannot be read as weights alone; save the model's state_dict\(\)"):
        CheckpointBank([{"w": torch.ones(2)}, tmp_path / "unsafe.pt"])


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    save_file(states(1)[0], tmp_path / "one.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"polyak\[teachers\]"):
        CheckpointBank([states(1)[0], tmp_path / "one.safetensors"])


def test_the_kept_type_must_be_floating():
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype, got torch\.int8"):
        CheckpointBank(states(), dtype=torch.int8)
