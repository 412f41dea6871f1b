"""SPAM's claim: gradient spikes do not derail it, which they do Adam; and a quarter of the moments is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Plot, Scale, Task, Trial

SMALL = ("entries", "tensors")
PAPER_TASKS = ("llama_60m", "llama_130m", "llama_350m", "llama_1b")
LINEAR = ("qkv", "out", "mlp")  # the modules whose matrices may have sparse momentum


def trial(t: Trial) -> Iterator[Measurement]:
    """Train a language model with one arm's optimizer, at the small scales with spikes in its gradients."""
    yield from _llama(t) if t.task in PAPER_TASKS else _small(t)


def _small(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims import _problems

    problem = _problems.char_lm(t.seed, t.device, dim=t["dim"], expansion=4, context=t["context"], batch=t["batch"])
    weights, steps = list(problem.model.parameters()), t["steps"]
    optimizer = _optimizer(t, problem.model)
    if t["spikes"]:
        optimizer.register_step_pre_hook(_spikes(t, weights))
    # Registered later, clipping acts on the spikes.
    if t["clip_norm"]:
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(weights, t["clip_norm"]) and None)
    if t["clip_value"]:
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_value_(weights, t["clip_value"]))
    clipped = torch.zeros((), dtype=torch.int64)
    if t["optimizer"] == "spam":
        optimizer.register_step_post_hook(lambda *_: clipped.add_(optimizer.last_clipped.to("cpu")) and None)
    schedule = _problems.warmup_cosine(steps, warmup=t["warmup"])
    for point in _problems.train(problem, optimizer, steps=steps, schedule=schedule):
        final = {} if point.at else {"clipped": float(clipped), "state_bytes": _state_bytes(problem.model, optimizer)}
        yield Measurement({**point.values, **final}, point.at)


def _spikes(t: Trial, weights: list[Any]) -> Any:
    """A hook before each step. When spikes come, where, and in which entries depends on the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(2**32 + t.seed)  # not that of the batches

    def hook(*_: Any) -> None:
        if torch.rand((), generator=generator).item() < t["probability"]:
            hit = weights[int(torch.randint(len(weights), (), generator=generator))].grad
            places = torch.randperm(hit.numel(), generator=generator)[: max(1, round(t["part"] * hit.numel()))]
            hit.view(-1)[places.to(hit.device)] *= t["size"]

    return hook


def _optimizer(t: Trial, model: Any) -> Any:
    import torch

    from polyak.optim.spam import SPAM, spam_param_groups

    if t["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=t["lr"], fused=True)
    return SPAM(
        spam_param_groups(model, t["density"], LINEAR) if t["density"] < 1 else model.parameters(),
        lr=t["lr"],
        reset_interval=t["reset_interval"],
        warmup_steps=t["warmup_steps"],
        threshold=t["threshold"],
        grace=t["grace"],
        generator=torch.Generator().manual_seed(t.seed),  # of the masks
    )


def _state_bytes(model: Any, optimizer: Any) -> float:
    """Bytes of state for each entry of the matrices that may have sparse momentum."""
    import torch

    matrices = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in LINEAR)
    }
    held = sum(
        value.untyped_storage().nbytes()
        for p in matrices
        for value in optimizer.state[p].values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    return held / sum(p.numel() for p in matrices)


def _llama(t: Trial) -> Iterator[Measurement]:
    from polyak.claims import _llama, _problems

    problem = _llama.llama_c4(t.seed, t.device, size=t["size"], batch=t["batch"], micro_batch=t["micro_batch"])
    steps = t["steps"]
    schedule = _problems.warmup_cosine(steps, warmup=t["warmup"] / steps, end=0.1)
    yield from _problems.train(problem, _optimizer(t, problem.model), steps=steps, schedule=schedule, points=50)


NEVER = 10**9
ADAM = {"optimizer": "adam", "spikes": True, "clip_norm": 0.0, "clip_value": 0.0}
SPAM = {**ADAM, "optimizer": "spam", "density": 1.0}
# Every grid has its arm's best rate of a pilot, on a seed that is not reported, in its middle.
HIGH = {"lr": (6e-3, 1.2e-2, 2.4e-2)}
LOW = {"lr": (3e-3, 6e-3, 1.2e-2)}

ARMS = (
    Arm(name="adam", label="Adam", role="baseline", tasks=SMALL, grid=HIGH, options=ADAM),
    Arm(
        name="adam_norm", label="Adam, norm clipped", role="baseline", tasks=SMALL, grid=HIGH,
        options={**ADAM, "clip_norm": 1.0}, says="the gradient's norm is at most 1",
    ),
    Arm(
        name="adam_value", label="Adam, values clipped", role="baseline", tasks=("entries",), grid=HIGH,
        options={**ADAM, "clip_value": 0.01}, says="every entry of the gradient is at most 0.01 in size",
    ),
    Arm(
        name="spam", label="SPAM", role="method", tasks=SMALL, grid=LOW, options=SPAM,
        says="resets every 100 steps, then 20 of warmup and of grace; threshold 5000",
    ),
    Arm(
        name="spam_no_reset", label="SPAM without resets", role="ablation", tasks=SMALL, grid=HIGH,
        options={**SPAM, "reset_interval": NEVER}, says="clipping alone",
    ),
    Arm(
        name="spam_no_clip", label="SPAM without clipping", role="ablation", tasks=SMALL, grid=LOW,
        options={**SPAM, "threshold": 0.0}, says="resets alone; the control: it does not look at spikes",
    ),
    Arm(
        name="spam_sparse", label="SPAM, a quarter of the moments", role="method", tasks=("entries",), grid=HIGH,
        options={**SPAM, "density": 0.25}, says="density 0.25 in the linear layers of attention and feed-forward",
    ),
    Arm(
        name="adam_clean", label="Adam, no spikes", role="baseline", tasks=("entries",), grid=HIGH,
        options={**ADAM, "spikes": False},
    ),
    Arm(
        name="spam_clean", label="SPAM, no spikes", role="method", tasks=("entries",), grid=LOW,
        options={**SPAM, "spikes": False},
    ),
    Arm(name="adam_c4", label="Adam", role="baseline", tasks=PAPER_TASKS, options={"optimizer": "adam"}),
    Arm(
        name="spam_c4", label="SPAM", role="method", tasks=PAPER_TASKS, options={"optimizer": "spam", "density": 1.0},
        says="resets every 500 steps, then 150 of warmup; threshold 5000",
    ),
)  # fmt: skip

MODEL = "Tiny Shakespeare, characters; GPT of width 32, depth 2, 4 heads, context 32; batch 16, 800 steps, cosine"
PLOTS = (Plot(x="step", y="train_loss", title="Training loss, nats per character (mean since the last point)"),)
TASKS = (
    Task(
        name="entries",
        label="Spikes in entries",
        says=f"{MODEL}; in one step of fifty, 1% of the entries of a random tensor's gradient are 1000 times as large",
        options={"part": 0.01},
        tune="train_loss",
        plots=PLOTS,
    ),
    Task(
        name="tensors",
        label="Spikes in whole tensors",
        says=f"{MODEL}; in one step of fifty, a random tensor's whole gradient is 1000 times as large",
        options={"part": 1.0},
        tune="train_loss",
        plots=PLOTS,
    ),
    *(
        Task(
            name=name,
            label=f"LLaMA-{size.upper()} on C4",
            says=f"C4, documents of 256 tokens, 512 in a batch, {steps:,} steps; bfloat16, rate {rate:g}",
            options={"size": size, "lr": rate, "steps": steps},
            plots=(Plot(x="step", y="train_loss", title="Training loss, nats per token"),),
        )
        for name, size, rate, steps in (
            ("llama_60m", "60m", 1e-3, 10_000),
            ("llama_130m", "130m", 8e-4, 20_000),
            ("llama_350m", "350m", 4e-4, 60_000),
            ("llama_1b", "1b", 2e-3, 100_000),
        )
    ),
)


def _spike_criteria(task: str, where: str, gating: bool) -> Iterator[Criterion]:
    """What is asked, or only reported, of SPAM under one kind of spikes."""
    for against, words in (("adam", "Adam's"), ("adam_norm", "that of Adam with its gradient's norm clipped")):
        yield Criterion(
            name=f"{task}_{against}",
            says=f"With spikes in {where}, SPAM's test loss is more than 0.02 nats below {words}",
            task=task, metric="test_loss", arm="spam", against=against, compare="difference", op="<", bound=-0.02,
            control="spam_no_clip", gating=gating,
        )  # fmt: skip
    for part, words in (("spam_no_reset", "without resets"), ("spam_no_clip", "without clipping")):
        yield Criterion(
            name=f"{task}_{part}",
            says=f"With spikes in {where}, SPAM's test loss is at most 0.01 nats above that {words}",
            task=task, metric="test_loss", arm="spam", against=part, compare="difference", bound=0.01, gating=gating,
        )  # fmt: skip


CRITERIA = (
    *_spike_criteria("entries", "1% of a tensor's entries", gating=True),
    Criterion(
        name="no_spikes",
        says="Without spikes, SPAM's test loss is at most 0.02 nats above Adam's",
        task="entries", metric="test_loss", arm="spam_clean", against="adam_clean", compare="difference", bound=0.02,
    ),
    Criterion(
        name="sparse_loss",
        says="With spikes and a quarter of the moments, SPAM's test loss is at most 0.05 nats above Adam's",
        task="entries", metric="test_loss", arm="spam_sparse", against="adam", compare="difference", bound=0.05,
    ),
    Criterion(
        name="sparse_memory",
        says="A quarter of the moments takes at most 0.3 of the memory of Adam's, where they are kept, in bytes",
        task="entries", metric="state_bytes", arm="spam_sparse", against="adam", bound=0.3, rule="every",
        control="spam",
    ),
    Criterion(
        name="entries_adam_value",
        says="With spikes in 1% of a tensor's entries, SPAM's test loss is below that of Adam with its values clipped",
        task="entries", metric="test_loss", arm="spam", against="adam_value", compare="difference", op="<", bound=0.0,
        gating=False,
    ),
    Criterion(
        name="entries_harm",
        says="Spikes in 1% of a tensor's entries raise Adam's own test loss by more than 0.02 nats",
        task="entries", metric="test_loss", arm="adam", against="adam_clean", compare="difference", op=">", bound=0.02,
        gating=False,
    ),
    *_spike_criteria("tensors", "whole tensors", gating=False),
    *(
        Criterion(
            name=task,
            says=f"{task.removeprefix('llama_').upper()}: SPAM's perplexity is below Adam's",
            task=task, metric="perplexity", arm="spam_c4", against="adam_c4", op="<", bound=1.0,
        )
        for task in PAPER_TASKS
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="spam",
    room="optim",
    name="SPAM",
    summary="Adam that clips spikes entry by entry and forgets its moments now and then: spikes do not derail it",
    says=(
        "Single spikes of the gradient, up to 1000 times its usual size, stay in Adam's moments for long and harm the training of "
        "language models. SPAM shrinks entries that exceed sqrt(5000 v), and sets both moments to zero every 500 steps. LLaMA on "
        "C4, perplexity: Adam 34.06, 25.08, 18.80, 15.56 at 60M, 130M, 350M, 1B weights; SPAM 30.46, 23.36, 17.42, 14.66. With "
        "moments for a part of each matrix only, it is better than GaLore and Adam-mini in equal memory."
    ),
    paper=Paper(
        title="SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
        year=2025,
        arxiv="2501.06842",
        venue="ICLR 2025",
        code="https://github.com/TianjinYellow/SPAM-Optimizer",
    ),
    part="polyak.optim.spam:SPAM",
    budget="optimizer steps",
    tasks=TASKS,
    arms=ARMS,
    scales=(
        Scale(
            name="small",
            says="a small language model with spikes injected into its gradients: about four minutes on two cores",
            seeds=5,
            tasks=SMALL,
            options={
                "dim": 32, "context": 32, "batch": 16, "steps": 800, "warmup": 1 / 16, "probability": 0.02, "size": 1000.0,
                "reset_interval": 100, "warmup_steps": 20, "grace": 20, "threshold": 5000.0,
            },
        ),
        Scale(
            name="paper",
            says="LLaMA of four sizes on C4, days on one accelerator; needs transformers, datasets, and C4 from the hub",
            seeds=3,
            tasks=PAPER_TASKS,
            options={
                "batch": 512, "micro_batch": 64, "warmup": 1000, "reset_interval": 500, "warmup_steps": 150, "grace": 20,
                "threshold": 5000.0,
            },
        ),
    ),
    metrics=(
        Metric(name="train_loss", label="Training loss", unit="nats"),
        Metric(name="test_loss", label="Test loss", unit="nats"),
        Metric(name="clipped", label="Entries clipped in the run"),
        Metric(name="state_bytes", label="State for an entry of the linear layers", unit="bytes", exact=True),
        Metric(name="perplexity", label="Perplexity"),
    ),
    criteria=CRITERIA,
    trial=trial,
    departures=(
        "Small scale: spikes are injected, the same steps, tensors and entries for every arm of a seed, since a model of this size "
        "has none of its own. Width and context are 32, which keeps all trials within eight minutes of processor time.",
        "Spikes in 1% of one tensor's entries hardly harm Adam here (its step is bounded, and few entries are ever hit); the "
        "criterion entries_harm says whether they do. Spikes in whole tensors do harm; they were added after a pilot on a seed "
        "that is not reported, and decide nothing.",
        "Resets every 100 steps, 20 of warmup and of grace, for 800 steps in place of 10,000 and more. Rates are tuned by final "
        "training loss over three for each arm, around its best in a pilot; there, twice the highest rate of each was worse.",
        "The control of the comparisons under spikes is SPAM without clipping: resets alone also gain or lose without any spike.",
        "The text is Tiny Shakespeare if POLYAK_DATA has it, else the standard library's source, which differs between versions "
        "of Python.",
        "Later masks of sparse momentum have as many entries as the first; the official code draws them entry by entry. There "
        "weight decay has no effect on sparse tensors, here it acts on the entries that are updated; no decay in this claim.",
        "Official code clips the gradient of an entry whose second moment is zero to zero, for ever; the part does not.",
        "Paper scale: GaLore's configurations and data; three seeds, Adam and SPAM only. The figures above are as quoted "
        "elsewhere, and not compared with the paper's table again.",
    ),
    usage=(
        "from polyak.optim import SPAM\n\n"
        "optimizer = SPAM(model.parameters(), lr=1e-3)  # spam_param_groups(model, 0.25) for a quarter of the moments"
    ),
)  # fmt: skip
