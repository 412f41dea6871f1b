"""SPAM's claim at a tiny scale: every arm runs and measures, and every arm of a seed meets the same spikes."""

from __future__ import annotations

import math
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyak.claims import _llama, _problems
from polyak.claims.optim import spam
from polyak.claims.optim.spam import CLAIM, SMALL
from polyak.lab.claim import Measurement, Trial
from polyak.optim.spam import SPAM

PAIRS = [(task, arm.name) for task in SMALL for arm in CLAIM.arms_on(task)]
TINY = dict(steps=4, dim=8, context=8, batch=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trial_of(task: str, arm: str, seed: int = 0, scale: str = "small", **options: object) -> Trial:
    given = {**CLAIM.options(scale, task, arm, CLAIM.arm(arm).points[0]), **(TINY if task in SMALL else {}), **options}
    return Trial(claim="spam", scale=scale, task=task, arm=arm, seed=seed, options=given)


@lru_cache
def run(task: str, arm: str, seed: int = 0, **options: object) -> tuple[Measurement, ...]:
    return tuple(CLAIM.trial(trial_of(task, arm, seed, **options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_and_tuning_ask(task, arm):
    *curve, final = run(task, arm)
    assert [m.at for m in curve] == [{"step": i + 1} for i in range(4)]
    asked = {c.metric for c in CLAIM.criteria if c.task == task} | {CLAIM.task(task).tune}
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())
    assert final.at is None


def test_the_equations_hold_and_the_controls_do_not():
    finals = {a.name: run("equations", a.name)[-1].values for a in CLAIM.arms_on("equations")}
    asked = [c for c in CLAIM.criteria if c.task == "equations"]
    assert len(asked) == 5
    for c in asked:
        assert finals[c.arm][c.metric] <= c.bound
        assert finals[c.control][c.metric] > c.bound + 1e-3


def test_a_trial_is_a_function_of_its_seed():
    for arm in ("spam", "spam_sparse"):
        once = run("entries", arm)
        assert once == run.__wrapped__("entries", arm)
        assert once != run("entries", arm, seed=1)


def test_all_arms_of_a_seed_start_alike():
    assert len({run(task, arm)[0].values["train_loss"] for task, arm in PAIRS}) == 1


def spiked(task: str, seed: int, *, steps: int, others: int = 0) -> list[list[torch.Tensor]]:
    """By what the hook multiplies the gradients of three tensors, which are ones."""
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (300, 7, 1000)]
    hook = spam._spikes(trial_of(task, "adam", seed), weights)
    torch.manual_seed(others)  # of no consequence
    found = []
    for _ in range(steps):
        for w in weights:
            w.grad = torch.ones_like(w)
        hook(None, (), {})
        found.append([w.grad for w in weights if w.grad is not None])
    return found


def test_spikes_are_what_the_task_says():
    steps = 2000
    for task, sizes in (("entries", {300: 3, 7: 1, 1000: 10}), ("tensors", {300: 300, 7: 7, 1000: 1000})):
        hit = {300: 0, 7: 0, 1000: 0}
        for grads in spiked(task, 0, steps=steps):
            touched = [g for g in grads if (g != 1).any()]
            assert len(touched) <= 1
            for g in touched:
                assert sorted(g.unique().tolist()) in ([1.0, 1000.0], [1000.0])
                assert int((g == 1000).sum()) == sizes[len(g)]
                hit[len(g)] += 1
        # 40 of 2000 steps on average, with a standard deviation of 6.3; a third of them for each tensor, of 3.6.
        assert abs(sum(hit.values()) - 40) < 4 * 6.3
        assert all(abs(n - 40 / 3) < 4 * 3.6 for n in hit.values())


def test_spikes_come_from_the_seed_alone():
    def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
        return all(torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))

    first = spiked("entries", 3, steps=500)
    assert same(first, spiked("entries", 3, steps=500, others=1))
    assert not same(first, spiked("entries", 4, steps=500))


@pytest.mark.parametrize("arm", [arm.name for arm in CLAIM.arms_on("entries")])
def test_spikes_reach_all_arms_but_the_clean_and_clipping_comes_after_them(arm, monkeypatch):
    grads: list[torch.Tensor] = []
    original = SPAM._prepare if CLAIM.arm(arm).options["optimizer"] == "spam" else None
    if original is not None:

        def prepare(self: SPAM) -> None:
            grads.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
            original(self)

        monkeypatch.setattr(SPAM, "_prepare", prepare)
    else:
        init = torch.optim.Adam._init_group

        def gather(self: torch.optim.Adam, group: Any, params: Any, found: Any, *rest: Any) -> Any:
            grads.append(torch.cat([p.grad.flatten() for p in group["params"]]))
            return init(self, group, params, found, *rest)

        monkeypatch.setattr(torch.optim.Adam, "_init_group", gather)
    run("tensors" if arm == "adam_norm" else "entries", arm, probability=1.0, part=1.0)
    largest = max(g.abs().max().item() for g in grads)
    if arm in ("adam_clean", "spam_clean"):
        assert largest < 1
    elif arm == "adam_norm":
        assert max(g.norm().item() for g in grads) == pytest.approx(1.0, rel=1e-3)
    elif arm == "adam_value":
        assert largest == pytest.approx(0.01)
    else:
        assert largest > 10


def test_the_memory_of_adam_and_of_a_quarter_of_the_moments():
    assert run("entries", "adam")[-1].values["state_bytes"] == 8.0
    assert run("entries", "spam")[-1].values["state_bytes"] == 8.0
    problem = _problems.char_lm(0, dim=32, context=8, batch=2, expansion=4)
    optimizer = spam._optimizer(trial_of("entries", "spam_sparse"), problem.model)
    problem.loss(next(problem.batches)).backward()
    optimizer.step()
    # Two float32 and a byte for each kept entry, and eight bytes for every 1024 entries.
    assert spam._state_bytes(problem.model, optimizer) == pytest.approx(0.25 * 9, rel=0.01)
    sparse = [p for group in optimizer.param_groups if group["density"] < 1 for p in group["params"]]
    blocks = [m for block in problem.model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert {id(p) for p in sparse} == {id(m.weight) for m in blocks}


def test_ablations_lack_one_part_each():
    model = _problems.char_lm(0, dim=8, heads=2, context=8, batch=2).model
    made = {name: spam._optimizer(trial_of("entries", name), model).param_groups[0]
            for name in ("spam", "spam_no_reset", "spam_no_clip")}  # fmt: skip
    assert [g["threshold"] for g in made.values()] == [5000.0, 5000.0, 0.0]
    assert [g["reset_interval"] for g in made.values()] == [100, spam.NEVER, 100]
    assert all((g["warmup_steps"], g["grace"]) == (20, 20) for g in made.values())
    assert run("tensors", "spam_no_clip", steps=40)[-1].values["clipped"] == 0
    assert run("tensors", "spam", steps=40, probability=1.0)[-1].values["clipped"] > 0


def test_every_tuned_arm_gets_as_many_rates():
    assert {len(a.points) for a in CLAIM.arms if a.grid} == {3}


def test_the_papers_scale_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(_llama, "import_module", _missing)
    with pytest.raises(_problems.data.DataError, match="pip install transformers datasets"):
        next(iter(CLAIM.trial(trial_of("llama_60m", "spam_c4", scale="paper"))))


def _missing(name: str) -> object:
    raise ImportError(name)


class Documents:
    """A stand-in for a streamed data set."""

    def shuffle(self, *, seed: int, buffer_size: int) -> Documents:
        return self

    def iter(self, *, batch_size: int) -> Any:
        for start in range(0, 30, batch_size):
            yield {"text": ["x" * (1 + i % 7) for i in range(start, min(start + batch_size, 30))]}


def tokenize(texts: list[str], *, max_length: int, **options: object) -> dict[str, torch.Tensor]:
    """A letter is the token 5; padding is 0."""
    mask = torch.tensor([[int(i < len(text)) for i in range(max_length)] for text in texts])
    return {"input_ids": 5 * mask, "attention_mask": mask}


@pytest.fixture
def small_llama(monkeypatch):
    transformers = pytest.importorskip("transformers")
    hub = SimpleNamespace(load_dataset=lambda *where, split, streaming: Documents())
    tokenizers = SimpleNamespace(from_pretrained=lambda name, model_max_length: tokenize)
    stand_in = SimpleNamespace(
        AutoTokenizer=tokenizers, LlamaConfig=transformers.LlamaConfig, LlamaForCausalLM=transformers.LlamaForCausalLM
    )
    modules = {"transformers": stand_in, "datasets": hub}
    monkeypatch.setattr(_llama, "import_module", lambda name: modules.get(name) or import_module(name))
    monkeypatch.setitem(_llama.SIZES, "60m", (16, 32, 2, 1))
    monkeypatch.setattr(_llama, "VOCABULARY", 20)


@pytest.mark.parametrize("arm", ["adam_c4", "spam_c4"])
def test_the_papers_scale_with_a_stand_in_for_c4(arm, small_llama):
    *curve, final = CLAIM.trial(
        trial_of("llama_60m", arm, scale="paper", steps=20, warmup=2, batch=8, micro_batch=4, lr=0.02)
    )
    assert len(curve) == 20
    assert final.values.keys() == {"perplexity"}
    assert 1 <= final.values["perplexity"] < 5  # of 20 tokens one is ever right


def test_padding_is_neither_learned_nor_measured(small_llama):
    problem = _llama.llama_c4(0, "cpu", size="60m", batch=8, micro_batch=4, length=8)
    assert problem.accumulate == 2
    some = next(problem.batches)
    assert [(row >= 0).sum().item() for row in some] == [1, 2, 3, 4]
    assert set(some.unique().tolist()) == {-100, 5}
    with torch.no_grad():
        logits = problem.model(input_ids=torch.full((1, 4), 5)).logits[0, :3].float()
    expected = torch.nn.functional.cross_entropy(logits, torch.full((3,), 5), reduction="none")
    # Rows of 2, 3 and 4 letters have 1, 2 and 3 that are predicted.
    mean = (3 * expected[0] + 2 * expected[1] + expected[2]) / 6
    assert problem.loss(some).item() == pytest.approx(mean.item(), rel=2e-2)  # bfloat16
