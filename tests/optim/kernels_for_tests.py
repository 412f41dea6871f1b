"""Triton's own compiler reads the kernels that steps would launch, for a GPU that need not be there.

    python kernels_for_tests.py

The interpreter, which runs kernels elsewhere in these tests, knows no types: there a name may be one thing before a branch and
another in it. A process of its own, for there is no way back from the interpreter. What is read here is not made into machine
code, which takes ten times as long: errors of types are found when a kernel's text becomes Triton's operations.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"
from typing import Any

import torch
from systems_for_tests import SYSTEMS
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from polyak.optim._engine import base, dispatch, launch
from polyak.optim.adamp import kernel as adamp_kernel

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int16: "i16",
}  # fmt: skip
backend: Any = make_backend(TARGET)
options = backend.parse_options({})
read = set()


def kind(parameter, value):
    """As what Triton hands an argument to a kernel: an integer that is 1 is a constant."""
    if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    assert isinstance(value, float)
    return "fp32"


class Reader:
    """In place of the launcher."""

    def __call__(self, make, grid, arguments, warps, key):
        kernel = make()
        given = dict(zip((p.name for p in kernel.params), arguments, strict=True))
        signature = {p.name: kind(p, given[p.name]) for p in kernel.params}
        constants = {name: given[name] for name, of in signature.items() if of == "constexpr"}
        known = (kernel.src, tuple(signature.items()), str(constants))
        if known in read:
            return
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        assert source.make_ir(TARGET, options, codegen, modules, context).verify()
        read.add(known)


def steps(make, dtype, case):
    """Three steps; apart: tensors have counts of their own. groups: and numbers."""
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((40, 30), (7,))]
    optimizer = make([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)] if case["groups"] else params)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = None if case["apart"] and (t + i) % 2 else torch.randn_like(p)
        if case["scaled"]:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        optimizer.step()


def main():
    launch.Launcher = adamp_kernel.Launcher = Reader
    base.available = dispatch.available = lambda device: True
    torch.manual_seed(0)
    cases = [
        dict(apart=False, groups=False, capturable=False, scaled=False),
        dict(apart=True, groups=False, capturable=False, scaled=False),
        dict(apart=False, groups=False, capturable=True, scaled=True),
        dict(apart=True, groups=True, capturable=True, scaled=False),
    ]
    kinds = [
        (torch.float32, "nearest"),
        (torch.float64, "nearest"),
        (torch.bfloat16, "kahan"),
        (torch.bfloat16, "stochastic"),
    ]
    for name in ("adan-clip", "lion-entropic", "lion-l2-group", "adamp", "sgdp", "spam", "spam-sparse"):
        for dtype, rounding in kinds:
            # In every type the simplest case, and all at once; each by itself in one.
            several = cases if dtype == torch.float32 else [cases[0], cases[3]]
            for case in several[: 1 if rounding == "kahan" else None]:
                made = dict(fused=True, capturable=case["capturable"], rounding=rounding)
                if name != "spam-sparse" or not (case["groups"] or rounding == "kahan"):  # these it does not have
                    steps(lambda p, name=name, made=made: SYSTEMS[name](p, **made), dtype, case)
    print(len(read))


if __name__ == "__main__":
    main()
