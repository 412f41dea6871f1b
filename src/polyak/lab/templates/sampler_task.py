"""Eight Gaussians on a circle, whose exact denoiser is known."""

# A task for `polyak compare`: which sampler gives the best samples, at an equal number of evaluations?
#
#   polyak compare task.py --arms ddim,dpmsolver,heun --budget 20nfe --seeds 5 --open
#
# This file runs as it stands. Put your own denoiser and metric in their places, or return a diffusers pipeline:
#
#   return {"pipeline": pipe.to(device), "call": {"prompt": "..."}, "metric": lambda images: ..., "better": "higher"}

import torch

from polyak.generate import VP
from polyak.generate.problems import ExactDenoiser, ring, sliced_wasserstein

COUNT = 2000  # samples of a trial


def task(seed, device):
    # Called for every trial. Every arm starts from the same noise for one seed; what is random in here must follow from the seed.
    law = ring(8)
    generator = torch.Generator().manual_seed(seed)
    truth = law.sample(COUNT, generator=generator)

    def metric(samples):  # a number, or numbers by name; arms are compared by the first
        directions = torch.Generator().manual_seed(0)
        return {"distance": sliced_wasserstein(samples.cpu(), truth, generator=directions)}

    return {
        "denoiser": ExactDenoiser(law, VP()),  # for a network: polyak.generate.Denoiser(network, process)
        "shape": (COUNT, 2),
        "dtype": torch.float64,
        "metric": metric,
        "better": "lower",
    }
