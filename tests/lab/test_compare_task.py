"""Task files: what is accepted, and one clear message for each thing that can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyak.lab.compare import task as tasks
from polyak.lab.compare.contents import digest
from polyak.lab.compare.examine import examine
from polyak.lab.compare.main import task_files
from polyak.lab.compare.task import Facts, TaskError, endless, metrics

from .tasks_for_tests import DRAWING, REGRESSION, SAMPLING, write

EXAMPLES = Path(tasks.__file__).parents[1] / "templates"


def facts(path: Path) -> Facts:
    found = examine(str(path), "cpu")
    assert isinstance(found, Facts), found
    return found


def test_a_training_task(tmp_path: Path) -> None:
    found = facts(write(tmp_path, REGRESSION))
    assert (found.kind, found.says, found.main) == ("training", "A line through noisy points.", "distance")
    assert (found.better, found.parameters, found.schedule) == ({"distance": "lower"}, 3, "cosine")
    assert not found.validates
    assert found.warnings == ()
    assert found.initial["distance"] > 0
    assert found.seconds > 0


def test_a_sampling_task(tmp_path: Path) -> None:
    found = facts(write(tmp_path, SAMPLING))
    assert (found.kind, found.better) == ("sampling", {"off": "lower"})


@pytest.mark.parametrize("name", ["optim", "sampler"])
def test_the_examples_are_sound(name: str) -> None:
    found = facts(EXAMPLES / f"{name}_task.py")
    assert found.warnings == ()
    assert found.says


def test_a_dataclass_serves_as_well_as_a_dictionary(tmp_path: Path) -> None:
    changes = {"return {": "from polyak.lab import TrainingTask\n    return TrainingTask(**{", "    }\n": "    })\n"}
    assert facts(write(tmp_path, REGRESSION, replaced=changes)).main == "distance"


BROKEN = {
    "syntax": ({"return {": "return {{"}, "importing it raised SyntaxError"),
    "import": ({"import torch\n": "import torch\nimport nothing_like_this\n"}, "ModuleNotFoundError: No module named"),
    "line": ({"TRUTH = ": "1 / 0\nTRUTH = "}, "ZeroDivisionError: division by zero (line.py, line 5)"),
    "no function": (
        {"def task(": "def tasks("},
        "has no function task(seed, device); did you mean to call 'tasks' so?",
    ),
    "no function alike": (
        {"def task(": "def other("},
        "function task(seed, device). `polyak init-task` writes an example",
    ),
    "no callable": (
        {"def task(seed": "task = 3\n\n\ndef other(seed"},
        "task must be a function task(seed, device), got 3",
    ),
    "raises": ({"    g = ": "    raise OSError('no disk')\n    g = "}, "task(seed, device) raised OSError: no disk"),
    "exits": ({"    g = ": "    raise SystemExit(3)\n    g = "}, "task(seed, device) raised SystemExit"),
    "nothing": ({"return {": "{"}, "must return a dictionary with model, batches, loss and evaluate"),
    "missing": ({'        "batches": batches(),\n': ""}, "batches is missing"),
    "unknown": ({'"loss":': '"los":'}, "unknown 'los'; did you mean 'loss'?"),
    "model": ({'"model": model,': '"model": "resnet",'}, "model must be a torch.nn.Module, got 'resnet'"),
    "class": ({'"model": model,': '"model": nn.Linear,'}, "model must be a torch.nn.Module, got the class Linear"),
    "batches": ({"batches(),": "7,"}, "batches must be an iterable of batches, got 7"),
    "loss": ({'"evaluate": ': '"loss": 3, "evaluate": '}, "loss must be a function loss(model, batch), got 3"),
    "loss type": ({".square().mean()": ".square()"}, "must return a tensor of one element, got one of shape (8, 1)"),
    "loss number": (
        {".square().mean()": ".square().mean().item()"},
        "must return a tensor of one element, got a float",
    ),
    "detached": ({".square().mean()": ".square().mean().detach()"}, "the loss has no gradient"),
    "loss raises": ({"model(batch[0])": "model(batch[2])"}, "loss(model, batch) raised IndexError"),
    "nan": (
        {".square().mean()": ".square().mean() * float('nan')"},
        "the loss of the first batch is nan, before any step",
    ),
    "nan metric": (
        {"TRUTH).norm()": "TRUTH).norm() / 0 * 0"},
        "evaluate gives nan for 'distance' on the untrained model",
    ),
    "metric type": (
        {"(model.weight - TRUTH).norm()": "'low'"},
        "must return a number or a dictionary of numbers, got 'low'",
    ),
    "metric shape": (
        {"TRUTH).norm()": "TRUTH)"},
        "or a dictionary of numbers, got a Tensor of shape (1, 2) for 'distance'",
    ),
    "own name": ({'"distance"': '"seconds"'}, "must not call a number 'seconds'"),
    "accuracy": ({'"distance"': '"accuracy"'}, "is more of 'accuracy' better? Return better={'accuracy': 'higher'}"),
    "name": (
        {'"distance"': '"answer_rate"'},
        "is more of 'answer_rate' better? Return better={'answer_rate': 'lower'} (or",
    ),
    "number": (
        {'{"distance": (model.weight - TRUTH).norm()}': "(model.weight - TRUTH).norm()"},
        "is more of what evaluate returns better, or less? Return better='higher' or better='lower'",
    ),
    "no return": ({'{"distance": (model.weight - TRUTH).norm()}': "None"}, "got None (is there no return?)"),
    "better": ({'"evaluate"': '"better": "smaller", "evaluate"'}, "better must be 'lower' or 'higher', got 'smaller'"),
    "better name": ({'"evaluate"': '"better": {"dist": "lower"}, "evaluate"'}, "names 'dist', which is not measured"),
    "schedule": ({'"evaluate"': '"schedule": "cosin", "evaluate"'}, "schedule must be one of cosine, linear, constant"),
    "schedule words": (
        {'"evaluate"': '"schedule": lambda used: None, "evaluate"'},
        "schedule(used) raised TypeError: float() arg",
    ),
    "schedule numbers": (
        {'"evaluate"': '"schedule": lambda used: float("inf") ** used, "evaluate"'},
        "schedule(used) must give finite factors of the learning rate, got inf at 0.5",
    ),
    "ends": ({"while True:": "for _ in range(2):"}, "batches came to an end. Give a DataLoader"),
    "frozen": ({"    def batches": "    model.requires_grad_(False)\n\n    def batches"}, "nothing to train"),
    "trains in evaluate": (
        {
            '"evaluate": lambda model: {"distance"': '"evaluate": lambda model: steps(model) or {"distance"',
            "    return {": """    def steps(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.enable_grad():
            (model(x) - y).square().mean().backward()
        optimizer.step()

    return {""",
        },
        "evaluate(model) changes the model's parameters (weight, bias): an evaluation must leave them as they are",
    ),
    "changes a weight in validate": (
        {'"evaluate": ': '"validate": lambda model: {"distance": model.bias.add_(1).norm()}, "evaluate": '},
        "validate(model) changes the model's parameters (bias): ",
    ),
    "shared model": (
        {
            "    model = nn.Linear(2, 1)\n": "    model = MODEL\n",
            "\n\ndef task": "\nMODEL = nn.Linear(2, 1)\n\n\ndef task",
        },
        "task returns the same model twice",
    ),
    "shared weights": (
        {
            "    model = nn.Linear(2, 1)\n": "    model = nn.Linear(2, 1)\n    nn.init.normal_(model.weight, generator=G)\n",
            "\n\ndef task": "\nG = torch.Generator()\n\n\ndef task",
        },
        "two calls with one seed give different initial weights",
    ),
    "shared batches": (
        {"(8,), generator=g)": "(8,), generator=G)", "\n\ndef task": "\nG = torch.Generator()\n\n\ndef task"},
        "two calls with one seed give different batches",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, case: str) -> None:
    changes, says = BROKEN[case]
    found = examine(str(write(tmp_path, REGRESSION, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert found.startswith("line.py")
    assert says in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({'"metric": ': '"metrik": '}, "unknown 'metrik'; did you mean 'metric'?"),
        ({"(64, 2)": "64"}, "shape must be (count, ...), got 64"),
        ({"ExactDenoiser(law, VP())": "lambda x, t: x"}, "the denoiser does not have a process"),
        ({"ExactDenoiser(law, VP())": "None"}, "either a denoiser or a pipeline"),
        ({"torch.float64": '"float64"'}, "dtype must be a floating torch dtype, e.g. torch.float64, got 'float64'"),
        ({"torch.float64": "torch.int64"}, "dtype must be a floating torch dtype, e.g. torch.float64, got a dtype"),
        (
            {'"dtype": torch.float64': '"process": VP'},
            "process must be a process of polyak.generate, e.g. VP(), got the class VP",
        ),
        (
            {'"dtype"': '"call": {"prompt": "a cat"}, "dtype"'},
            "call has no effect beside a denoiser, got a dict: leave it out",
        ),
        (
            {"x.norm(dim=1) - 2).abs().mean()": "x).mean(0)"},
            "dictionary of numbers, got a Tensor of shape (2,) for 'off'",
        ),
        (
            {'{"off": (x.norm(dim=1) - 2).abs().mean()}': "x.numpy()"},
            "dictionary of numbers, got a ndarray of shape (64, 2)",
        ),
        ({'"metric": lambda x: {"off": (x': '"process": VP(), "metric": lambda x: {"off": (y'}, "NameError: name 'y'"),
        (
            {"ExactDenoiser(law, VP())": "lambda x, t: x", '"metric"': '"process": VP(), "metric"'},
            "must return a polyak.generate.Prediction, got a Tensor",
        ),
    ],
)
def test_what_is_wrong_with_a_sampling_task(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    found = examine(str(write(tmp_path, SAMPLING, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert says in found


# What is drawn outside of a task's function, or from no seed at all.
SHARED = "\nG = torch.Generator().manual_seed(0)\n\n\ndef task"
OF_NO_SEED = "\nimport os\n\n\ndef task"
HELD_OUT = {
    "a generator outside": {
        "\n\ndef task": SHARED,
        "    return {": "    held = torch.rand((), generator=G)\n    return {",
    },
    "the system": {
        "\n\ndef task": OF_NO_SEED,
        "    return {": "    held = int.from_bytes(os.urandom(6)) / 2**48\n    return {",
    },
}
DRAWN_WHEN_JUDGED = {"\n\ndef task": SHARED, ".mean()": ".mean() + torch.rand((), generator=G)"}


@pytest.mark.parametrize("text", [SAMPLING, DRAWING], ids=["denoiser", "pipeline"])
@pytest.mark.parametrize("leak", [*HELD_OUT, "when judged"])
def test_samples_are_judged_by_the_same_data_with_the_same_seed(tmp_path: Path, leak: str, text: str) -> None:
    changes = DRAWN_WHEN_JUDGED if leak == "when judged" else {**HELD_OUT[leak], ".mean()": ".mean() + held"}
    found = examine(str(write(tmp_path, text, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert "two calls with one seed give different numbers: of the same samples metric(samples) is " in found
    unseen = leak == "the system"
    why = (
        "Something is left from one call to the next, or comes from no seed"
        if unseen
        else "G outside of the function changes"
    )
    assert f"(off). {why}" in found


@pytest.mark.parametrize("leak", HELD_OUT)
@pytest.mark.parametrize("what", ["evaluate", "validate"])
def test_models_are_judged_by_the_same_data_with_the_same_seed(tmp_path: Path, what: str, leak: str) -> None:
    number = '{"distance": (model.weight - TRUTH).norm()}'
    judged = number.replace("norm()", "norm() + held")
    given = {"evaluate": judged} if what == "evaluate" else {"evaluate": number, "validate": judged}
    functions = ", ".join(f'"{name}": lambda model: {value}' for name, value in given.items())
    changes = {**HELD_OUT[leak], f'"evaluate": lambda model: {number}': functions}
    found = examine(str(write(tmp_path, REGRESSION, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert f"two calls with one seed give different numbers: of the same untrained model {what}(model) is " in found


def test_a_pipelines_samples_are_the_same_with_the_same_seed(tmp_path: Path) -> None:
    changes = {"\n\nclass Pipe": "\nG = torch.Generator()\n\n\nclass Pipe", "x * ": "x * torch.rand(1, generator=G) * "}
    found = examine(str(write(tmp_path, DRAWING, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert "two calls with one seed give samples that differ: something is left from one call to the next" in found


@pytest.mark.parametrize("text", [SAMPLING, DRAWING], ids=["denoiser", "pipeline"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {".mean()": ".mean() + torch.rand(())"},
        {".mean()": ".mean() + torch.rand((), generator=g)", "    return {": "    g = torch.Generator()\n    return {"},
        {".mean()": ".mul_(0).mean()"},
        {".mean()": ".mean() * float('nan')"},
    ],
    ids=["as it is", "a global generator", "one of its own", "changes the samples", "nan"],
)
def test_what_follows_from_the_seed_is_no_leak(tmp_path: Path, text: str, changes: dict[str, str]) -> None:
    assert facts(write(tmp_path, text, replaced=changes)).kind == "sampling"


@pytest.mark.parametrize(
    "returned",
    ["x", "(x, None)", "{'sample': x}", "SimpleNamespace(images=x)", "x.numpy()", "list(x)"],
)
def test_a_pipeline_returns_its_samples_in_many_forms(tmp_path: Path, returned: str) -> None:
    imports = {"import torch\n": "import torch\nfrom types import SimpleNamespace\n"}
    returns = {"return (x * 0.9**num_inference_steps,)": f"return {returned}"}
    judges = {"x.norm(dim=1)": "torch.stack([torch.as_tensor(one) for one in x]).norm(dim=1)"}
    found = facts(write(tmp_path, DRAWING, replaced={**imports, **returns, **judges}))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(20_000))
    assert found.initial == {"off": pytest.approx(float(noise.norm(dim=1).mean()))}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Pipe()": "Pipe"}, "pipeline must be a pipeline with a scheduler, which has a config, got the class Pipe"),
        ({"config = {}": "pass"}, "pipeline must be a pipeline with a scheduler, which has a config, got a Pipe"),
        ({'"metric"': '"call": "a cat", "metric"'}, "call must be a dictionary of arguments by name, e.g."),
        ({'"metric"': '"call": {3: 4}, "metric"'}, 'e.g. {"prompt": "a cat"}, got a dict'),
        (
            {'"metric"': '"call": {"generator": None}, "metric"'},
            "call must not hold 'generator', which is the seed's affair",
        ),
        (
            {'"metric"': '"call": {"num_inference_steps": 50}, "metric"'},
            "call must not hold 'num_inference_steps', which is the budget's affair",
        ),
        (
            {'"metric"': '"shape": (16, 2), "metric"'},
            "shape has no effect beside a pipeline, got a tuple: leave it out",
        ),
        ({'"metric"': '"dtype": torch.float64, "metric"'}, "dtype has no effect beside a pipeline, got a dtype: leave"),
    ],
)
def test_what_is_wrong_with_a_pipeline(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    found = examine(str(write(tmp_path, DRAWING, replaced=changes)), "cpu")
    assert isinstance(found, str)
    assert says in found


def test_what_else_a_pipeline_returns_is_no_sample(tmp_path: Path) -> None:
    for returned, got in (("None", "None"), ("3.0", "a float"), ("()", "a tuple")):
        tasks._module.cache_clear()
        changes = {"return (x * 0.9**num_inference_steps,)": f"return {returned}"}
        assert examine(str(write(tmp_path, DRAWING, replaced=changes)), "cpu") == (
            "line.py: the pipeline Pipe must return samples: an output that has `images`, a tuple whose first they are, or a "
            f"tensor, array or list, got {got}"
        )


def test_global_generators_are_seeded_so_that_their_use_is_no_leak(tmp_path: Path) -> None:
    changes = {"(8,), generator=g)": "(8,))", "g = torch.Generator().manual_seed(seed)": "g = None"}
    facts(write(tmp_path, REGRESSION, replaced=changes))


def test_a_target_among_the_inputs_is_found(tmp_path: Path) -> None:
    leak = {
        "model = nn.Linear(2, 1)": "x = torch.cat([x, y], 1); model = nn.Linear(3, 1)",
        "TRUTH).norm()": "2).norm()",
    }
    (warning,) = facts(write(tmp_path, REGRESSION, replaced=leak)).warnings
    assert warning == "line.py: the target is among the inputs (column number 2, correlation 1 over 24 rows)"


def test_a_class_among_the_inputs_is_found(tmp_path: Path) -> None:
    leak = {
        "model = nn.Linear(2, 1)": "y = torch.arange(32) % 3; x[:, 1] = (y == 1).float(); model = nn.Linear(2, 3)",
        "(model(batch[0]) - batch[1]).square().mean()": "nn.functional.cross_entropy(model(batch[0]), batch[1])",
        "TRUTH).norm()": "2).norm()",
    }
    (warning,) = facts(write(tmp_path, REGRESSION, replaced=leak)).warnings
    assert "column number 1" in warning


NORMALIZED = {
    "model = nn.Linear(2, 1)": "model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))",
    "(model.weight - TRUTH).norm()": "FIRST(x).norm()",
    '"evaluate": ': '"validate": lambda model: {"distance": SECOND(x).sum()}, "evaluate": ',
}
MOVED = (
    "line.py: {}(model) changes the model's buffers (1.running_mean, 1.running_var, 1.num_batches_tracked): running statistics "
    "take in what is evaluated on, and numbers depend on how often it is. Does it call model.train()? The model is in evaluation "
    "mode before"
)


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ("model.train()", "model", ["evaluate"]),
        ("model", "model.train()", ["validate"]),
        ("model.train()", "model.train()", ["evaluate", "validate"]),
        ("model", "model", []),
    ],
)
def test_running_statistics_that_move_in_an_evaluation_are_found(
    tmp_path: Path, first: str, second: str, warned: list[str]
) -> None:
    changes = {old: new.replace("FIRST", first).replace("SECOND", second) for old, new in NORMALIZED.items()}
    tasks._module.cache_clear()
    assert facts(write(tmp_path, REGRESSION, replaced=changes)).warnings == tuple(MOVED.format(w) for w in warned)


@pytest.mark.parametrize(
    ("evaluates", "says"),
    [
        ("model.train() and model.eval()(x).norm()", ""),
        ("(model(x).norm(), model.train())[0]", ""),
        ("model.get_buffer('cache').add_(1).norm() + model.weight.norm()", ""),
        ("[model.weight.clone(), model.weight.zero_()][0].add_(model.weight.copy_(KEPT)).norm()", ""),
        ("model.get_buffer('count').add_(1).norm()", "buffers (count)"),
        ("[b.add_(1) for name, b in model.named_buffers()][-1].norm()", "buffers (count, a, b and 2 more)"),
    ],
)
def test_only_what_an_evaluation_changes_for_training_is_told(tmp_path: Path, evaluates: str, says: str) -> None:
    """Neither a mode, which the lab sets, nor a cache that is not saved, nor weights that are put back."""
    buffers = "".join(
        f"    model.register_buffer('{name}', torch.zeros(1))\n" for name in ("count", "a", "b", "c", "d")
    )
    buffers += "    model.register_buffer('cache', torch.zeros(1), persistent=False)\n"
    changes = {
        "    model = nn.Linear(2, 1)\n": f"    model = nn.Linear(2, 1)\n    KEPT = model.weight.detach().clone()\n{buffers}",
        "(model.weight - TRUTH).norm()": evaluates,
    }
    tasks._module.cache_clear()
    warnings = facts(write(tmp_path, REGRESSION, replaced=changes)).warnings
    assert [f"evaluate(model) changes the model's {says}:" in w for w in warnings] == [True] * bool(says)


MERGES = """
class Merges(nn.Linear):
    def train(self, mode=True):
        self.weight.data *= 2.0 ** (self.training - mode)
        return super().train(mode)
"""


@pytest.mark.parametrize("evaluates", ["model.weight.norm()", "model.train().weight.norm()"])
def test_weights_that_the_mode_changes_are_not_the_evaluations_doing(tmp_path: Path, evaluates: str) -> None:
    """As of an adapter that is merged for inference."""
    changes = {
        "\n\ndef task": f"\n{MERGES}\n\ndef task",
        "nn.Linear(2, 1)": "Merges(2, 1)",
        "(model.weight - TRUTH).norm()": evaluates,
    }
    tasks._module.cache_clear()
    assert facts(write(tmp_path, REGRESSION, replaced=changes)).warnings == ()


def test_validation_that_is_the_evaluation_is_found(tmp_path: Path) -> None:
    same = {'"evaluate": ': '"validate": lambda model: {"distance": (model.weight - TRUTH).norm()}, "evaluate": '}
    found = facts(write(tmp_path, REGRESSION, replaced=same))
    assert found.validates
    assert "validate and evaluate agree to the last digit" in found.warnings[0]


def test_validation_measures_what_arms_are_compared_by(tmp_path: Path) -> None:
    """Else the learning rate with the largest loss would be chosen where accuracy is compared by."""

    def examined(validates: str) -> Facts | str:
        validating = {'"evaluate": ': f'"validate": lambda model: {validates}, "evaluate": '}
        tasks._module.cache_clear()
        return examine(str(write(tmp_path, REGRESSION, replaced=validating)), "cpu")

    assert examined('{"loss": 1.0}') == "line.py: validate must return 'distance', too, which arms are compared by"
    for fits in ("1.0", '{"loss": 1.0, "distance": 2.0}'):
        assert isinstance(examined(fits), Facts)


# ------------------------------------------------------------------------------------------------------------------ pieces


def test_batches_begin_anew() -> None:
    drawn = endless([1, 2], "task.py")
    assert [next(drawn) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(TaskError, match="came to an end"):
        list(endless(iter([]), "task.py"))


def test_numbers_come_in_many_forms() -> None:
    given = {"a": torch.tensor(1.5), "b": 2, "c": np.float32(0.5), "d": torch.tensor([[2.5]]), "e": np.array([3])}
    assert metrics(given, "evaluate", "task.py") == {"a": 1.5, "b": 2.0, "c": 0.5, "d": 2.5, "e": 3.0}
    assert metrics(0.25, "evaluate", "task.py") == {"evaluate": 0.25}
    with pytest.raises(TaskError, match="got an empty one"):
        metrics({}, "evaluate", "task.py")


def test_digests_tell_contents_apart() -> None:
    one = {"x": torch.arange(3.0), "y": [1, "a"]}
    assert digest(one) == digest({"x": torch.arange(3.0), "y": [1, "a"]})
    assert digest(one) != digest({"x": torch.arange(3.0) + 1e-7, "y": [1, "a"]})
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    words = [np.array(["a" * n, "b"], dtype=object) for n in (999, 999, 998)]
    assert digest(words[0]) == digest(words[1])
    assert digest(words[0]) != digest(words[2])
    dark, light = (Image.new("L", (2, 2), shade) for shade in (0, 9))
    assert digest([dark]) == digest([dark.copy()])
    assert digest([dark]) != digest([light])


def test_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no task files"):
        task_files(tmp_path)
    one, two = write(tmp_path, REGRESSION), write(tmp_path, REGRESSION, "other.py")
    write(tmp_path, REGRESSION, "_helper.py")
    assert task_files(tmp_path) == [one, two]
    assert task_files([two, one]) == [two, one]
    with pytest.raises(TaskError, match=r"no such file; did you mean 'other.py'\?"):
        task_files(tmp_path / "othr.py")
    with pytest.raises(TaskError, match="'line' is there twice"):
        task_files([one, one])
    with pytest.raises(TaskError, match="name a task file"):
        task_files([])
