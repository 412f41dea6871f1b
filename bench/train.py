"""The small image models of ``polyak train``: how long training takes, and what their samples are worth.

    python bench/train.py [--data digits|mnist] [--networks unet,dit] [--processes vp,edm,flow,pfgmpp] [--width 32] [--steps 1500]
                          [--batch 64] [--lr 2e-3] [--device cpu|cuda] [--seconds 300] [--picture FILE]

One model for each process and network. Of samples with a class asked for (guidance 2, 20 steps), a classifier that was trained on
the real images says how many are of that class; the energy distance between the classifier's features of samples and of real
images, of equal classes, is given in units of what two halves of the real images have. Neither is a number of any paper's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from polyak.claims import _images
from polyak.core.distances import energy_distance
from polyak.generate import CFG, DPMSolver, Heun, sample
from polyak.generate.networks import image_denoiser

STEPS = 20


def classifier(x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Module]:
    """Features, and the classes' logits of them."""
    pooled = x.shape[-1] // 4
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * pooled**2, 64), nn.ReLU(),
    ).to(x.device)  # fmt: skip
    head = nn.Linear(64, 10).to(x.device)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-3)
    generator = torch.Generator(x.device).manual_seed(0)
    for _ in range(600):
        rows = torch.randint(len(x), (128,), generator=generator, device=x.device)
        loss = nn.functional.cross_entropy(head(features(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return features.eval(), head.eval()


@torch.no_grad()
def judged(network: Any, recipe: _images.Recipe, x: Tensor, y: Tensor, judge: Any, count: int) -> dict[str, Any]:
    features, head = judge
    process, prediction, sigma_data = recipe.noise
    generator = torch.Generator(x.device).manual_seed(1)
    solver = DPMSolver(order=2, form="data", method="multistep") if recipe.process != "pfgmpp" else Heun()
    grid = "time" if recipe.process == "flow" else None
    made, classes = [], []
    for label in range(10):
        denoiser = image_denoiser(network, process, prediction, label=label, sigma_data=sigma_data)
        start = process.prior((count // 10, *x.shape[1:]), generator=generator, device=x.device)
        made.append(sample(denoiser, start.float(), solver=solver, steps=STEPS, guidance=CFG(2.0), grid=grid))
        classes.append(torch.full((count // 10,), label, device=x.device))
    samples, asked = torch.cat(made).clamp(-1, 1), torch.cat(classes)
    real = features(x[len(x) // 2 :][:count])
    right = (head(features(samples)).argmax(1) == asked).double().mean().item()
    return {"right": right, "distance": energy_distance(features(samples), real), "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits", choices=_images.DATA)
    parser.add_argument("--networks", default="unet,dit")
    parser.add_argument("--processes", default=",".join(_images.PROCESSES))
    for name, value in {"width": 32, "steps": 1500, "batch": 64, "count": 500}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="no further model is begun after so long")
    parser.add_argument("--picture")
    given = parser.parse_args()
    x, y = _images.images(given.data, given.device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    x, y = x[order], y[order]
    judge = classifier(x, y)
    with torch.no_grad():
        known = (judge[1](judge[0](x)).argmax(1) == y).double().mean().item()
        a, b = (judge[0](half[: given.count]) for half in (x[: len(x) // 2], x[len(x) // 2 :]))
    device = torch.cuda.get_device_name() if given.device != "cpu" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{device}, torch {torch.__version__}; {given.data}, batches of {given.batch}, {given.steps} steps")
    print(
        f"The classifier knows {known:.3f} of the real images, two sets of which are at a distance of {energy_distance(a, b):.4f}\n"
    )
    print("| network | process | weights | seconds | ms a step | of the class asked for | distance |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    begun, rows = time.perf_counter(), []
    for process in given.processes.split(","):
        for network in given.networks.split(","):
            if time.perf_counter() - begun > given.seconds:
                continue
            recipe = _images.Recipe(given.data, network, process, given.width, given.steps, given.batch, given.lr)
            since = time.perf_counter()
            trained = _images.train(recipe, given.device)
            if given.device != "cpu":
                torch.cuda.synchronize()
            took = time.perf_counter() - since
            found = judged(trained, recipe, x, y, judge, given.count)
            rows.append(found["samples"].view(10, -1, *x.shape[1:])[:, :2].flatten(0, 1))
            weights = sum(p.numel() for p in trained.parameters())
            cells = f"{weights / 1e6:.2f} M | {took:.0f} | {1e3 * took / given.steps:.1f}"
            print(f"| {network} | {process} | {cells} | {found['right']:.3f} | {found['distance']:.4f} |", flush=True)
    if given.picture:
        import matplotlib.pyplot as plt

        grid = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows])
        plt.imsave(given.picture, grid.cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)


if __name__ == "__main__":
    main()
