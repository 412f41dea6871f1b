"""Compiles the kernels that steps would launch, for a GPU that need not be there: ``python kernels_for_tests.py``.

The interpreter, which runs kernels elsewhere in these tests, knows no types. A process of its own: there is no way back from it.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from systems_for_tests import SYSTEMS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polyak.optim._engine import kernel, launch
from polyak.optim.adamp import kernel as adamp_kernel

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int16: "i16",
}  # fmt: skip
compiled = set()


def kind(value):
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    return {int: "i32", float: "fp32"}.get(type(value), "constexpr")


class Compiler:
    """In place of the launcher."""

    def __call__(self, function, grid, arguments, warps, key=None):
        signature, constants = {}, {}
        for p, value in zip(function.params, arguments, strict=True):
            signature[p.name] = "constexpr" if p.is_constexpr else kind(value)
            if signature[p.name] == "constexpr":
                constants[p.name] = value
        known = (function.src, tuple(signature.items()), tuple(map(str, constants.values())))
        if known not in compiled:
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            assert "ptx" in triton.compile(source, target=TARGET, options={"num_warps": warps}).asm
            compiled.add(known)


def main():
    launch.Launcher = adamp_kernel.Launcher = Compiler
    kernel.available = lambda device: True
    for name in ("adan-clip", "lion-entropic", "lion-l2-group", "adamp", "sgdp", "spam", "spam-sparse"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for apart, capturable, scaled in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1)):
                params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((40, 30), (7,))]
                optimizer = SYSTEMS[name](params, fused=True, capturable=bool(capturable))
                for t in range(3):
                    for i, p in enumerate(params):
                        p.grad = None if apart and (t + i) % 2 else torch.randn_like(p)
                    if scaled:
                        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
                    optimizer.step()
    print(len(compiled))


if __name__ == "__main__":
    main()
