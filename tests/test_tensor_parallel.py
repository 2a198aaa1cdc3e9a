"""`tp_plan="auto"` in two processes that talk over gloo: each is refused with a sentence, nothing is loaded."""

import os
import subprocess
import sys

PROGRAM = """
import os, sys
import crvq_hf
from transformers import AutoModelForCausalLM
rank = os.environ["RANK"]
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
except ValueError as error:
    open(f"{sys.argv[2]}/rank{rank}", "w").write(str(error))
"""


def test_two_processes_are_told_what_to_do(checkpoint, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(program), str(checkpoint), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "cannot be split over devices, but tensor parallelism over 2 was asked for" in said[0]
    assert "one process without tp_plan and tp_size, device_map='auto'" in said[0]
