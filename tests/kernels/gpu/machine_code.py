"""Reads what a compiler made of a kernel: registers, spills, memory instructions and what its main loop holds.

Only text goes in, so this needs neither a GPU nor Triton. `problems` says what must not be.
"""

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LOAD_BITS = (128, 64, 32, 16, 8)
_AMD_LOADS = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "ubyte": 8, "sbyte": 8}
# By kernel: bits of the widest load that codes must come by. The others multiply what threads load, so there a thread
# takes only the rows that it multiplies.
_CODE_LOAD_BITS = {"gemv_kernel": 128, "gemm_kernel": 32, "dequantize_kernel": 32}
# Kernels that read what they read once, so that past the L1 cache is the way to read it.
_READ_ONCE = {"rows_kernel"}
# Kernels that compare numbers of several threads.
_COMPARE = {"search_kernel"}
# Kernels whose codewords are to stay in registers, and of which x alone is copied to shared memory, asynchronously.
_FROM_REGISTERS = {"wgmma_kernel"}
# What a program can have: of the CUDA targets the least, that of sm_86 and sm_89.
_SHARED_BYTES = {"sm": 99 * 1024, "gfx": 64 * 1024}


def read_sass(sass: str, usage: str) -> dict:
    """Returns the counts of a CUDA kernel from the output of `cuobjdump -sass` and `cuobjdump -res-usage`.

    The main loop is the loop with the most instructions of its own, those of loops inside it not counted. Stack bytes
    are spills: nothing else here uses the stack.
    """
    code = [(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(sass)]
    main = _main_loop(code)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled_bytes": _number(r"STACK:(\d+)", usage),
        "loads": _loads(code),
        "main_loop_loads": _loads(main or code),
        "bypassing_copies": _count(code, r"LDGSTS\b.*\bBYPASS"),
        "shuffles": _count(code, "SHFL"),
        "main_loop_shuffles": _count(main, "SHFL"),
        "main_loop_lookups": _count(main, "LDS$"),  # of one fp32 number per thread
        "main_loop_stores": _count(main, "STS"),
        "matrix_instructions": _count(code, "HMMA|HGMMA|IMMA"),
        "main_loop_matrix_instructions": _count(main, "HMMA|HGMMA|IMMA"),
    }


def read_amdgcn(text: str) -> dict:
    """Returns the counts of an AMD kernel from its assembler text; loops are not looked at."""
    loads = re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", text)
    bits = [_AMD_LOADS.get(re.sub(r"_d16.*", "", name)) for name in loads]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spilled_bytes": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "loads": {str(width): bits.count(width) for width in _LOAD_BITS},
        "shuffles": len(re.findall(r"\bds_(?:bpermute|permute|swizzle)", text)),
        "matrix_instructions": len(re.findall(r"\bv_mfma", text)),
    }


def problems(row: dict) -> list[str]:
    """Returns what is wrong with the machine code of a kernel; `row` as from `aot_compile.py`, or [] if nothing is."""
    found = []
    if row["spilled_bytes"]:
        found.append(f"spills {row['spilled_bytes']} bytes per thread")
    limit = next(limit for family, limit in _SHARED_BYTES.items() if row["target"].startswith(family))
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, more than {limit}")
    if row["kernel"] in _FROM_REGISTERS:
        if not row["bypassing_copies"]:
            found.append("no asynchronous copies of x")
        if row["main_loop_stores"]:
            found.append(f"{row['main_loop_stores']} stores to shared memory in the main loop")
    elif row.get("bypassing_copies") and row["kernel"] not in _READ_ONCE:
        found.append(f"{row['bypassing_copies']} asynchronous copies bypass the L1 cache")
    if row.get("main_loop_shuffles") and row["kernel"] not in _COMPARE:
        found.append(f"{row['main_loop_shuffles']} shuffles in the main loop")
    bits = _CODE_LOAD_BITS.get(row["kernel"])
    if bits and row["loads"]["8"]:
        found.append(f"{row['loads']['8']} loads of single bytes")
    if bits and "main_loop_loads" in row:
        wide = sum(count for width, count in row["main_loop_loads"].items() if int(width) >= bits)
        if not wide:
            found.append(f"no {bits}-bit loads in the main loop: codes come by narrower ones")
    return found


def table(rows: list[dict]) -> str:
    """Returns the rows as a table, a line per kernel and target."""
    head = "target case kernel regs spill shared LDG.128/64/32/16/8 in-loop bypass SHFL in-loop MMA".split()
    lines = [head]
    for row in rows:
        counts = [row.get(name) for name in ("bypassing_copies", "shuffles", "main_loop_shuffles")]
        lines.append(
            [row["target"], row["case"], row["kernel"].removesuffix("_kernel")]
            + [str(row[name]) for name in ("registers", "spilled_bytes", "shared_bytes")]
            + ["/".join(map(str, row.get(name, {}).values())) or "-" for name in ("loads", "main_loop_loads")]
            + ["-" if count is None else str(count) for count in counts]
            + [str(row["matrix_instructions"])]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _main_loop(code: list) -> list:
    loops = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    own = {}
    for instruction in code:
        around = [loop for loop in loops if loop[0] <= instruction[0] <= loop[1]]
        if around:
            own.setdefault(min(around, key=lambda loop: loop[1] - loop[0]), []).append(instruction)
    return max(own.values(), key=len, default=[])


def _loads(code: list) -> dict:
    bits = []
    for _, name, _ in code:
        if name.split(".")[0] == "LDG":
            width = re.search(r"\.[US]?(128|64|16|8)\b", name)
            bits.append(int(width[1]) if width else 32)
    return {str(width): bits.count(width) for width in _LOAD_BITS}


def _count(code: list, pattern: str) -> int:
    return sum(re.match(pattern, name) is not None for _, name, _ in code)


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])
