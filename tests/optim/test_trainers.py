"""The optimizers inside other people's training loops: transformers' Trainer, Accelerate, torch.compile."""

import copy
import shutil

import pytest
import torch
from references_for_tests import assert_same, normal

from polyak.optim import SPAM, create, spam

QUICK = dict(reset_interval=3, warmup_steps=2, grace=1, threshold=2.0)  # several resets in a short run

# Optimizers as their users make them, from a model: those that are no rules of the engine, too.
WHOLE = {
    "adan": lambda m: create("adan", m, lr=1e-2, weight_decay=0.02, max_grad_norm=1.0),
    "lion": lambda m: create("lion", m, lr=1e-2, weight_decay=0.1),
    "adamp": lambda m: create("adamp", m, lr=1e-2, weight_decay=0.1),
    "sgdp": lambda m: create("sgdp", m, lr=1e-2, momentum=0.9, nesterov=True),
    "mkor": lambda m: create("mkor", m, base=torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), inv_freq=2),
    "spam": lambda m: SPAM(spam.spam_param_groups(m, 0.5), lr=1e-2, **QUICK),
}
whole = pytest.mark.parametrize("name", sorted(WHOLE))


def _gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double()


@whole
def test_transformers_trainer(tmp_path, name):
    """Four steps at once, and two more from the checkpoint after two, end at the same weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"input_ids": torch.arange(i, i + 8) % 16, "labels": torch.arange(i, i + 8) % 16} for i in range(8)]

    def train(start):
        model = _gpt2()
        optimizer = WHOLE[name](model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], save_steps=2,
            use_cpu=True, disable_tqdm=True, logging_strategy="no", max_grad_norm=0.5,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, train_dataset=data, optimizers=(optimizer, None), args=arguments)
        trainer.train(resume_from_checkpoint=start)
        return model, optimizer

    model, _ = train(None)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), _gpt2().parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    again, optimizer = train(str(tmp_path / "checkpoint-2"))
    assert_same(again.parameters(), model.parameters(), atol=0)
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    WHOLE[name](_gpt2()).load_state_dict(saved)
    assert optimizer.state


@whole
def test_accelerate(tmp_path, name):
    """Gradient accumulation and clipping as Accelerate does them, and its checkpoints."""
    accelerate = pytest.importorskip("accelerate")
    batches = [normal((3, 4), i) for i in range(8)]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def network():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()

    model, twin = network(), network()
    prepared, optimizer = accelerator.prepare(model, WHOLE[name](model))
    reference = WHOLE[name](twin)

    def go(xs):
        for x in xs:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(x).square().sum())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    def expect(xs):
        for x, y in zip(xs[::2], xs[1::2], strict=True):
            reference.zero_grad()
            ((twin(x).square().sum() + twin(y).square().sum()) / 2).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            reference.step()

    go(batches[:4])
    expect(batches[:4])
    assert_same(model.parameters(), twin.parameters(), atol=1e-12)
    accelerator.save_state(str(tmp_path))
    go(batches)
    accelerator.load_state(str(tmp_path))
    go(batches[4:])
    expect(batches[4:])
    assert_same(model.parameters(), twin.parameters(), atol=1e-12)


COMPILERS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@whole
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_training_step(name, compiler):
    """The optimizer breaks the graph and runs as it is: the same numbers, up to what the compiler does to the model's."""
    if compiler == "inductor" and (name != "adamp" or not shutil.which("g++")):
        pytest.skip("one optimizer, where there is a C++ compiler")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    first, second = WHOLE[name](model), WHOLE[name](twin)
    x = normal((5, 3), 0)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    torch.compiler.reset()
    compiled = torch.compile(step, backend=compiler)
    for _ in range(3):
        compiled(model, first)
        step(twin, second)
    assert_same(model.parameters(), twin.parameters(), atol=1e-14 if compiler == "eager" else 1e-9)
