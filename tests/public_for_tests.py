"""Every public name of the package, and a right call of each: for the test that spoils their arguments.

A name is public if it is in the ``__all__`` of a module whose path has no underscore, or stands in a module of ``polyak.core``, or
in one of those by which a claim is declared.
"""

import dataclasses
import importlib
import inspect
import os
import pkgutil
import socket
import tempfile
import types
import typing

import torch
from matplotlib.figure import Figure
from torch import nn

import polyak
import polyak.generate as G
import polyak.optim as O
from polyak.claims.optim.lion import CLAIM
from polyak.core import integrators, schedules
from polyak.core.exact import Gaussian
from polyak.lab import Store
from polyak.lab.claim import Criterion
from polyak.lab.compare.rows import Setup
from polyak.optim import apo

DECLARING = ("lab.claim", "lab.criteria")

# What has no arguments that a user gives, and why.
NOT_CALLED = {
    "core.checks": "the checks themselves",
    "core.cc": "compiled code is made by what needs it",
    "core.launch": "kernels are made and launched by the engine alone",
    "generate.process.Moment": "a float",
    "lab.workers": "processes that the lab starts",
    "lab.store": "rows of the database",
    "lab.SamplingTask": "what a task file gives is looked at where it is read, and is a TaskError in words",
    "lab.TrainingTask": "likewise",
}


def modules():
    for found in pkgutil.walk_packages(polyak.__path__, "polyak."):
        short = found.name.removeprefix("polyak.")
        if not any(part.startswith("_") or part in ("claims", "cli") for part in short.split(".")):
            module = importlib.import_module(found.name)
            if hasattr(module, "__all__") or short.startswith("core.") or short in DECLARING:
                yield short, module


def public():
    """Name -> what is called, of every public class and function."""
    found, seen = {}, set()
    for short, module in modules():
        own = [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            made = getattr(module, name)
            skipped = any(
                f"{short}.{name}".startswith(f"{prefix}.") or f"{short}.{name}" == prefix for prefix in NOT_CALLED
            )
            abstract = (
                getattr(made, "_is_protocol", False)
                or typing.is_typeddict(made)
                or (isinstance(made, type) and issubclass(made, Exception))
            )
            if inspect.isroutine(made) or inspect.isclass(made):
                if id(made) not in seen and not skipped and not abstract:
                    found[f"{short}.{name}"] = made
                seen.add(id(made))
    return found


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def weights():
    return [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))]


def wrapped():
    model = net()
    return dict(model=model, base=torch.optim.SGD(model.parameters(), lr=0.1))


def lion():
    optimizer = O.Lion(weights(), weight_decay=0.1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    return optimizer


def denoiser():
    return G.Denoiser(lambda x, t: x * 0.1, G.VP())


def posterior():
    return G.NoisePosterior(lambda x: torch.zeros(len(x), 5), G.noise_levels(0.1, 50.0, 5))


def fields():
    return importlib.import_module("polyak.generate.interpolants").Fields(G.Interpolant(), b=field, s=field)


def unet():
    return importlib.import_module("polyak.generate.networks").unet(4, width=8, levels=1, classes=2)


def elements():
    return importlib.import_module("polyak.particles").SetEnv([0.1, -0.2, 0.3], 2)


def built(**more):
    """Two trajectories of two steps each, with what a loss of GFlowNets is given beside them."""
    traj = importlib.import_module("polyak.particles.gflownet").sample(elements(), lambda s: torch.zeros(s.shape), 2)
    return dict(traj=traj, log_pf=torch.zeros(2, 2), log_pb=torch.zeros(2, 2), log_flow=torch.zeros(2, 3), **more)


class Episodes:
    """What gymnasium's environments have."""

    action_space = types.SimpleNamespace(n=2)

    def reset(self):
        return [0.0, 0.0], {}

    def step(self, action):
        return [1.0, float(action)], 0.0, True, False, {}


def saved():
    path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
    importlib.import_module("polyak.generate.networks").save_denoiser(path, unet(), VP)
    return path


def pipeline():
    return types.SimpleNamespace(scheduler=None, unet=net())


def dual():
    return G.MarginalizationModel(G.MLPDual(2, 3, 4, 1), 2, 3)


def masked_lm():
    model = nn.Linear(2, 2)
    model.config = types.SimpleNamespace(vocab_size=5, hidden_size=2)
    return model


def stepping():
    return types.SimpleNamespace(scheduler=types.SimpleNamespace(step=lambda model_output, timestep, sample: None))


def steering():
    return G.FKSteering(lambda samples: samples.flatten(2).mean(2), schedule=[])


def pairs(count=2):
    return dict.fromkeys(("logp_w", "logp_l", "ref_w", "ref_l"), torch.full((count,), -1.0))


X, LAW, VP = torch.ones(6, 2), Gaussian([0.0, 0.0]), G.VP()
STAY = [[0.9, 0.1], [0.2, 0.8]]
MEMBERS = torch.ones(6, 3, 2)
PATHS = torch.arange(60.0).reshape(5, 2, 3, 2).sin()
SEPARATION = G.gaussian_separation([2.0, 0.5, 0.5])
STATES = [{"w": torch.full((3,), float(i))} for i in range(4)]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_diffs", "exp_avg_sqs", "neg_pre_grads")


def field(x, t):
    return -x


MASKED = G.MaskedProcess(3)
TOKENS = torch.tensor([[3, 1], [0, 3]])


def says(x):
    return torch.zeros(*x.shape, 3)


def brightness(samples):
    return samples.flatten(2).mean(2)


def bowl(x, t):
    return -x.flatten(1).square().sum(1)


class Potential(nn.Linear):
    """A scalar function of x and t."""

    def __init__(self):
        super().__init__(2, 1)

    def forward(self, x, t):
        return super().forward(x).square()


# Arguments that mean the same wherever they are.
COMMON = {"params": weights, "model": net}

# Right calls of these take long, work in place, or begin what has to be ended: they are only spoilt.
TOO_LONG = {
    "core.momentum.ema_", "core.momentum.heavy_ball_", "optim.adan.adan_step", "optim.apo.train_round", "generate.check_solver",
    "optim.monna.Peers", "lab.Store", "lab.collect", "lab.compare", "lab.pictures.drawn", "lab.run",
    "lab.run_many", "core.integrators.dopri5", "generate.networks.load_denoiser", "generate.networks.save_denoiser",
}  # fmt: skip

# What a call needs at least: name -> arguments. What is not here can be called without any.
NEEDS = {
    "core.distances.KernelDistance": lambda: dict(y=X, kernel=lambda x, y: x @ y.T),
    "core.distances.gaussian_kernel": lambda: dict(bandwidth=1.0),
    "core.distances.gaussian_w2": lambda: dict(mean1=[0.0], cov1=[[1.0]], mean2=[0.0], cov2=[[1.0]]),
    "core.distances.precision_recall": lambda: dict(real=X, generated=X, k=2),
    "core.elementwise.axpy": lambda: dict(a=2.0, x=X, y=X),
    "core.elementwise.where": lambda: dict(condition=X > 0, a=X, b=X),
    "core.exact.Mixture": lambda: dict(means=[[0.0], [1.0]], covariances=1.0),
    "core.exact.Gaussian": lambda: dict(mean=[0.0, 1.0]),
    "core.exact.product_of_powers": lambda: dict(laws=[LAW, LAW], betas=[1.0, 0.5]),
    "core.exact.FiniteHMM": lambda: dict(initial=[0.5, 0.5], transition=STAY, emission=STAY),
    "core.exact.MarkovChain": lambda: dict(initial=[0.5, 0.5], transition=STAY),
    "core.exact.LinearGaussian": lambda: dict(A=[[0.5]], C=[[1.0]], Q=[[1.0]], R=[[1.0]], m0=[0.0], P0=[[1.0]]),
    "core.exact.LinearGaussianScore": lambda: dict(A=X, C=X, Q=X, R=X, m0=X, P0=X),
    "core.exact.Ising": lambda: dict(length=3, coupling=0.2),
    "core.exact.HyperGrid": lambda: dict(ndim=2, height=8),
    "core.exact.SubsetLaw": lambda: dict(log_weights=[0.1, 0.2, 0.3], k=1),
    "core.exact.log_elementary_symmetric": lambda: dict(log_weights=X, degree=2),
    "core.exact.HMMScore": lambda: dict(initial=X, transition=X, emission=None),
    "core.exact.FilteredStates": lambda: dict(probabilities=X, predicted=X, log_likelihood=X),
    "core.exact.SmoothedStates": lambda: dict(probabilities=X, pairs=X, log_likelihood=X),
    "core.exact.SmoothedMoments": lambda: dict(means=X, covariances=X, lag_one=X, log_likelihood=X),
    "core.exact.FilteredMoments": lambda: dict(
        means=X, covariances=X, predicted_means=X, predicted_covariances=X, log_likelihood=X
    ),
    "core.integrators.Tableau": lambda: dict(nodes=(0.0,), matrix=(), weights=(1.0,)),
    "core.integrators.runge_kutta": lambda: dict(tableau=integrators.HEUN, f=field, x=X, t=0.0, dt=0.1),
    "core.integrators.dopri5": lambda: dict(f=field, x=X, times=[0.0, 1.0]),
    "core.integrators.leapfrog": lambda: dict(acceleration=lambda q: -q, q=X, p=X, dt=0.1),
    "core.integrators.euler_maruyama": lambda: dict(drift=field, diffusion=field, x=X, t=0.0, dt=0.1, noise=X),
    "core.linalg.sherman_morrison": lambda: dict(P=torch.eye(2), v=torch.ones(2)),
    "core.momentum.Average": lambda: dict(beta=0.9),
    "core.momentum.bias_correction": lambda: dict(beta=0.9, step=2),
    "core.momentum.nesterov_estimate": lambda: dict(momentum=X, gradient=X, previous=X, beta=0.9),
    "core.particles.Cloud": lambda: dict(x=X, logw=X.double(), log_z=torch.zeros(6, dtype=torch.float64)),
    "core.particles.cess": lambda: dict(logw_prev=X, log_incr=X),
    "core.particles.counts": lambda: dict(ancestors=torch.tensor([0, 1]), N=2),
    "core.particles.gather": lambda: dict(tree=X, ancestors=torch.tensor([0, 1])),
    "core.projection.row_sums": lambda: dict(t=X, view="layer"),
    "core.projection.row_norms": lambda: dict(t=X, view="layer"),
    "core.projection.cosines": lambda: dict(a=X, b=X, view="layer"),
    "core.schedules.Warmup": lambda: dict(after=schedules.Constant(), steps=3),
    "generate.apg.contrast": lambda: dict(x=X),
    "generate.apg.denoiser_post_cfg": lambda: dict(guidance=G.APG()),
    "generate.apg.project": lambda: dict(v0=X, v1=X),
    "generate.apg.saturation": lambda: dict(x=torch.ones(2, 3, 4)),
    "generate.normalized_guidance": lambda: dict(pred_cond=X, pred_uncond=X, scale=2.0),
    "generate.Change": lambda: dict(x=X),
    "generate.Denoiser": lambda: dict(model=lambda x, t: x, process=VP),
    "generate.Discrete": lambda: dict(betas=[0.01, 0.02, 0.03]),
    "generate.Evaluator": lambda: dict(denoiser=denoiser()),
    "generate.KineticOptimal": lambda: dict(separation=SEPARATION),
    "generate.GaussianMixtureInterpolant": lambda: dict(rho0=LAW, rho1=LAW),
    "generate.Memory": lambda: dict(steps=0),
    "generate.MLPDual": lambda: dict(num_values=2, length=3, hidden=4),
    "generate.MarginalizationModel": lambda: dict(net=net(), num_values=2, length=3),
    "generate.PersistentChain": lambda: dict(batch=2, length=3, num_values=2),
    "generate.TransformerDual": lambda: dict(num_values=2, length=3, dim=4, heads=2, layers=1, feedforward=4),
    "generate.marginalization.consistency_loss": lambda: dict(model=dual(), x=torch.ones(2, 3).long()),
    "generate.marginalization.data_loss": lambda: dict(model=dual(), x=torch.ones(2, 3).long()),
    "generate.marginalization.energy_loss": lambda: dict(
        model=dual(), log_f=lambda x: x.sum(1).float(), chain=G.PersistentChain(2, 3, 2)
    ),
    "generate.adapters.transformers.MaskedLMDual": lambda: dict(model=masked_lm(), length=3, mask=0),
    "generate.MetaFlowMatching": lambda: dict(encoder=net(), velocity=net()),
    "generate.MetaVelocity": lambda: dict(dim=2, embed=3),
    "generate.PopulationEncoder": lambda: dict(dim=2),
    "generate.EGTN": lambda: dict(node_dim=1, edge_dim=0, hidden=4, layers=1),
    "generate.GeometricTrajectoryDiffusion": lambda: dict(net=G.EGTN(1, 0, 4, 1), steps=3),
    "generate.geotdm.ade": lambda: dict(samples=PATHS, truth=PATHS),
    "generate.geotdm.fde": lambda: dict(samples=PATHS, truth=PATHS),
    "generate.geotdm.marginal_score": lambda: dict(samples=PATHS, truth=PATHS),
    "generate.geotdm.classification_score": lambda: dict(samples=PATHS, truth=PATHS, epochs=1, hidden=2),
    "generate.geotdm.prediction_score": lambda: dict(samples=PATHS, truth=PATHS, epochs=1, hidden=2),
    "generate.geotdm.simulate_nbody": lambda: dict(kind="springs", n=1, bodies=2, steps=3, save_every=1),
    "generate.meta_flow.wasserstein": lambda: dict(x=X, y=X),
    "generate.meta_flow.mmd_rbf": lambda: dict(x=X, y=X),
    "generate.PairClassifier": lambda: dict(k=2),
    "generate.PotentialFlow": lambda: dict(dim=2),
    "generate.potential_flow_loss": lambda: dict(
        flow=G.PotentialFlow(2, 2, 4), generator_fn=lambda z: z.sin(), z=X, k=0, s=0
    ),
    "generate.variation_predictability": lambda: dict(
        pairs=torch.rand(8, 2, 1, 4, 4), labels=torch.arange(8) % 2, train_fraction=0.5, steps=1
    ),
    "generate.wave_residual": lambda: dict(u_fn=lambda z, t: z.sin().sum(1), z=X, t=0.5),
    "generate.Prediction": lambda: dict(output=X, x=X, t=0.5, process=VP),
    "generate.MaskedProcess": lambda: dict(vocab=3),
    "generate.TokenDenoiser": lambda: dict(model=says, process=MASKED),
    "generate.TokenPrediction": lambda: dict(logits=says(TOKENS), x=TOKENS, t=0.5, process=MASKED),
    "generate.generate_masked": lambda: dict(model=lambda input_ids: says(input_ids), input_ids=TOKENS, mask_token_id=3),
    "generate.generative_perplexity": lambda: dict(texts=TOKENS, lm=lambda x: torch.zeros(*x.shape, 4)),
    "generate.sentence_entropy": lambda: dict(tokens=TOKENS),
    "generate.discrete.categorical": lambda: dict(logits=X),
    "generate.discrete.gumbel_bound": lambda: dict(dtype=torch.float32),
    "generate.discrete.random_subsets": lambda: dict(counts=torch.tensor([1, 2]), length=3),
    "generate.discrete.rounded_gumbel_law": lambda: dict(p=X),
    "generate.discrete.spread": lambda: dict(batch=3),
    "generate.discrete.stratified_counts": lambda: dict(batch=3, length=4),
    "generate.discrete.token_log_probs": lambda: dict(logits=X, mask_id=2),
    "generate.discrete.truncated_gumbel_law": lambda: dict(p=X),
    "generate.discrete.uniform": lambda: dict(shape=(2, 3)),
    "generate.Query": lambda: dict(x=X, t=0.5),
    "generate.Separation": lambda: dict(snr=[0.5, 2.0], values=[0.3, 0.85]),
    "generate.Stage": lambda: dict(t=1.0, to=0.5, view="x0", base=1.0, value=0.5),
    "generate.SteeringState": lambda: dict(logw=torch.zeros(1, 2), log_z=torch.zeros(1)),
    "generate.Step": lambda: dict(x=X, s=1.0, t=0.5, index=0, last=False),
    "generate.inject_noise": lambda: dict(solver=G.Heun(), alpha=0.1),
    "generate.pfgmpp_loss": lambda: dict(
        denoiser=G.Denoiser(lambda x, t: x * 0.1, G.PFGMPP(), "edm"), y=X, process=G.PFGMPP(), reference=X
    ),
    "generate.quantize_weights": lambda: dict(module=net(), bits=4),
    "generate.stf_target": lambda: dict(x=X, reference=X, sigma=0.5, process=G.PFGMPP()),
    "generate.problems.StudentDenoiser": lambda: dict(points=X, process=G.PFGMPP()),
    "generate.FKSteering": lambda: dict(reward=lambda samples: samples.flatten(2).mean(2)),
    "generate.ab_coefficients": lambda: dict(k=2),
    "generate.artifact_score": lambda: dict(latents=torch.ones(1, 2, 4, 4), mean=[0.0, 0.0], std=[1.0, 1.0]),
    "generate.check_process": lambda: dict(process=VP),
    "generate.problems.path_rmse": lambda: dict(x=X, y=X),
    "generate.check_solver": lambda: dict(solver=G.DDIM()),
    "generate.conditional_flow_matching_loss": lambda: dict(model=lambda x, t: -x, x1=X, process=VP),
    "generate.Forecast": lambda: dict(samples=MEMBERS, uncertainty=X, precision=X),
    "generate.context_denoiser": lambda: dict(model=lambda x, t, told: x, context=X, process=VP),
    "generate.ensemble_forecast": lambda: dict(
        denoiser=lambda context: denoiser(), context=X, solver=G.DDIM(), members=2, steps=2
    ),
    "generate.cogdpm.crps": lambda: dict(samples=MEMBERS, truth=X),
    "generate.cogdpm.csi": lambda: dict(samples=MEMBERS, truth=X, threshold=0.5),
    "generate.cogdpm.ensemble_rmse": lambda: dict(samples=MEMBERS, truth=X),
    "generate.cogdpm.fss": lambda: dict(samples=torch.ones(1, 2, 3, 3), truth=torch.ones(1, 3, 3), threshold=0.5, size=2),
    "generate.cogdpm.power_spectrum": lambda: dict(x=X),
    "generate.cogdpm.rank_histogram": lambda: dict(samples=MEMBERS, truth=X),
    "generate.cogdpm.spread_skill": lambda: dict(samples=MEMBERS, truth=X),
    "generate.denoising_loss": lambda: dict(denoiser=denoiser(), x0=X),
    "generate.Gap": lambda: dict(ode_sde=0.1, ode_data=None, sde_data=None),
    "generate.GapBound": lambda: dict(w2=0.1, times=X[0], residual=X[0], score_error=X[0], lipschitz=X[0]),
    "generate.PotentialNet": lambda: dict(dim=2, width=4),
    "generate.exact_ode_logdensity": lambda: dict(potential=bowl, process=VP, x=X, steps=1),
    "generate.fp_regularized_loss": lambda: dict(potential=bowl, process=VP, x0=X),
    "generate.histogram_w2": lambda: dict(x=X, y=X, bins=4),
    "generate.log_fp_residual": lambda: dict(potential=bowl, process=VP, x=X, t=0.5),
    "generate.ode_sde_gap": lambda: dict(denoiser=denoiser(), process=VP, n=4, steps=2, metric="sliced", shape=(2,)),
    "generate.score_fp_residual": lambda: dict(score_fn=field, process=VP, x=X, t=0.5),
    "generate.wasserstein_bound": lambda: dict(denoiser=denoiser(), process=VP, shape=(2,), n=4, steps=2),
    "generate.gaussian_separation": lambda: dict(spectrum=[2.0, 0.5]),
    "generate.kinetic_energy": lambda: dict(path=VP, separation=SEPARATION),
    "generate.reparametrize": lambda: dict(denoiser=denoiser(), old_process=VP, new_process=G.Flow()),
    "generate.separation_function": lambda: dict(data_or_denoiser=torch.eye(3), snr=[0.5, 2.0], n_samples=16),
    "generate.train_denoiser": lambda: dict(network=unet(), images=torch.ones(4, 1, 4, 4), process=VP, steps=1, batch=2),
    "generate.networks.ImageNetwork": lambda: dict(model=net()),
    "generate.networks.dit": lambda: dict(size=4, width=8, depth=1),
    "generate.networks.unet": lambda: dict(size=4, width=8, levels=1),
    "generate.networks.image_denoiser": lambda: dict(network=unet(), process=VP),
    "generate.networks.load_denoiser": lambda: dict(path=saved()),
    "generate.networks.save_denoiser": lambda: dict(
        path=os.path.join(tempfile.mkdtemp(), "net.safetensors"), network=unet(), process=VP
    ),
    "generate.dpm_step": lambda: dict(x=X, s=0.5, t=0.4, values=[X, X], r=[0.5], process=VP),
    "generate.drive": lambda: dict(run=(x for x in ()), answer=lambda query: None),
    "generate.resume": lambda: dict(
        solver=G.DDIM(), step=G.Step(X, 1.0, 0.5, 0, False), times=[1.0, 0.5, 0.1], process=VP
    ),
    "generate.DenoisingLangevinGibbs": lambda: dict(denoiser=denoiser(), process=VP, noise_posterior=posterior()),
    "generate.KarrasHeun": lambda: dict(steps=3),
    "generate.NoiseClassifier": lambda: dict(in_shape=(1, 4, 4), classes=5),
    "generate.NoisePosterior": lambda: dict(logits=lambda x: x, levels=[2.0, 1.0]),
    "generate.PerSample": lambda: dict(solver=G.DDIM(), steps=3),
    "generate.ReverseDiffusion": lambda: dict(steps=3),
    "generate.dmcmc.autocorrelation": lambda: dict(values=X),
    "generate.dmcmc.effective_sample_size": lambda: dict(values=X),
    "generate.heun_per_sample": lambda: dict(denoiser=denoiser(), x=X, sigma0=1.0, steps=2),
    "generate.noise_classifier_loss": lambda: dict(classifier=posterior(), x0=X),
    "generate.Dimension": lambda: dict(k=X, singular_values=X, tangent=X),
    "generate.EnergyScore": lambda: dict(potential=net()),
    "generate.Projection": lambda: dict(gradient=field, remainder_norm=0.0, cos=0.0),
    "generate.antisymmetric_gauge": lambda: dict(score=field, A=[[0.0, 1.0], [-1.0, 0.0]]),
    "generate.divergence": lambda: dict(field=field, x=X, t=0.5),
    "generate.flow_jacobian": lambda: dict(denoiser=denoiser(), process=VP, x=X, times=[1.0, 0.5]),
    "generate.gauge_moments": lambda: dict(field=field, x=X, t=0.5),
    "generate.gauge_residual": lambda: dict(field=field, score=field, x=X, t=0.5),
    "generate.intrinsic_dimension": lambda: dict(denoiser=denoiser(), process=VP, x=X, steps=2),
    "generate.log_likelihood": lambda: dict(denoiser=denoiser(), process=VP, x=X, steps=2),
    "generate.matrix_gauge": lambda: dict(score=field, B=lambda x, t: x[:, :, None] - x[:, None]),
    "generate.project_conservative": lambda: dict(field=field, samples=X, t=0.5, potential=Potential(), steps=1),
    "generate.sample": lambda: dict(denoiser=denoiser(), x_T_or_shape=(2, 3), solver=G.DDIM(), steps=2),
    "generate.stability_limit": lambda: dict(method="hb", k=2),
    "generate.stability_region": lambda: dict(method="hb", k=2, beta=0.5, grid=X),
    "generate.interpolant_loss": lambda: dict(kind="b", net=field, x0=X, x1=X, interpolant=G.Interpolant()),
    "generate.interpolants.Fields": lambda: dict(interpolant=G.Interpolant(), b=field),
    "generate.interpolants.LinearPath": lambda: dict(a=lambda t: 1 - t, b=lambda t: t),
    "generate.interpolants.integrate": lambda: dict(fields=fields(), x0=X, steps=1),
    "generate.interpolants.log_likelihood": lambda: dict(fields=fields(), x=X, log_prob0=LAW.log_prob, steps=1),
    "generate.interpolants.optimal_eps": lambda: dict(excess_b=1.0, excess_s=2.0),
    "generate.invert": lambda: dict(denoiser=denoiser(), x=X, solver=G.DDIM(), steps=2),
    "generate.adapters.diffusers.APGGuider": lambda: dict(space="pred"),
    "generate.adapters.diffusers.Guided": lambda: dict(pipe=pipeline(), guidance=G.APG(), networks=[]),
    "generate.adapters.diffusers.guide": lambda: dict(pipe=pipeline(), guidance=G.APG()),
    "generate.adapters.diffusers.FKCallback": lambda: dict(pipe=stepping(), steering=steering()),
    "generate.adapters.diffusers.fk_callback": lambda: dict(pipe=stepping(), steering=steering()),
    "generate.adapters.diffusers.PrecisionGuider": lambda: dict(
        scheduler=importlib.import_module("polyak.generate.adapters.diffusers").PolyakScheduler(solver=G.DDIM())
    ),
    "generate.adapters.diffusers.PolyakScheduler": lambda: dict(solver=G.DDIM()),
    "generate.adapters.diffusers.PolyakSchedulerOutput": lambda: dict(prev_sample=X),
    "generate.adapters.diffusers.as_diffusers": lambda: dict(solver=G.DDIM(), process=VP),
    "generate.problems.ExactDenoiser": lambda: dict(law=LAW, process=VP),
    "generate.problems.gaussian_flow": lambda: dict(law=LAW, process=VP, x=X, s=0.5, t=0.4),
    "generate.problems.kde": lambda: dict(points=X, bandwidth=0.1),
    "generate.problems.reference": lambda: dict(denoiser=denoiser(), x_T=X, nfe=30),
    "generate.problems.reference_path": lambda: dict(denoiser=denoiser(), x_T=X, times=[1.0, 0.5], nfe=30),
    "generate.rewards.RewardContext": lambda: dict(systems=range(2)),
    "generate.rewards.Scorer": lambda: dict(reward=lambda samples: samples.flatten(2).mean(2)),
    "generate.BestOfN": lambda: dict(reward=brightness),
    "generate.CoDe": lambda: dict(reward=brightness),
    "generate.RolloverBudget": lambda: dict(reward=brightness),
    "generate.SVDD": lambda: dict(reward=brightness),
    "generate.SearchResult": lambda: dict(
        x=X, reward=X[0], nfe=4, trace=G.SearchTrace(nfe=[4], best=X[:, None], step=X[:, None])
    ),
    "generate.SearchTrace": lambda: dict(nfe=[4], best=X[:, None], step=X[:, None]),
    "generate.SoP": lambda: dict(reward=brightness),
    "generate.convert": lambda: dict(model=field, source=G.Flow(), target=VP),
    "generate.process.Interpolant": lambda: dict(alpha=lambda t: 1 - t, sigma=lambda t: t),
    "generate.process.Moments": lambda: dict(path=VP, times=[1.0, 0.5]),
    "generate.process.check_batch": lambda: dict(t=0.5, x=X),
    "generate.process.expand": lambda: dict(coefficient=0.5, x=X),
    "generate.process.standard_normal": lambda: dict(shape=(2, 3)),
    "generate.process.wide": lambda: dict(device=torch.device("cpu")),
    "optim.SGDP": lambda: dict(params=weights(), lr=0.1),
    "optim.LionK": lambda: dict(params=weights(), kappa="sign"),
    "optim.MKOR": wrapped,
    "optim.MKORH": wrapped,
    "optim.MoNNA": lambda: dict(params=weights(), lr=0.1, f=0),
    "optim.Info": lambda: dict(name="adan", part="polyak.optim.adan:Adan", says="it"),
    "optim.create": lambda: dict(name="adan", params=weights()),
    "optim.info": lambda: dict(name="adan"),
    "optim.adamp.effective_step": lambda: dict(optimizer=lion()),
    "optim.adamp.radial_fraction": lambda: dict(optimizer=lion()),
    "optim.adan.adan_step": lambda: dict({n: [torch.ones(2)] for n in LISTS}, state_steps=[torch.ones(())], lr=0.1),
    "optim.apo.APOCallback": lambda: dict(apo=apo.APO()),
    "optim.apo.ExtrapolatedLogits": lambda: dict(previous=net(), alpha=0.3),
    "optim.apo.ExtrapolatedPolicy": lambda: dict(current=net(), previous=net(), alpha=0.3),
    "optim.apo.FrozenPolicy": lambda: dict(model=net(), weights={"a": X}),
    "optim.apo.RoundReport": lambda: dict(loss=[1.0], accuracy=[1.0], margin=[1.0], degenerate=0),
    "optim.apo.Rounds": lambda: dict(trained=X, extrapolated=X),
    "optim.apo.collate": lambda: dict(examples=[dict(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])]),
    "optim.apo.exponent": lambda: dict(alpha=0.3, T=2),
    "optim.apo.extrapolate_": lambda: dict(model={"a": X.clone()}, previous={"a": X.clone()}, alpha=0.3),
    "optim.apo.iterate_dpo": lambda: dict(
        trainer_factory=lambda model, ref, pairs: None, rounds=1, sampler=lambda model, t: None,
        labeler=lambda responses: None, apo=apo.APO(), model=net(),
    ),
    "optim.apo.sequence_logps": lambda: dict(
        logits=torch.zeros(1, 2, 3), labels=torch.zeros(1, 2).long(), mask=torch.ones(1, 2)
    ),
    "optim.apo.tabular": lambda: dict(reward=torch.zeros(2), ref=torch.tensor([0.5, 0.5]), beta=1.0, alpha=0.3, T=2),
    "optim.apo.train_round": lambda: dict(model=net(), reference=net(), batches=[[]], optimizer=torch.optim.SGD),
    "optim.apo.losses.PreferenceLoss": lambda: dict(loss=X, chosen_rewards=X, rejected_rewards=X),
    "optim.apo.losses.dpo_loss": lambda: dict(pairs(), beta=0.1),
    "optim.apo.losses.ipo_loss": lambda: dict(pairs(), tau=0.1),
    "optim.apo.losses.sppo_loss": lambda: dict(pairs(), eta=1.0),
    "optim.lion.Lyapunov": lambda: dict.fromkeys(("H", "energy", "gap", "feasibility", "delta1", "delta2"), 0.0),
    "optim.lion.bound": lambda: dict(optimizer=lion()),
    "optim.lion.lyapunov": lambda: dict(optimizer=lion(), loss=1.0),
    "optim.lion.kappa.Lp": lambda: dict(p=2.0),
    "optim.lion.kappa.TopK": lambda: dict(k=2),
    "optim.lion.kappa.named": lambda: dict(kappa="l1"),
    "optim.monna.Batches": lambda: dict(x=X, y=X, split=torch.tensor([[0, 1]]), size=1),
    "optim.monna.Mixer": lambda: dict(name="own", rule=lambda own, others, f: own, centred=True),
    "optim.monna.Peers": lambda: dict(rank=0, size=1, listener=socket.socket(), find=lambda rank: None),
    "optim.monna.Simulator": lambda: dict(model=net(), batches=[], n=3, f=1, lr=0.1),
    "optim.monna.agreement": lambda: dict(n=5, f=1, faulty=1),
    "optim.monna.dirichlet_split": lambda: dict(labels=torch.tensor([0, 1, 1]), workers=1, alpha=1.0),
    "optim.monna.mixer": lambda: dict(rule="nna"),
    "optim.monna.nna": lambda: dict(own=X[0], others=X, f=1),
    "optim.monna.self_centered_clip": lambda: dict(own=X[0], x=X, tau=1.0),
    "optim.monna.reduction": lambda: dict(before=X, after=X),
    "optim.monna.attacks.View": lambda: dict(honest=X, f=1, mix=lambda x: x, flipped=lambda change: X[0], lr=0.1),
    "optim.monna.attacks.line_search": lambda: dict(objective=lambda z: -z),
    "optim.spam.spam_param_groups": lambda: dict(model=net(), density=0.5),
    "optim.spam.clip_spikes_": lambda: dict(grads=[X.clone()], exp_avg_sqs=[X.clone()]),
    "particles.BitSequence": lambda: dict(modes=[[0, 1], [1, 1]]),
    "particles.FlowNet": lambda: dict(env=elements()),
    "particles.GFlowNet": lambda: dict(env=elements()),
    "particles.GymEnv": lambda: dict(make=Episodes),
    "particles.HyperGrid": lambda: dict(ndim=2, height=3),
    "particles.IsingGrow": lambda: dict(size=2, coupling=0.3),
    "particles.PrioritizedReplay": lambda: dict(capacity=4),
    "particles.SetEnv": lambda: dict(energies=[0.1, -0.2, 0.3], k=2),
    "particles.exact_terminal_law": lambda: dict(env=elements(), policy=lambda s: torch.zeros(s.shape)),
    "particles.gflownet.TerminalLaw": lambda: dict(states=X, probs=X[0]),
    "particles.gflownet.Trajectories": lambda: vars(built()["traj"]).copy(),
    "particles.gflownet.concatenate": lambda: dict(several=[built()["traj"]]),
    "particles.gflownet.from_torchgfn": lambda: dict(container=types.SimpleNamespace(
        states=types.SimpleNamespace(tensor=torch.zeros(2, 1, 3)), actions=types.SimpleNamespace(tensor=torch.zeros(1, 1, 1)),
        terminating_idx=torch.tensor([1]),
    )),
    "particles.gflownet.sample": lambda: dict(env=elements(), policy=lambda s: torch.zeros(s.shape), n=2),
    "teachers.CheckpointBank": lambda: dict(checkpoints=STATES),
    "teachers.CheckpointSaver": lambda: dict(folder="checkpoints", every=1),
    "teachers.LCSC": lambda: dict(checkpoints=STATES, objective=lambda weights: 1.0),
    "teachers.Result": lambda: dict(
        coefficients=X, value=1.0, heldout=None, history=X, tried=X, finalists=(), failures=0
    ),
    "teachers.combine": lambda: dict(checkpoints=STATES, coefficients=[0.25] * 4),
    "teachers.ema_coefficients": lambda: dict(k=4, rate=0.9),
    "teachers.landscape": lambda: dict(
        theta0=STATES[0], theta1=STATES[1], theta2=STATES[2], grid=([0.0], [0.0]), objective=lambda weights: 1.0
    ),
    "teachers.metric_to": lambda: dict(reference=X),
    "teachers.sample_metric": lambda: dict(
        sampler=lambda model, n, generator: X, metric=lambda x: 0.0, n=4, seed=0
    ),
    "lab.claim.Arm": lambda: dict(name="adan", label="Adan", role="method"),
    "lab.claim.Claim": lambda: {f.name: getattr(CLAIM, f.name) for f in dataclasses.fields(CLAIM)},
    "lab.claim.Criterion": lambda: {f.name: getattr(CLAIM.criteria[0], f.name) for f in dataclasses.fields(Criterion)},
    "lab.claim.Erratum": lambda: dict(what="a", where="b", effect="c", test="d"),
    "lab.claim.Measurement": lambda: dict(values={}),
    "lab.claim.Metric": lambda: dict(name="loss", label="Loss"),
    "lab.claim.Paper": lambda: dict(title="A", year=2000),
    "lab.claim.Plot": lambda: dict(x="step", y="loss"),
    "lab.claim.Scale": lambda: dict(name="small", says="minutes", seeds=5),
    "lab.claim.Task": lambda: dict(name="toy", label="Toy"),
    "lab.claim.Trial": lambda: dict(claim="adan", scale="small", task="toy", arm="adan", seed=0),
    "lab.claim.check_claim": lambda: dict(claim=CLAIM),
    "lab.claim.check_rules": lambda: dict(claim=CLAIM),
    "lab.criteria.Ask": lambda: dict(metrics=CLAIM.metrics),
    "lab.Comparison": lambda: dict(setup=Setup.__new__(Setup), tasks=()),
    "lab.Progress": lambda: dict(claim="adan", done=0, total=1, cached=0, running=(), elapsed=0.0, eta_seconds=None),
    "lab.collect": lambda: dict(claim=CLAIM, store=Store.__new__(Store)),
    "lab.compare": lambda: dict(tasks="task.py", arms="adan"),
    "lab.judge": lambda: dict(claim=CLAIM, trials=[], seeds=[0]),
    "lab.run": lambda: dict(claim=CLAIM, store=Store.__new__(Store)),
    "lab.run_many": lambda: dict(claims=[CLAIM], store=Store.__new__(Store)),
    "lab.verdict": lambda: dict(criteria=[]),
    "lab.pictures.described": lambda: dict(figure=Figure(), text="a line"),
    "lab.pictures.drawn": lambda: dict(claim=CLAIM),
    "lab.pictures.name": lambda: dict(axes=Figure().subplots(), x=0.0, y=0.0, text="here"),
    "teachers.lcsc.Finalist": lambda: dict(coefficients=X, value=1.0, heldout=1.0),
}  # fmt: skip
NEEDS |= {f"core.distances.{n}": lambda: dict(x=X, y=X) for n in (
    "wasserstein_1d", "sliced_wasserstein", "minus_distance", "cubic_kernel", "energy_distance", "mmd",
    "kernel_inception_distance", "frechet_distance",
)}  # fmt: skip
NEEDS |= {f"particles.gflownet.{n}": lambda: built(log_reward=torch.zeros(2)) for n in ("db", "tb", "subtb")}
NEEDS |= {f"particles.gflownet.{n}": lambda: built(energies=torch.zeros(2, 3)) for n in ("fl_db", "fl_subtb")}
NEEDS |= {f"core.distances.{n}": lambda: dict(y=X) for n in ("median_distance", "FrechetDistance")}
NEEDS |= {f"core.elementwise.{n}": lambda: dict(x=X) for n in ("sqrt", "absolute", "sign", "exp", "tanh")}
NEEDS |= {f"core.elementwise.{n}": lambda: dict(x=X, y=X) for n in ("minimum", "maximum")}
NEEDS |= {
    f"core.integrators.{n}": lambda: dict(f=field, x=X, t=0.0, dt=0.1) for n in ("euler", "heun", "midpoint", "rk4")
}
NEEDS |= {f"core.momentum.{n}": lambda: dict(average=X.clone(), value=X, beta=0.9) for n in ("ema", "ema_tree", "ema_")}
NEEDS |= {f"core.momentum.{n}": lambda: dict(velocity=X.clone(), gradient=X, beta=0.9) for n in (
    "heavy_ball", "nesterov", "heavy_ball_tree", "heavy_ball_"
)}  # fmt: skip
NEEDS |= {f"core.particles.{n}": lambda: dict(logw=X) for n in ("ess", "normalize", "resample", "resample_conditional")}
NEEDS |= {f"core.projection.{n}": lambda: dict(u=X, w=X, view="layer") for n in ("radial", "project_out")}
NEEDS |= {f"core.schedules.{n}": lambda: dict(start=1.0, end=0.1, steps=3) for n in ("Linear", "Cosine", "Exponential")}
NEEDS |= {f"optim.{n}": lambda: dict(params=weights()) for n in ("Adan", "AdamP", "Lion", "SPAM")}
NEEDS |= {f"optim.lion.kappa.{n}": lambda: dict(e=0.5) for n in ("DeadZone", "Huber", "Relativistic")}
NEEDS |= {f"generate.{n}": lambda: dict(field=field, x=X, t=0.5) for n in (
    "jacobian_asymmetry", "conservativity_penalty"
)}  # fmt: skip
NEEDS |= {"optim.lion.kappa.Entropic": lambda: dict(a=0.5)}
NEEDS |= {f"optim.lion.kappa.{n}": lambda: dict(u=X) for n in ("polar_svd", "polar_newton_schulz")}
NEEDS |= {f"optim.monna.{n}": lambda: dict(x=X) for n in ("mean", "median", "geometric_median")}
NEEDS |= {f"optim.monna.{n}": lambda: dict(x=X, f=1) for n in ("trimmed_mean", "krum", "multi_krum", "mva", "nnm")}
