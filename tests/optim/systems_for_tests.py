"""Every optimizer of the engine, for tests that drive all of them alike."""

from polyak.optim import SGDP, SPAM, AdamP, Adan, Lion, LionK
from polyak.optim.lion import kappa

QUICK = dict(reset_interval=3, warmup_steps=2, grace=1, threshold=2.0)  # several resets in a short run


def sparse_spam(params, **options):
    """Half of the moments in real matrices, all of them elsewhere; the groups in this order, so that a list has one more."""
    params = list(params)
    matrices = [p for p in params if p.dim() == 2 and p.is_floating_point()]
    groups = [
        {"params": matrices, "density": 0.5},
        {"params": [p for p in params if all(p is not m for m in matrices)]},
    ]
    return SPAM(groups, **{"lr": 0.01, "weight_decay": 0.1, **QUICK, **options})


SYSTEMS = {
    "adan": lambda p, **o: Adan(p, **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "adan-clip": lambda p, **o: Adan(p, **{"lr": 0.01, "max_grad_norm": 0.5, **o}),
    "adan-no-prox": lambda p, **o: Adan(p, **{"lr": 0.01, "weight_decay": 0.1, "no_prox": True, "maximize": True, **o}),
    "lion": lambda p, **o: Lion(p, **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-cautious": lambda p, **o: Lion(p, **{"lr": 0.01, "cautious": True, **o}),
    "lion-huber": lambda p, **o: LionK(p, kappa.Huber(0.3), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-dead-zone": lambda p, **o: LionK(p, kappa.DeadZone(0.2), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-entropic": lambda p, **o: LionK(p, kappa.Entropic(2.0), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-relativistic": lambda p, **o: LionK(p, kappa.Relativistic(0.2), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-l2-group": lambda p, **o: LionK(p, kappa.L2("group"), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-l2-all": lambda p, **o: LionK(p, kappa.L2("all"), **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "lion-l2-tensor": lambda p, **o: LionK(p, "l2", **{"lr": 0.01, "weight_decay": 0.1, **o}),
    "adamp": lambda p, **o: AdamP(p, **{"lr": 0.01, "weight_decay": 0.1, "delta": 1.0, **o}),
    "adamp-never": lambda p, **o: AdamP(
        [{"params": p, "projection": "never"}], **{"lr": 0.01, "weight_decay": 0.1, **o}
    ),
    "sgdp": lambda p, **o: SGDP(p, **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "delta": 1.0, **o}),
    "spam": lambda p, **o: SPAM(p, **{"lr": 0.01, "weight_decay": 0.1, **QUICK, **o}),
    "spam-sparse": sparse_spam,
}

# One of each way through the engine: the others are rules that go the same ways.
THOROUGH = ("adan-clip", "lion", "lion-l2-group", "lion-l2-tensor", "adamp", "sgdp", "spam", "spam-sparse")
# One of each kind of launch on a GPU, whose interpreter takes ten times as long as the other backends.
LAUNCHED = ("adan-clip", "lion", "lion-l2-group", "adamp", "spam")

# The classes with nothing but what they must be given.
CLASSES = {
    "Adan": Adan,
    "Lion": Lion,
    "LionK": lambda p, **o: LionK(p, kappa.Huber(0.3), **o),
    "AdamP": AdamP,
    "SGDP": lambda p, **o: SGDP(p, **{"lr": 0.1, "momentum": 0.9, **o}),
    "SPAM": SPAM,
}
