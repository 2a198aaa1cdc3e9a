"""Compiles what the launchers of the Triton kernels launch, for GPUs that need not be present.

Run as a script, without TRITON_INTERPRET: `python aot_compile.py` prints a table and what is wrong; with `--json`, a
line per kernel and target. The launchers run on CPU tensors, and where they launch a kernel, Triton's JIT compiles it
for the target instead: block sizes, constants and alignment are those of a real call.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from crvq_kernels.gpu import gemv as gemv_module
from crvq_kernels.gpu.code_search import choose_codes_
from crvq_kernels.gpu.dequant import dequantize_weight
from crvq_kernels.gpu.gemm import gemm
from crvq_kernels.gpu.gemv import gemv
from crvq_kernels.gpu.reorder import reorder
from crvq_kernels.gpu.rows import rows_gemm
from crvq_kernels.gpu.tuning import GemvBlocks
from crvq_kernels.hopper.tuning import WgmmaBlocks, wgmma_blocks
from crvq_kernels.hopper.wgmma import wgmma
from crvq_kernels.packing import num_virtual_groups, tiled_size
from machine_code import problems, read_amdgcn, read_sass, table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FP16, BF16, FP32, INT8 = torch.float16, torch.bfloat16, torch.float32, torch.int8


def layer(in_group_size=8, nbits=8, out_features=4096, in_features=4096, dtype=FP16):
    """Returns the leading arguments of `dequantize_weight`, uninitialised, with three extended codebooks."""
    num_critical_groups = in_features // in_group_size // 50
    num_codes = num_virtual_groups(in_features, in_group_size, 4, num_critical_groups)
    return (
        torch.empty(tiled_size(out_features, num_codes, nbits), dtype=torch.uint8),
        torch.empty(4, 2**nbits, in_group_size, dtype=dtype),
        torch.empty(out_features, dtype=dtype if dtype.is_floating_point else FP16),
        torch.empty(in_features, dtype=torch.int16),
        nbits,
        num_critical_groups,
    )


def linear_args(num_tokens, x_dtype, *layer_args, **more_layer_args):
    """Returns the arguments of `gemv` and `gemm`, with bias."""
    tiles, codebooks, scales, order, nbits, num_critical_groups = layer(*layer_args, **more_layer_args)
    x = torch.empty(num_tokens, order.numel(), dtype=x_dtype)
    return x, tiles, codebooks, scales, order, torch.empty_like(scales), nbits, num_critical_groups


def head_args(num_tokens, dtype, rows=128256, channels=4096):
    """Returns the arguments of `rows_gemm`."""
    return (
        torch.empty(num_tokens, channels, dtype=dtype),
        torch.empty(rows, channels, dtype=torch.int8),
        torch.empty(rows, dtype=dtype),
    )


def search_args(in_group_size=8, size=256, columns=64, num_rows=4096, num_codebooks=2):
    """Returns the arguments of `choose_codes_`, uninitialised, of a layer with as many channels as rows."""
    groups, all_groups = columns // in_group_size, num_rows // in_group_size
    return (
        torch.empty(num_rows, columns),
        torch.empty(all_groups + 20 * (num_codebooks - 1), num_rows, dtype=torch.int64),
        torch.empty(num_codebooks, size, in_group_size),
        torch.empty(groups, num_codebooks, size),
        torch.empty(columns, columns),
        0,
        all_groups,
        20,
    )


CASES = {
    "M=1 fp16 d8 e8": lambda: gemv(*linear_args(1, FP16)),
    "M=1 bf16 d4 e8, small": lambda: gemv(*linear_args(1, BF16, 4, out_features=576, in_features=576, dtype=BF16)),
    "M=1 bf16 d8 e8": lambda: gemv(*linear_args(1, BF16)),
    "M=1 bf16 d16 e8": lambda: gemv(*linear_args(1, BF16, 16)),
    "M=1 fp32 d8 e8": lambda: gemv(*linear_args(1, FP32)),
    "M=1 fp16 d8 e8 int8": lambda: gemv(*linear_args(1, FP16, dtype=INT8)),
    "M=4 fp16 d8 e8 int8": lambda: gemm(*linear_args(4, FP16, dtype=INT8)),
    "fp16 d8 e8 int8": lambda: dequantize_weight(*layer(dtype=INT8), FP16, permuted=True),
    "M=4 fp16 d8 e8": lambda: gemm(*linear_args(4, FP16)),
    "M=64 fp16 d8 e8, large": lambda: gemm(*linear_args(64, FP16, out_features=16384)),
    "M=64 fp16 d16 e8, large": lambda: gemm(*linear_args(64, FP16, 16, out_features=16384)),
    "M=8 fp16 d8 e8, large": lambda: gemm(*linear_args(8, FP16, out_features=16384)),
    "M=4 fp16 d8 e10": lambda: gemm(*linear_args(4, FP16, 8, 10)),
    "M=40 bf16 d16 e12": lambda: gemm(*linear_args(40, BF16, 16, 12)),
    "M=16 fp32 d4 e8": lambda: gemm(*linear_args(16, FP32, 4)),
    "fp16 K=28672": lambda: reorder(torch.empty(9, 28672, dtype=FP16), torch.empty(28672, dtype=torch.int16)),
    "fp32 K=576": lambda: reorder(torch.empty(9, 576), torch.empty(576, dtype=torch.int16)),
    "M=1 fp16 head": lambda: rows_gemm(*head_args(1, FP16)),
    "M=64 bf16 head": lambda: rows_gemm(*head_args(64, BF16)),
    "M=200 fp16 head": lambda: rows_gemm(*head_args(200, FP16)),
    "M=3 fp32 head": lambda: rows_gemm(*head_args(3, FP32)),
    "search d8 e8": lambda: choose_codes_(*search_args()),
    "search d16 e12": lambda: choose_codes_(*search_args(16, 4096)),
    "fp16 d8 e8": lambda: dequantize_weight(*layer(), FP16, permuted=True),
    "bf16 d16 e12": lambda: dequantize_weight(*layer(16, 12), BF16, permuted=True),
    "fp32 d4 e10, original order": lambda: dequantize_weight(*layer(4, 10), FP32, permuted=False),
}


# Of the kernel that is written for an instruction of sm_90.
WGMMA_CASES = {
    f"M={tokens} fp16 d8 e8{' int8' * (dtype == INT8)}": lambda tokens=tokens, dtype=dtype: wgmma(
        *linear_args(tokens, FP16, dtype=dtype), blocks=wgmma_blocks(tokens, 4096, 544, 132, True)[0]
    )
    for tokens, dtype in ((32, INT8), (64, INT8), (64, FP16), (128, INT8))
} | {
    "M=256 bf16 d8 e8 int8": lambda: wgmma(
        *linear_args(256, BF16, dtype=INT8), blocks=WgmmaBlocks(128, 256, 8, 2, 3, splits=1)
    ),
    "M=128 fp16 d8 e8 int8, 128 rows of 4 warps": lambda: wgmma(
        *linear_args(128, FP16, dtype=INT8), blocks=WgmmaBlocks(128, 128, 4, 2, 3, splits=2)
    ),
}


@triton.jit
def gather_kernel(codes_ptr, table_ptr, y_ptr, CODES: tl.constexpr, SIZE: tl.constexpr):
    """Looks codes up by a 2-D `tl.gather`, which Triton makes of shuffles."""
    group = tl.arange(0, 16)
    entries = tl.load(table_ptr + group[:, None] * CODES + tl.arange(0, CODES)[None, :])
    total = tl.zeros([16, SIZE], dtype=tl.float32)
    for _ in range(0, 64):
        codes = tl.load(codes_ptr + group[:, None] * SIZE + tl.arange(0, SIZE)[None, :])
        total += tl.gather(entries, codes.to(tl.int32), axis=1)
        codes_ptr += 16 * SIZE
    tl.store(y_ptr + tl.arange(0, SIZE), tl.sum(total, axis=0))


@triton.jit
def pipelined_kernel(x_ptr, codes_ptr, codebook_ptr, y_ptr):
    """Multiplies gathered codebook rows of 8; with several stages Triton makes asynchronous copies of the gather."""
    row = tl.arange(0, 64)
    channel = tl.arange(0, 64)
    total = tl.zeros([64, 64], dtype=tl.float32)
    for start in range(0, 4096, 64):
        codes = tl.load(codes_ptr + row[:, None] * 512 + (start + channel)[None, :] // 8).to(tl.int32)
        weight = tl.load(codebook_ptr + codes * 8 + channel[None, :] % 8)
        x = tl.load(x_ptr + row[:, None] * 4096 + (start + channel)[None, :])
        total += tl.dot(x, tl.trans(weight))
    tl.store(y_ptr + row[:, None] * 64 + row[None, :], total)


def unaligned_gemv():
    x, tiles, *rest = linear_args(1, FP16)
    gemv(x, torch.cat([tiles, tiles[:4]])[4:], *rest)


def crowded_gemv():
    blocks, gemv_module.gemv_blocks = gemv_module.gemv_blocks, lambda *args: GemvBlocks(1024, 1, 17, 16)
    try:
        gemv(*linear_args(1, FP16))
    finally:
        gemv_module.gemv_blocks = blocks


def bytes_and_floats(*shape):
    return torch.empty(shape, dtype=torch.uint8), torch.empty(shape, dtype=FP16), torch.empty(shape)


# Mistakes that the kernels must not make, to prove that `problems` sees them.
MISTAKES = {
    "2-D gather": lambda: gather_kernel[(1,)](*bytes_and_floats(64), CODES=256, SIZE=256),
    "3 stages": lambda: pipelined_kernel[(1,)](torch.empty(64, dtype=FP16), *bytes_and_floats(64), num_stages=3),
    "unaligned codes": unaligned_gemv,
    "1024 sums": crowded_gemv,
    "1 stage of wgmma": lambda: wgmma(
        *linear_args(64, FP16, dtype=INT8), blocks=WgmmaBlocks(64, 64, 4, 2, stages=1, splits=2)
    ),
}


class Driver:
    """Stands in for a GPU's driver: names the target, and has nothing to launch on."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self):
        return TARGETS[self.name]

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling_for(name: str):
    """Within, a launch compiles for the target `name`; yields the list of `(kernel name, compiled kernel)`."""
    compiled, launch, hip = [], JITFunction.run, torch.version.hip

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(Driver(name))
    JITFunction.run = compile_only
    torch.version.hip = "0" if TARGETS[name].backend == "hip" else None
    try:
        yield compiled
    finally:
        JITFunction.run, torch.version.hip = launch, hip


def machine_code(compiled, target: str) -> dict:
    if TARGETS[target].backend == "hip":
        return read_amdgcn(compiled.asm["amdgcn"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        sass, usage = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return read_sass(sass, usage)


def compile_cases(cases: dict, targets: list[str]):
    """Yields one row per case, kernel it launches and target; a kernel compiled for an earlier case is left out."""
    seen = set()
    for target in targets:
        for case, launch in cases.items():
            with compiling_for(target) as compiled:
                launch()
            for kernel, result in compiled:
                if result.hash in seen:
                    continue
                seen.add(result.hash)
                row = {"target": target, "case": case, "kernel": kernel, "mistake": case in MISTAKES}
                yield row | {"shared_bytes": result.metadata.shared} | machine_code(result, target)


def main() -> int:
    targets = [target for target in TARGETS if target in sys.argv] or list(TARGETS)
    results = [*compile_cases(CASES, targets)]
    if "sm_90" in targets:
        results += [*compile_cases(WGMMA_CASES, ["sm_90"]), *compile_cases(MISTAKES, ["sm_90"])]
    if "--json" in sys.argv:
        for row in results:
            print(json.dumps(row))
        return 0
    print(table(results))
    for row in results:
        for problem in problems(row):
            print(f"{row['target']}, {row['case']}, {row['kernel']}: {problem}")
    return int(any(problems(row) for row in results if not row["mistake"]))


if __name__ == "__main__":
    sys.exit(main())
