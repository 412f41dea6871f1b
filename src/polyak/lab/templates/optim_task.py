"""Handwritten digits, 8 by 8 pixels, by a network with one hidden layer."""

# A task for `polyak compare`: which optimizer trains this best, at an equal budget?
#
#   polyak compare task.py --arms adamw,adan,lion --budget 5m --seeds 5 --open
#
# This file runs as it stands. Put your own data, model, loss and evaluation in their places.

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Data is loaded once per process. Three parts: one to train on, one to choose learning rates by, one to report.
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
train, valid, test = slice(0, 1000), slice(1000, 1400), slice(1400, None)


def task(seed, device):
    # Called for every trial. All that is random must follow from the seed: every arm then starts from the same weights and sees
    # the same batches. Make models, loaders and generators in here, so that nothing is left over for the next trial.
    # (torch, numpy and random are seeded with it already.)
    inputs, targets = x.to(device), y.to(device)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    batches = DataLoader(TensorDataset(inputs[train], targets[train]), batch_size=64, shuffle=True, drop_last=True)

    def loss(model, batch):  # one number, with a gradient
        return F.cross_entropy(model(batch[0]), batch[1])

    def measure(model, part):  # numbers by name; arms are compared by the first. The model is in evaluation mode here
        logits = model(inputs[part])
        right = (logits.argmax(1) == targets[part]).float().mean()
        return {"accuracy": right, "test_loss": F.cross_entropy(logits, targets[part])}

    return {
        "model": model,
        "batches": batches,  # a DataLoader, a list, or an endless iterator
        "loss": loss,
        "evaluate": lambda model: measure(model, test),  # what is reported
        # What is tuned by. Without it that is evaluate, and the report says so.
        "validate": lambda model: measure(model, valid),
        "better": {"accuracy": "higher", "test_loss": "lower"},  # or one word for all
        # "params": lambda model: [{"params": ..., "weight_decay": 0.0}, ...],  # param groups, if one is not enough
        # "schedule": "cosine",  # of the learning rate: "cosine", "linear", "constant", or a function of the budget's used part
    }
