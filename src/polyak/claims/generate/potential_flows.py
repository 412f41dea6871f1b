"""Potential flows' claim: edits along gradients of potentials that obey the wave equation are easier to tell apart than lines."""

from __future__ import annotations

from collections.abc import Iterator

from polyak.claims._pictures import potential_flows as pictures
from polyak.lab.claim import Arm, Claim, Erratum, Measurement, Metric, Paper, Scale, Task, Trial
from polyak.lab.criteria import Ask

TRAINED = ("directions", "flow", "no_pde")
TRAINING = ("iterations", "batch", "lr", "lr_judge", "lambda_pde")


def trial(t: Trial) -> Iterator[Measurement]:
    """One arm on functions that are known; or trained on a generator, and judged."""
    yield Measurement(_exact(t)) if t.task == "exact" else _trained(t)


def _trained(t: Trial) -> Measurement:
    from polyak.claims.generate import _traversals as w

    generator_fn = w.digits(t.seed, t["epochs"]) if t.task == "digits" else w.Ellipses(t.seed)
    flow = w.edits(t.arm, generator_fn, t.seed, t["k"], t["steps"], t["length"])
    if t.arm in TRAINED:
        w.train(flow, generator_fn, t.seed, pde=t.arm == "flow", **{name: t[name] for name in TRAINING})
    values = w.predictability(flow, generator_fn, t.seed, t["pairs"], t["judged"])
    if t.arm in ("flow", "no_pde"):
        values |= w.obedience(flow, t.seed, t["points"], fitted=t.arm == "no_pde")
    return Measurement(values)


def _exact(t: Trial) -> dict[str, float]:
    import torch

    from polyak.generate import PotentialFlow, potential_flow_loss, wave_residual
    from polyak.generate.fields import jacobian

    generator = torch.Generator().manual_seed(t.seed)
    d, c = 6, 0.7
    z, wave, v = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (t["points"], 1, 1))
    at = torch.rand(len(z), generator=generator, dtype=torch.float64) * 5
    unit = wave[0] / wave.norm()
    mode = "official" if t.arm == "official" else "trace"
    waves = (
        lambda y, s: torch.sin(y @ unit - c * s),
        lambda y, s: torch.cos(c * s * wave.norm()) * torch.cos(y @ wave[0]),
    )
    times = [at] if mode == "trace" else [1.3, 2.9]
    left = max(wave_residual(u, z, s, c, mode).abs().max().item() for u in waves for s in times)

    with torch.random.fork_rng([]):
        torch.manual_seed(t.seed)
        flow = PotentialFlow(d, 3, 8).double()
    turn = torch.zeros(d, d, dtype=torch.float64)
    if t.arm == "curled":
        turn[0, 1], turn[1, 0] = 0.1, -0.1
    slopes = jacobian(lambda y: flow.velocity(1, y, 2.0) + y @ turn, z)[1]
    curl = (slopes - slopes.mT).abs().max().item()

    mixed = torch.randn(d, 10, generator=generator, dtype=torch.float64)
    parts = potential_flow_loss(flow, lambda y: torch.sin(y @ mixed), z, 1, 1, lambda b, a: (a - b)[:, :3])
    h, move = 1e-4, flow.velocity(1, parts["before"], 2)
    change = (torch.sin((parts["before"] + h * move) @ mixed) - torch.sin((parts["before"] - h * move) @ mixed)) / (
        2 * h
    )
    parts["loss"].backward()
    others = [p.grad for k in (0, 2) for p in flow.potentials[k].parameters()]
    leak = sum(g is not None and bool(g.any()) for g in others) + int((flow.c.grad != 0).sum() != 1)

    straight, halved = PotentialFlow(d, 2, 8).double(), PotentialFlow(d, 2, 8).double()
    straight.potentials[0] = _function(lambda y, s: y @ v[0])
    halved.potentials[0] = _function(lambda y, s: -y.square().sum(1) / 4)
    steps = torch.arange(5, dtype=torch.float64)[:, None, None]
    walks = max(
        (straight.traverse(z, 0) - (z + steps * v)).abs().max().item(),
        (halved.traverse(z, 0) - z * 0.5**steps).abs().max().item(),
        (straight.traverse(z, 0, direction=-1) - (z - steps * v)).abs().max().item(),
    )
    return dict(
        left=left,
        curl=curl,
        walks=walks,
        leak=float(leak),
        change=abs(parts["jvp"].item() / change.square().mean().item() - 1),
    )


def _function(f):
    from torch import nn

    class Function(nn.Module):
        def forward(self, z, t):
            return f(z, t)

    return Function()


IMAGES = ("ellipses", "digits")
ARMS = (
    Arm("directions", "Learned directions", "baseline", tasks=IMAGES, says="straight edits with the same loss and classifier"),
    Arm("principal", "Principal directions", "baseline", tasks=IMAGES, says="orthonormal, those along which images change most"),
    Arm("flow", "Potential flow", "method", tasks=IMAGES),
    Arm("no_pde", "Potential flow without its equation", "control", tasks=("digits",), says="speeds are those that fit it best"),
    Arm("random", "Random directions", "control", tasks=IMAGES),
    Arm("trace", "Potential flow", "method", tasks=("exact",)),
    Arm("official", "With the published residual", "control", tasks=("exact",), says="rows of the Hessian summed, and the batch"),
    Arm("curled", "With a rotation added to the velocity", "control", tasks=("exact",)),
)  # fmt: skip
SETTING = {
    "k": 5, "steps": 6, "length": 0.4, "iterations": 100, "batch": 64, "lr": 3e-2, "lr_judge": 1e-2, "lambda_pde": 1.0,
    "pairs": 4000, "judged": 120, "points": 200, "epochs": 30,
}  # fmt: skip
TASKS = (
    Task(
        "exact", "Functions that are known",
        "plane and standing waves, a linear, a quadratic and a random potential, in six dimensions; float64",
        {"points": 50},
    ),
    Task(
        "ellipses", "Ellipses of five entangled factors",
        "16 x 16 pixels; place, size, aspect ratio and angle are a random two-layer function of eight latents",
        SETTING,
    ),
    Task(
        "digits", "A variational autoencoder of digits",
        "eight latents, trained here on the 1797 digits of 8 x 8 pixels; five edits of three steps",
        SETTING,
    ),
)  # fmt: skip
METRICS = (
    Metric("left", "Largest residual of waves", exact=True),
    Metric("curl", "Largest asymmetry of the velocity's Jacobian", exact=True),
    Metric("walks", "Largest distance from walks in closed form", exact=True),
    Metric("change", "Relative difference of the images' change from finite differences", exact=True),
    Metric("leak", "Parameters of other potentials that the loss moves", exact=True),
    Metric("vp", "Variation predictability, 80 pairs to learn from", better="higher"),
    Metric("share", "Largest factor's share of the change, mean over edits", better="higher"),
    Metric("residual", "Mean square of the wave equation's residual, relative to its terms"),
    Metric("defect", "Residual, root mean square, relative to the steps"),
    Metric("length", "Distance in latents from first to last"),
)
PROVED = Ask(METRICS, kind="mechanism", task="exact", arm="trace", rule="every")
ELLIPSES = Ask(METRICS, kind="effect", task="ellipses", metric="vp", arm="flow")
DIGITS = Ask(METRICS, kind="effect", task="digits", metric="vp", arm="flow")
CRITERIA = (
    *PROVED.table(
        "at_most", "name bound metric control says",
        ("waves", 1e-10, "left", "official", "Plane and standing waves leave nothing of the wave equation"),
        ("curl", 1e-12, "curl", "curled", "The velocity has no curl"),
        ("walks", 1e-12, "walks", "", "Walks of a linear and a quadratic potential, and their mirror images, have a closed form"),
        ("change", 1e-6, "change", "", "The images' change along a step is that of finite differences"),
        ("leak", 0.0, "leak", "", "The loss moves the drawn potential and its speed alone"),
    ),
    DIGITS.at_most(
        "obeys", 0.25, "Digits: of the wave equation learned potentials leave at most a quarter, in squares", metric="residual",
        control="no_pde",
    ),
    DIGITS.at_most("penalty", 0.5, "Digits: per step, half of what they leave without it", metric="defect", over="no_pde"),
    DIGITS.at_least("digits_random", 0.05, "Digits: edits are easier to tell apart than random directions", minus="random"),
    DIGITS.beats("digits_directions", "Digits: and than learned directions", minus="directions", gating=False),
    DIGITS.beats("digits_principal", "Digits: and than principal directions", minus="principal", gating=False),
    ELLIPSES.at_least("directions", 0.03, "Ellipses: easier to tell apart than learned directions", minus="directions"),
    ELLIPSES.at_least("random", 0.15, "Ellipses: easier to tell apart than random directions", minus="random"),
    ELLIPSES.beats("principal", "Ellipses: easier to tell apart than principal directions", minus="principal", gating=False),
    ELLIPSES.beats("share", "Ellipses: one factor has more of an edit's change", metric="share", minus="directions", gating=False),
)  # fmt: skip

CLAIM = Claim(
    slug="potential_flows", room="generate", name="Potential flows",
    summary="Edits of generated images along gradients of learned potentials that obey the wave equation",
    says=(
        "Walks along the gradients of learned potentials, which the wave equation and a classifier of pairs shape, edit images of "
        "generative models in ways that are easier to tell apart than straight and warped directions are: by variation "
        "predictability on SNGAN, BigGAN and StyleGAN2, and for VAEs on MNIST and dSprites."
    ),
    paper=Paper(
        "Latent Traversals in Generative Models as Potential Flows", 2023, "2304.12944", "ICML 2023",
        "https://github.com/KingJamesSong/PDETraversal",
    ),
    part="polyak.generate.potential_flows:PotentialFlow", budget="iterations",
    tasks=TASKS, arms=ARMS, metrics=METRICS, criteria=CRITERIA, trial=trial, picture=pictures.picture,
    scales=(Scale("small", "two small generators: about three minutes on two cores", 5, first_seed=100),),
    sources=("polyak.claims.generate._traversals",),
    departures=(
        "No GANs: a renderer of ellipses whose factors are known, and a small VAE of digits. WarpedGANSpace and LatentCLR are not "
        "run; learned directions have the flows' loss and classifier, in which a straight edit's residual is zero.",
        "The equation is the wave equation itself, not the published code's residual.",
        "100 iterations with rates of 0.03, for potentials, and 0.01, for the classifier, falling by a cosine, in place of 10,000 "
        "or more with rates of 0.0001. Each takes the mean loss of all five edits, at one time; the paper draws one edit. In "
        "pilots of as many losses the classifier then forgot the others, and potentials became constant. Nothing is tuned; pilots "
        "were on seeds 0 to 2.",
        "Three steps of training (T = 6), not five. The classifier of pairs that trains edits is a perceptron; the one that judges "
        "them is LeNet.",
        "Steps of straight edits are 0.4 long, so that walks are about as long as flows' were in pilots (1.1 to 1.3): they have no "
        "length of their own, and longer ones are easier to tell apart.",
    ),
    errata=(
        Erratum(
            what="What it calls the Laplacian is the gradient of the sum of the gradient: the row sums of the Hessian, d numbers "
            "where the equation has one.",
            where="KingJamesSong/PDETraversal, lib/WavePDE.py, loss_pde",
            effect="Its potentials are not trained to obey the wave equation; a plane wave, which does, leaves a residual.",
            test="tests/generate/test_potential_flows.py::test_official_laplacian_is_the_row_sums_of_the_hessian",
        ),
        Erratum(
            what="The second derivative in time is taken at one time that all rows of the batch share, of the sum over them.",
            where="KingJamesSong/PDETraversal, lib/WavePDE.py, loss_pde",
            effect="It grows with the batch (256 times with the scripts' batch), and the Laplacian does not.",
            test="tests/generate/test_potential_flows.py::test_official_second_derivative_grows_with_the_batch",
        ),
        Erratum(
            what="For StyleGAN2 the last tanh is taken out of trained potentials before they are walked along.",
            where="KingJamesSong/PDETraversal, gen_pairs.py",
            effect="Steps are those of another potential, longer by 1 / (1 - u^2), than the one that was trained.",
            test="tests/generate/test_potential_flows.py::test_a_saturated_potential_does_not_move_and_without_its_tanh_it_is_another",
        ),
        Erratum(
            what="Pairs for the judge are walked for all T times; training knows the first T // 2. (The script does not run as it "
            "stands: it makes the potentials with arguments of another class.)",
            where="KingJamesSong/PDETraversal, gen_pairs.py and lib/WavePDE.py",
            effect="The second half of a walk is at times for which no loss was ever computed.",
            test="tests/generate/test_potential_flows.py::test_only_the_first_half_of_the_times_is_trained",
        ),
    ),
    usage=(
        "from polyak.generate import PairClassifier, PotentialFlow, potential_flow_loss\n\n"
        "flow, judge = PotentialFlow(dim=8, k=4), PairClassifier(4, channels=1)\n"
        'loss = potential_flow_loss(flow, decoder, z, k=2, s=0, reconstructor=judge)["loss"]  # then flow.traverse(z, k=2)'
    ),
)  # fmt: skip
