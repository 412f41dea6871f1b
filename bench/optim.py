"""Time of one ``step()`` of polyak's optimizers and of their peers, over the time that its memory traffic must take.

    python bench/optim.py                      # the CPU, and the GPU where there is one
    python bench/optim.py --device cuda --models resnet50 gpt2 1b
    python bench/optim.py --device cuda --models resnet50 --short     # polyak's own and torch's fused AdamW, in a minute
    python bench/optim.py --only "polyak SPAM" --profile      # and where a step's time on the GPU goes
    python bench/optim.py --host                              # the host's own time, on the CPU with small tensors

All in one run on one machine: first the machine's own copy bandwidth, then every optimizer on the same parameters. The floor
is the words that a step must read and write (4 bytes each) over that bandwidth. Steps are timed back to back: on the GPU
between two events, on the CPU by the clock; the median of the repetitions counts. Peers that are not installed are left out.
The host's time on a GPU is that until step() returns, with nothing queued before: the median of 50.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import polyak
from polyak.optim import SGDP, SPAM, AdamP, Adan, Lion

# Read p, g and the state, write p and the state. The ratio of sparse SPAM is to the dense step's traffic.
WORDS = {"Adan": 11, "Lion": 5, "AdamW": 7, "AdamP": 7, "SGDP": 5, "SPAM": 7}


def resnet50() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50 (25.6 M)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convs.append((4 * width, inside, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 (124 M)."""
    d = 768
    layer = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(layer * 12), (d,), (d,)]


def one_billion() -> list[tuple[int, ...]]:
    """A language model of 1.1 B parameters in 122 tensors."""
    d = 2048
    layer = [(d,), (3 * d, d), (d, d), (d,), (4 * d, d), (d, 4 * d)]
    return [(50257, d), *(layer * 20), (d,)]


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {"resnet50": resnet50, "gpt2": gpt2, "1b": one_billion}


@dataclass
class Row:
    model: str
    optimizer: str
    method: str
    ms: float
    floor_ms: float
    host_ms: float
    state_bytes: float  # per parameter
    peak_mb: float  # memory beyond parameters, gradients and state while steps run; 0 where it is not known

    @property
    def ratio(self) -> float:
        return self.ms / self.floor_ms


def ours(capturable: bool) -> dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]]:
    """Name -> (method, constructor) of polyak's optimizers."""
    more: dict[str, Any] = {"capturable": True} if capturable else {}
    return {
        "Adan": ("Adan", lambda p: Adan(p, lr=1e-3, weight_decay=0.02, **more)),
        "Adan, clipped": ("Adan", lambda p: Adan(p, lr=1e-3, weight_decay=0.02, max_grad_norm=1.0, **more)),
        "Lion": ("Lion", lambda p: Lion(p, lr=1e-4, weight_decay=0.1, **more)),
        "AdamP": ("AdamP", lambda p: AdamP(p, lr=1e-3, weight_decay=0.02, **more)),
        "AdamP, all projected": ("AdamP", lambda p: AdamP(p, lr=1e-3, delta=1e9, weight_decay=0.02, **more)),
        "SGDP": ("SGDP", lambda p: SGDP(p, lr=1e-2, momentum=0.9, weight_decay=1e-4, **more)),
        "SPAM": ("SPAM", lambda p: SPAM(p, lr=1e-3, weight_decay=0.02, **more)),
        "SPAM, a quarter of the moments": ("SPAM", lambda p: SPAM(sparse(p), lr=1e-3, weight_decay=0.02, **more)),
    }


def sparse(params: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Sparse momentum for all matrices but the first, which is the embedding or a convolution."""
    matrices = [p for p in params[1:] if p.dim() == 2]
    rest = [p for p in params if all(p is not m for m in matrices)]
    return [{"params": matrices, "density": 0.25}, {"params": rest}]


def contenders(device: str) -> list[tuple[str, str, Callable[[Any], torch.optim.Optimizer]]]:
    """(name, method, constructor): ours first, then the peers."""
    gpu = device == "cuda"
    found: list[tuple[str, str, Callable[[Any], torch.optim.Optimizer]]] = [
        *((f"polyak {name}", method, make) for name, (method, make) in ours(False).items()),
        ("torch AdamW foreach", "AdamW", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("torch AdamW fused", "AdamW", lambda p: torch.optim.AdamW(p, fused=True)),
    ]
    peers = [
        ("pytorch_optimizer", "Adan", "Adan", {}), ("pytorch_optimizer", "Lion", "Lion", {}),
        ("pytorch_optimizer", "AdamP", "AdamP", {}), ("pytorch_optimizer", "SGDP", "SGDP", {"momentum": 0.9}),
        ("pytorch_optimizer", "SPAM", "SPAM", {}),
        ("optimi", "Adan", "Adan", {"foreach": True}), ("optimi", "Adan", "Adan", {"triton": True}),
        ("optimi", "Lion", "Lion", {"foreach": True}), ("optimi", "Lion", "Lion", {"triton": True}),
        ("timm.optim", "Adan", "Adan", {}), ("timm.optim", "Lion", "Lion", {}),
        ("timm.optim", "AdamP", "AdamP", {}), ("timm.optim", "SGDP", "SGDP", {"momentum": 0.9}),
        ("adamp", "AdamP", "AdamP", {}), ("adamp", "SGDP", "SGDP", {"momentum": 0.9}),
        ("heavyball", "AdamW", "AdamW", {"consume_grad": False}),
    ]  # fmt: skip
    for module, name, method, options in peers:
        try:
            make = getattr(importlib.import_module(module), name)
        except Exception:  # a peer that cannot be imported here, for whatever reason of its own
            continue
        if options.get("triton") and not gpu:
            continue
        label = " ".join([module.removesuffix(".optim"), name, *(o for o in options if o in ("foreach", "triton"))])
        found.append((label, method, lambda p, make=make, options=options: make(p, lr=1e-3, **options)))
    return found


def tensors(nested: Any) -> list[torch.Tensor]:
    """All tensors in dictionaries and lists inside each other."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    inside = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, (list, tuple)) else ()
    return [t for value in inside for t in tensors(value)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def elapsed_ms(run: Callable[[], Any], device: str, times: int, repeats: int) -> float:
    """Median over ``repeats`` of the mean time of ``times`` calls back to back."""
    samples = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(times):
                run()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / times)
        else:
            begin = time.perf_counter()
            for _ in range(times):
                run()
            samples.append((time.perf_counter() - begin) / times * 1e3)
    return statistics.median(samples)


def returned_ms(run: Callable[[], Any]) -> float:
    """Until a call returns, with nothing queued on the GPU before it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def bandwidth(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    n = 2**29 if device == "cuda" else 2**26
    a, b = torch.rand(n, device=device), torch.rand(n, device=device)
    b.copy_(a)
    return 2 * 4 * n / (elapsed_ms(lambda: b.copy_(a), device, 10, 5) / 1e3)


def bench(model: str, device: str, speed: float, label: str, method: str, make: Callable[[Any], Any]) -> Row:
    generator = torch.Generator(device=device).manual_seed(0)
    params = [torch.randn(s, device=device, generator=generator).requires_grad_() for s in MODELS[model]()]
    for p in params:
        p.grad = torch.randn(p.shape, device=device, generator=generator)
    count = sum(p.numel() for p in params)
    optimizer = make(params)
    for _ in range(4):
        optimizer.step()
    synchronize(device)
    fast = device == "cuda"
    times = (50 if count < 3e7 else 20 if count < 3e8 else 8) if fast else 3
    if fast:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    ms = elapsed_ms(optimizer.step, device, times, 5 if fast else 3)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if fast else 0.0
    host = statistics.median(returned_ms(optimizer.step) for _ in range(50)) if fast else 0.0
    state = sum(t.numel() * t.element_size() for t in tensors(optimizer.state) if t.dim())
    return Row(model, label, method, ms, WORDS[method] * 4 * count / speed * 1e3, host, state / count, peak)


def graph_replay(model: str, speed: float, name: str) -> Row:
    """One of polyak's optimizers in a captured CUDA graph."""
    method, make = ours(True)[name]
    params = [torch.randn(s, device="cuda").requires_grad_() for s in MODELS[model]()]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    ms = elapsed_ms(graph.replay, "cuda", 20, 5)
    count = sum(p.numel() for p in params)
    return Row(
        model, f"polyak {name}, graph replay", method, ms, WORDS[method] * 4 * count / speed * 1e3, 0.0, 0.0, 0.0
    )


def profile(model: str, name: str) -> str:
    """Microseconds a step of each kernel of one of polyak's optimizers, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    params = [torch.randn(s, device="cuda").requires_grad_() for s in MODELS[model]()]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = ours(False)[name][1](params)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            optimizer.step()
        torch.cuda.synchronize()
    kernels = sorted((e for e in seen.key_averages() if e.device_time_total > 0), key=lambda e: -e.device_time_total)
    return ", ".join(f"{e.key[:24]} {e.device_time_total / 10:.1f} (x{e.count / 10:g})" for e in kernels[:8])


def host_table() -> str:
    """Milliseconds of one thread's own time a step takes for 161 tensors of 64 elements, in the cases that people have."""
    torch.set_num_threads(1)
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        **{
            f"polyak {name}": make
            for name, (_, make) in ours(False).items()
            if "quarter" not in name and "all" not in name
        },
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    }
    lines = [
        "| 161 tensors, ms | one group | a group a tensor | and a schedule | half of the gradients |",
        "| --- |" + " ---: |" * 4,
    ]
    for name, make in makers.items():
        params = [torch.randn(8, 8).requires_grad_() for _ in range(161)]
        for p in params:
            p.grad = torch.randn_like(p)
        grads = [p.grad for p in params]
        one, some = make(params), make(params)
        many = make([{"params": [p]} for p in params])

        def scheduled(many: torch.optim.Optimizer = many) -> None:
            for group in many.param_groups:
                group["lr"] *= 0.999
            many.step()

        def experts(some: Any = some, params: Any = params, grads: Any = grads) -> None:
            for p, g in zip(params, grads, strict=True):
                p.grad = g if random.random() < 0.5 else None
            some.step()

        found = [thread_ms(run) for run in (one.step, many.step, scheduled, experts)]
        lines.append(f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in found) + " |")
    return "\n".join(lines)


def thread_ms(run: Callable[[], Any]) -> float:
    """Least mean of this thread's time over 50 calls."""
    for _ in range(20):
        run()
    samples = []
    for _ in range(9):
        begin = time.thread_time()
        for _ in range(50):
            run()
        samples.append((time.thread_time() - begin) / 50 * 1e3)
    return min(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all")
    parser.add_argument(
        "--models", nargs="*", choices=tuple(MODELS), help="default: all on the GPU, resnet50 and gpt2 on the CPU"
    )
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    parser.add_argument("--without", default="", help="no optimizers whose name contains this")
    parser.add_argument("--short", action="store_true", help="polyak's own and torch's fused AdamW, without graphs")
    parser.add_argument("--host", action="store_true", help="only the host's own time with small tensors, on the CPU")
    parser.add_argument("--profile", action="store_true", help="also the GPU time of each of polyak's kernels")
    parser.add_argument("--json", default="", help="also write the rows to this file")
    args = parser.parse_args()
    if args.host:
        print(f"torch {torch.__version__}; polyak {polyak.__version__}\n\n{host_table()}")
        return
    devices = [d for d in ("cpu", "cuda") if args.device in (d, "all") and (d == "cpu" or torch.cuda.is_available())]
    rows: list[Row] = []
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        speed = bandwidth(device)
        print(
            f"\n{name}; torch {torch.__version__}; polyak {polyak.__version__}; copies at {speed / 1e9:.0f} GB/s",
            flush=True,
        )
        for model in args.models or (list(MODELS) if device == "cuda" else ["resnet50", "gpt2"]):
            print(
                f"\n| {model} | ms a step | over the floor | host ms | state bytes a parameter | peak MB |\n| --- |{' ---: |' * 5}"
            )
            for label, method, make in contenders(device):
                if args.only not in label or (args.without and args.without in label):
                    continue
                if args.short and not label.startswith("polyak") and label != "torch AdamW fused":
                    continue
                try:
                    row = bench(model, device, speed, label, method, make)
                except Exception as error:  # a peer's failure is shown, and is no reason to stop
                    print(f"| {label} | failed: {type(error).__name__}: {str(error)[:80]} | | | | |", flush=True)
                    continue
                finally:
                    if device == "cuda":
                        torch.cuda.empty_cache()
                rows.append(row)
                peak = f"{row.peak_mb:.0f}" if device == "cuda" else ""
                print(
                    f"| {label} | {row.ms:.3f} | {row.ratio:.2f} | {row.host_ms:.3f} | {row.state_bytes:.1f} | {peak} |",
                    flush=True,
                )
            for name in ours(True) if device == "cuda" and not args.short else ():
                label = f"polyak {name}, graph replay"
                if args.only not in label or (args.without and args.without in label):
                    continue
                try:
                    row = graph_replay(model, speed, name)
                finally:
                    torch.cuda.empty_cache()
                rows.append(row)
                print(f"| {row.optimizer} | {row.ms:.3f} | {row.ratio:.2f} | | | |", flush=True)
            for name in ours(False) if device == "cuda" and args.profile else ():
                if args.only in f"polyak {name}":
                    print(f"profile of {name}, us a step: {profile(model, name)}", flush=True)
                    torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
