"""Every Triton kernel compiles for real GPUs, though none is here, into the machine code that it was written for.

The interpreter accepts what a compiler refuses, and nothing that the interpreter computes shows how it is loaded.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine_code import problems, table

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)  # a minute of one core, all in the fixture, but the machine may be busy
SCRIPT = Path(__file__).with_name("aot_compile.py")
KERNELS = Path(__file__).parents[3] / "kernels"
# Which targets one process compiles for; sm_80, whose kernels are those of sm_90 but for one, before a release.
TOGETHER = {"sm_80": ("sm_80",), "sm_90": ("sm_90", "gfx942"), "gfx942": ("sm_90", "gfx942")}
SM_80 = pytest.param("sm_80", marks=pytest.mark.slow)


class Summary:
    """Plugin that prints a table after the tests, so that it can be read in the log of a passing run too."""

    def __init__(self, rows):
        self.rows = rows

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("machine code of the Triton kernels")
        terminalreporter.write_line(table(self.rows))


@pytest.fixture(scope="module")
def compiled_for(tmp_path_factory, pytestconfig):
    """Returns rows of `aot_compile.py` for some targets; its process has a Triton not bound to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(KERNELS), environment.get("PYTHONPATH")]))

    @functools.cache
    def compiled_for(*targets):
        command = [sys.executable, SCRIPT, "--json", *targets]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        pytestconfig.pluginmanager.register(Summary(rows))
        return rows

    return compiled_for


@pytest.fixture(scope="module")
def compiled(compiled_for):
    """Rows for the targets that are always tested."""
    return compiled_for(*TOGETHER["sm_90"])


@pytest.mark.parametrize("target", [SM_80, "sm_90", "gfx942"])
def test_kernels_compile_into_good_code(compiled_for, target):
    """No spills, no narrow code loads, no gathers around the L1 cache, no shuffles in a main loop."""
    rows = [row for row in compiled_for(*TOGETHER[target]) if row["target"] == target and not row["mistake"]]
    kernels = {row["kernel"].removesuffix("_kernel") for row in rows}
    wgmma = {"wgmma"} if target == "sm_90" else set()
    assert kernels == {"gemv", "sum_splits", "stage", "gemm", "dequantize", "reorder", "rows", "search"} | wgmma
    assert {(row["case"], row["kernel"]): problems(row) for row in rows if problems(row)} == {}


@pytest.mark.parametrize("target", [SM_80, "sm_90"])
@pytest.mark.parametrize("case", ["M=1 fp16 d8 e8", "M=1 bf16 d8 e8"])
def test_gemv_looks_each_code_up_once(compiled_for, target, case):
    """A thread has 32 codes in two 128-bit words, and reads one number per code from shared memory."""
    rows = compiled_for(*TOGETHER[target])
    (row,) = [row for row in rows if (row["target"], row["case"], row["kernel"]) == (target, case, "gemv_kernel")]
    assert row["main_loop_lookups"] == 32
    assert row["main_loop_loads"]["128"] == 2
    assert row["matrix_instructions"]


def test_codewords_go_straight_into_wgmma(compiled):
    """A step of 64 terms: two loads of codes, four codewords gathered, and four instructions take them from there."""
    rows = {row["case"]: row for row in compiled if row["kernel"] == "wgmma_kernel" and not row["mistake"]}
    assert len(rows) == 6
    for case in ("M=32 fp16 d8 e8 int8", "M=64 fp16 d8 e8 int8", "M=64 fp16 d8 e8"):
        loads = rows[case]["main_loop_loads"]
        assert loads["16"] == 2 and loads["64" if "int8" in case else "128"] == 4 and sum(loads.values()) == 6
        assert rows[case]["main_loop_matrix_instructions"] == 4


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("2-D gather", "shuffles in the main loop"),
        ("3 stages", "bypass the L1 cache"),
        ("unaligned codes", "no 128-bit loads"),
        ("1024 sums", "spills"),
        ("1 stage of wgmma", "no asynchronous copies of x"),
        ("1 stage of wgmma", "stores to shared memory in the main loop"),
    ],
)
def test_mistakes_are_noticed(compiled, case, complaint):
    found = [problem for row in compiled if row["case"] == case for problem in problems(row)]
    assert any(complaint in problem for problem in found)
