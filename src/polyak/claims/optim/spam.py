"""SPAM's claim: gradient spikes do not derail it, which they do Adam; and a quarter of the moments is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyak.claims._pictures import spam as pictures
from polyak.lab.claim import (
    Arm,
    Claim,
    Criterion,
    Erratum,
    Measurement,
    Metric,
    Paper,
    Plot,
    Role,
    Scale,
    Task,
    Trial,
    Value,
)
from polyak.lab.criteria import Ask

SMALL = ("entries", "tensors")
PAPER_TASKS = ("llama_60m", "llama_130m", "llama_350m", "llama_1b")
LINEAR = ("qkv", "out", "mlp")  # the modules whose matrices may have sparse momentum


def trial(t: Trial) -> Iterator[Measurement]:
    """Train a language model with one arm's optimizer, at the small scales with spikes in its gradients."""
    if t.task == "equations":
        yield from _equations(t)
    else:
        yield from _llama(t) if t.task in PAPER_TASKS else _small(t)


def _equations(t: Trial) -> Iterator[Measurement]:
    from polyak.claims.optim._spam_exact import measured

    yield Measurement(measured(t.seed, optimizer=t["optimizer"], clips=t["clips"], resets=t["resets"]))


def _small(t: Trial) -> Iterator[Measurement]:
    import torch

    from polyak.claims import _problems

    problem = _problems.char_lm(
        t.seed, t.device, dim=t["dim"], depth=t["depth"], expansion=4, context=t["context"], batch=t["batch"]
    )
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

    lr = t["lr"] * t.options.get("rate", 1.0)
    if t["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return SPAM(
        spam_param_groups(model, t["density"], LINEAR) if t["density"] < 1 else model.parameters(),
        lr=lr,
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
SPIKES: dict[str, Value] = {
    "batch": 16, "warmup": 1 / 16, "probability": 0.02, "size": 1000.0, "reset_interval": 100, "warmup_steps": 20, "grace": 20,
    "threshold": 5000.0,
}  # fmt: skip
ADAM = {"optimizer": "adam", "spikes": True, "clip_norm": 0.0, "clip_value": 0.0}
SPAM = {**ADAM, "optimizer": "spam", "density": 1.0}
# Every grid has its arm's best rate of a pilot, on a seed that is not reported, in its middle.
RATES = {"lr": (6e-3, 1.2e-2, 2.4e-2)}
CLIPPED = {"lr": (1.2e-2, 2.4e-2, 4.8e-2)}
SPARSE = {"lr": (2.4e-2, 4.8e-2, 9.6e-2)}

ONE = ("entries",)


def _exact(
    name: str, label: str, role: Role, optimizer: str = "spam", *, clips: bool = True, resets: bool = True
) -> Arm:
    options: dict[str, Value] = {"optimizer": optimizer, "clips": clips, "resets": resets}
    return Arm(f"{name}_exact", label, role, options, tasks=("equations",))


ARMS = (
    Arm("adam", "Adam", "baseline", ADAM, RATES, tasks=SMALL),
    Arm(
        "adam_norm", "Adam, norm clipped", "baseline", {**ADAM, "clip_norm": 1.0}, CLIPPED, tasks=SMALL,
        says="the gradient's norm is at most 1",
    ),
    Arm(
        "adam_value", "Adam, values clipped", "baseline", {**ADAM, "clip_value": 0.01}, CLIPPED, tasks=ONE,
        says="every entry of the gradient is at most 0.01 in size",
    ),
    Arm(
        "spam", "SPAM", "method", SPAM, RATES, tasks=SMALL,
        says="resets every 100 steps, then 20 of warmup and of grace; threshold 5000",
    ),
    Arm(
        "spam_no_reset", "SPAM without resets", "ablation", {**SPAM, "reset_interval": NEVER}, RATES, tasks=SMALL,
        says="clipping alone",
    ),
    Arm(
        "spam_no_clip", "SPAM without clipping", "ablation", {**SPAM, "threshold": 0.0}, RATES, tasks=SMALL,
        says="resets alone; the control: it does not look at spikes",
    ),
    Arm(
        "spam_sparse", "SPAM, a quarter of the moments", "method", {**SPAM, "density": 0.25}, SPARSE, tasks=ONE,
        says="density 0.25 in the linear layers of attention and feed-forward",
    ),
    Arm("adam_clean", "Adam, no spikes", "baseline", {**ADAM, "spikes": False}, RATES, tasks=ONE),
    Arm("spam_clean", "SPAM, no spikes", "method", {**SPAM, "spikes": False}, RATES, tasks=ONE),
    _exact("spam", "SPAM, exact", "method"),
    _exact("spam_no_clip", "SPAM, exact, without clipping", "control", clips=False),
    _exact("spam_no_reset", "SPAM, exact, without resets", "control", resets=False),
    _exact("spam_neither", "SPAM, exact, with neither", "ablation", clips=False, resets=False),
    _exact("adam_norm", "Adam, exact, norm clipped", "control", "adam", resets=False),
    Arm("adam_c4", "Adam", "baseline", {"optimizer": "adam"}, tasks=PAPER_TASKS),
    Arm(
        "spam_c4", "SPAM", "method", {"optimizer": "spam", "density": 1.0}, tasks=PAPER_TASKS,
        says="resets every 500 steps, then 150 of warmup; threshold 5000",
    ),
)  # fmt: skip

MODEL = "Tiny Shakespeare, characters; GPT of width 32, depth 2, 4 heads, context 32; batch 16, 300 steps, cosine"
PLOTS = (Plot("step", "train_loss", "Training loss, nats per character (mean since the last point)"),)
TASKS = (
    Task(
        "equations", "Its equations",
        "random gradients in 16 dimensions, one entry 1,000,000 times as large in step 20; float64, 60 steps, resets every 25",
    ),
    Task(
        "entries", "Spikes in entries",
        f"{MODEL}; in one step of fifty, 1% of the entries of a random tensor's gradient are 1000 times as large",
        {"part": 0.01}, tune="train_loss", plots=PLOTS,
    ),
    Task(
        "tensors", "Spikes in whole tensors",
        f"{MODEL}; in one step of fifty, a random tensor's whole gradient is 1000 times as large",
        {"part": 1.0}, tune="train_loss", plots=PLOTS,
    ),
    *(
        Task(
            name, f"LLaMA-{size.upper()} on C4",
            f"C4, documents of 256 tokens, 512 in a batch, {steps:,} steps; bfloat16, rate {rate:g}",
            {"size": size, "lr": rate, "steps": steps},
            plots=(Plot("step", "train_loss", "Training loss, nats per token"),),
        )
        for name, size, rate, steps in (
            ("llama_60m", "60m", 1e-3, 10_000),
            ("llama_130m", "130m", 8e-4, 20_000),
            ("llama_350m", "350m", 4e-4, 60_000),
            ("llama_1b", "1b", 2e-3, 100_000),
        )
    ),
)  # fmt: skip

METRICS = (
    Metric("equations", "Largest distance to the equations", exact=True),
    Metric("spread", "Largest difference that a spike makes to other entries", exact=True),
    Metric("growth", "Growth of a second moment in a step, over b2 + (1 - b2) threshold", exact=True),
    Metric("forgotten", "Largest difference of moments to one gradient's, at resets", exact=True),
    Metric("from_adam", "Largest distance to Adam", exact=True),
    Metric("train_loss", "Training loss", unit="nats"),
    Metric("test_loss", "Test loss", unit="nats"),
    Metric("clipped", "Entries clipped in the run"),
    Metric("state_bytes", "State for an entry of the linear layers", unit="bytes", exact=True),
    Metric("perplexity", "Perplexity"),
)
LOSS = Ask(METRICS, kind="effect", task="entries", metric="test_loss", arm="spam")
MEMORY = Ask(METRICS, kind="mechanism", task="entries", metric="state_bytes", rule="every")


def _spike_criteria(task: str, where: str, gating: bool) -> tuple[Criterion, ...]:
    """What is asked, or only reported, of SPAM under one kind of spikes."""
    ask, spikes = LOSS.but(task=task, gating=gating), f"With spikes in {where}, SPAM's test loss is"
    norm = "that of Adam with its gradient's norm clipped"
    return (
        *ask.but(control="spam_no_clip").table(
            "below", "name minus says",
            (f"{task}_adam", "adam", f"{spikes} more than 0.02 nats below Adam's"),
            (f"{task}_adam_norm", "adam_norm", f"{spikes} more than 0.02 nats below {norm}"),
            bound=-0.02,
        ),
        *ask.table(
            "at_most", "name minus says",
            (f"{task}_spam_no_reset", "spam_no_reset", f"{spikes} at most 0.01 nats above that without resets"),
            (f"{task}_spam_no_clip", "spam_no_clip", f"{spikes} at most 0.01 nats above that without clipping"),
            bound=0.01,
        ),
    )  # fmt: skip


PROVED = Ask(METRICS, kind="mechanism", task="equations", arm="spam_exact", rule="every")
CRITERIA = (
    *PROVED.table(
        "at_most", "name bound metric arm control says",
        ("equations", 1e-12, "equations", "spam_exact", "spam_no_clip_exact",
         "With clipping, resets, warmup and grace its points are those of Algorithm 1"),
        ("spike_stays", 0.0, "spread", "spam_exact", "adam_norm_exact",
         "A spike in one entry changes no other entry, not by a bit"),
        ("spike_bounded", 1 + 1e-12, "growth", "spam_exact", "spam_no_clip_exact",
         "However large a spike is, no second moment grows by more than b2 + (1 - b2) threshold, which is 6, in a step"),
        ("forgets", 1e-12, "forgotten", "spam_exact", "spam_no_reset_exact",
         "At a reset the moments are those of the present gradient alone"),
        ("without_both", 1e-12, "from_adam", "spam_neither_exact", "spam_exact",
         "Without clipping and resets it is Adam, step for step"),
    ),
    *_spike_criteria("entries", "1% of a tensor's entries", gating=True),
    LOSS.at_most(
        "no_spikes", 0.02, "Without spikes, SPAM's test loss is at most 0.02 nats above Adam's",
        arm="spam_clean", minus="adam_clean",
    ),
    LOSS.at_most(
        "sparse_loss", 0.05, "With spikes and a quarter of the moments, SPAM's test loss is at most 0.05 nats above Adam's",
        arm="spam_sparse", minus="adam",
    ),
    MEMORY.at_most(
        "sparse_memory", 0.3, "A quarter of the moments takes at most 0.3 of the memory of Adam's, where they are kept, in bytes",
        arm="spam_sparse", over="adam", control="spam",
    ),
    LOSS.beats(
        "entries_adam_value",
        "With spikes in 1% of a tensor's entries, SPAM's test loss is below that of Adam with its values clipped",
        minus="adam_value", gating=False,
    ),
    LOSS.above(
        "entries_harm", 0.02, "Spikes in 1% of a tensor's entries raise Adam's own test loss by more than 0.02 nats",
        arm="adam", minus="adam_clean", gating=False,
    ),
    *_spike_criteria("tensors", "whole tensors", gating=False),
    *(
        Ask(METRICS, kind="effect", metric="perplexity", arm="spam_c4", over="adam_c4").beats(
            task, f"{task.removeprefix('llama_').upper()}: SPAM's perplexity is below Adam's", task=task
        )
        for task in PAPER_TASKS
    ),
)  # fmt: skip

CLAIM = Claim(
    slug="spam", room="optim", name="SPAM",
    summary="Adam that clips spikes entry by entry and forgets its moments now and then: spikes do not derail it",
    says=(
        "Single spikes of the gradient, up to 1000 times its usual size, stay in Adam's moments for long and harm the training of "
        "language models. SPAM shrinks entries that exceed sqrt(5000 v), and sets both moments to zero every 500 steps. LLaMA on "
        "C4, perplexity: Adam 34.06, 25.08, 18.80, 15.56 at 60M, 130M, 350M, 1B weights; SPAM 30.46, 23.36, 17.42, 14.66. With "
        "moments for a part of each matrix only, it is better than GaLore and Adam-mini in equal memory."
    ),
    paper=Paper(
        "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025, "2501.06842", "ICLR 2025",
        "https://github.com/TianjinYellow/SPAM-Optimizer",
    ),
    part="polyak.optim.spam:SPAM", budget="optimizer steps",
    scales=(
        Scale(
            "small", "its equations, and a small language model with spikes injected into its gradients: minutes on two cores", 5,
            first_seed=200, tasks=("equations", "entries"), options={**SPIKES, "dim": 32, "depth": 2, "context": 32, "steps": 300},
        ),
        Scale(
            "gpu",
            "a language model of width 128, depth 4, spikes in its gradients; 2000 steps: minutes on one accelerator", 10,
            first_seed=200, tasks=SMALL,
            options={**SPIKES, "dim": 128, "depth": 4, "context": 128, "batch": 32, "steps": 2000, "rate": 0.25},
        ),
        Scale(
            "paper", "LLaMA of four sizes on C4, days on one accelerator; needs transformers, datasets, and C4 from the hub", 3,
            tasks=PAPER_TASKS,
            options={
                "batch": 512, "micro_batch": 64, "warmup": 1000, "reset_interval": 500, "warmup_steps": 150, "grace": 20,
                "threshold": 5000.0,
            },
        ),
    ),
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    departures=(
        "Small scale: spikes are injected, the same steps, tensors and entries for every arm of a seed, since a model of this "
        "size has none of its own. Width and context are 32, and there are 300 steps. Scale gpu: widths, contexts and batches "
        "are larger, with 2000 steps, and rates are a quarter, as the width is four times as large.",
        "Spikes in 1% of one tensor's entries hardly harm Adam here (its step is bounded, and few entries are ever hit); the "
        "criterion entries_harm says whether they do. Spikes in whole tensors do harm; they were added after a pilot on a seed "
        "that is not reported, and decide nothing. They are run at the scale gpu.",
        "Resets every 100 steps, 20 of warmup and of grace, for 300 or 2000 steps in place of 10,000 and more. Rates are tuned "
        "by final training loss over three for each arm, around its best in a pilot; there, twice the highest rate of each was "
        "worse.",
        "Beside its equations eps is 0, since Adam and SPAM add it in different places.",
        "The control of the comparisons under spikes is SPAM without clipping: resets alone also gain or lose without any spike.",
        "The text is Tiny Shakespeare if POLYAK_DATA has it, else the standard library's source, which differs between versions "
        "of Python.",
        "Later masks of sparse momentum have as many entries as the first; the official code draws them entry by entry. Nothing "
        "decays in this claim.",
        "Paper scale: GaLore's configurations and data; three seeds, Adam and SPAM only. The figures above are as quoted "
        "elsewhere, and not compared with the paper's table again.",
    ),
    errata=(
        Erratum(
            what="The gradient of an entry whose second moment is zero is clipped to zero.",
            where="TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py",
            effect="An entry that had no gradient until the clipping began is frozen until the next reset, again and again.",
            test="tests/optim/test_spam.py::test_entries_without_a_second_moment_are_not_frozen",
        ),
        Erratum(
            what="Weight decay of tensors with sparse momentum acts on a copy.",
            where="TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py",
            effect="They do not decay; here the entries that are updated do, or with decay_masked='all' all of them.",
            test="tests/optim/test_spam.py::test_decay_of_masked_tensors",
        ),
        Erratum(
            what="The training script hands over the learning rate's 1000 steps of warmup as those that follow each reset.",
            where="TianjinYellow/SPAM-Optimizer, the pretraining script (the optimizer's own default is 150)",
            effect="With a reset every 500 steps no step after the first is more than half as long as it should be.",
            test="tests/optim/test_errata.py::test_spams_script_never_ends_its_warmup",
        ),
    ),
    usage=(
        "from polyak.optim import SPAM\n\n"
        "optimizer = SPAM(model.parameters(), lr=1e-3)  # spam_param_groups(model, 0.25) for a quarter of the moments"
    ),
)  # fmt: skip
