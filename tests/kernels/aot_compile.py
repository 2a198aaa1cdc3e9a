"""Compiles every Triton kernel for GPUs that need not be present, and prints one JSON line per kernel and target.

Run as a script, without TRITON_INTERPRET: `python aot_compile.py`. `test_aot.py` does.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from crvq_kernels.dequant import dequantize_kernel
from crvq_kernels.gemv import gemv_kernel
from crvq_kernels.packing import code_span
from crvq_kernels.tuning import NUM_STAGES, dequantize_blocks, gemv_blocks
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LAYER_TYPES = {"codes": "u8", "codebooks": "fp16", "scales": "fp16", "order": "i16"}
# in_group_size, nbits, tokens, dtype of x
GEMV_CASES = [(8, 8, 1, "fp16"), (8, 8, 8, "bf16"), (16, 11, 1, "fp32"), (4, 12, 16, "fp16")]
# in_group_size, nbits, permuted
DEQUANTIZE_CASES = [(8, 8, True), (16, 11, False)]


def gemv_source(in_group_size, nbits, num_tokens, dtype, exact):
    blocks = gemv_blocks(num_tokens, in_group_size)
    constants = {
        "GROUP": in_group_size,
        "NBITS": nbits,
        "CODE_BYTES": code_span(nbits),
        "HAS_BIAS": True,
        "PRECISION": "ieee" if exact else "tf32",
        "BLOCK_M": blocks.tokens,
        "BLOCK_N": blocks.rows,
        "BLOCK_G": blocks.groups,
    }
    types = LAYER_TYPES | {"x": dtype, "bias": dtype, "y": dtype}
    return source(gemv_kernel, types, constants), blocks.num_warps


def dequantize_source(in_group_size, nbits, permuted):
    blocks = dequantize_blocks(in_group_size)
    constants = {
        "GROUP": in_group_size,
        "NBITS": nbits,
        "CODE_BYTES": code_span(nbits),
        "PERMUTED": permuted,
        "BLOCK_N": blocks.rows,
        "BLOCK_G": blocks.groups,
    }
    return source(dequantize_kernel, LAYER_TYPES | {"weight": "fp16"}, constants), blocks.num_warps


def source(kernel, pointer_types, constants):
    """Describes one specialisation: aligned pointers, 32-bit integers, the given constants."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointer_types[name.removesuffix("_ptr")]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def resources(compiled, target):
    """Returns registers and spilled bytes per thread as the assembler reports them; None where no tool can tell."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return find_number(r"\.vgpr_count:\s+(\d+)", text), find_number(r"\.vgpr_spill_count:\s+(\d+)", text)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "-res-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return find_number(r"REG:(\d+)", text), find_number(r"STACK:(\d+)", text)


def find_number(pattern, text):
    return int(re.search(pattern, text)[1])


def main() -> int:
    for name, target in TARGETS.items():
        hip = target.backend == "hip"
        cases = {f"gemv {case}": gemv_source(*case, hip or case[3] == "fp32") for case in GEMV_CASES}
        cases |= {f"dequantize {case}": dequantize_source(*case) for case in DEQUANTIZE_CASES}
        for case, (kernel_source, num_warps) in cases.items():
            options = {"num_warps": num_warps, "num_stages": NUM_STAGES}
            compiled = triton.compile(kernel_source, target=target, options=options)
            registers, spills = resources(compiled, target)
            row = {"target": name, "case": case, "registers": registers, "spills": spills}
            print(json.dumps(row | {"shared_bytes": compiled.metadata.shared}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
