"""Kills `crvq quantize` at random moments; the same command must end as an undisturbed run does.

    python -m benchmarks kills --kills 50 --seed 0

The model is the tiny Llama of the tests. Every run is a process of its own, forked from one that has only imported the
packages, and dies by SIGKILL. Moments are counted in turn from the start of the process, from where it makes its work
folder, and from where it begins to save the result.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from ..common.commands import command_line, from_tests

OPTIONS = ["--nsamples", "2", "--seqlen", "16", "--nbits-per-codebook", "4", "--embedding-bits", "8"]
OPTIONS += ["--block-finetune-epochs", "1", "--e2e-finetune-epochs", "4"]
# Where moments are counted from, and what is made there beside the result.
PHASES = {"the start": None, "the work folder": ".work", "the saving": ".tmp"}


def quantize(dense: str, out: str) -> None:
    """Runs the command line in this process and exits."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdout = sys.stderr = open(f"{out}.log", "a", buffering=1)
    from crvq_hf.commands.cli import main

    os._exit(main(["quantize", dense, out, "--dataset", f"{dense}/text.txt", *OPTIONS]))


def contents(out: Path) -> dict[str, object]:
    """Returns everything that must be the same: tensors by name as dtype, shape and bytes, and config.json."""
    from safetensors import safe_open

    found: dict[str, object] = {"config.json": json.loads((out / "config.json").read_text(encoding="utf-8"))}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                found[f"{file.name}:{name}"] = (str(tensor.dtype), tensor.shape, tensor.tobytes())
            found[f"{file.name}:metadata"] = sorted(opened.metadata().items())
    return found


class Runs:
    """Starts runs as processes of their own."""

    def __init__(self, dense: Path) -> None:
        self.dense = dense
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["crvq_hf.commands.cli", "transformers.models.llama.modeling_llama"])

    def start(self, out: Path) -> multiprocessing.Process:
        process = self.context.Process(target=quantize, args=(str(self.dense), str(out)))
        process.start()
        return process

    def finish(self, out: Path) -> dict[str, float]:
        """Runs to the end; returns the seconds that this took from each of `PHASES`."""
        start, begun = time.perf_counter(), {}
        process = self.start(out)
        while process.exitcode is None:
            for phase in PHASES:
                if phase not in begun and has_begun(phase, out):
                    begun[phase] = time.perf_counter()
            process.join(0.001)
        if process.exitcode != 0:
            raise SystemExit(f"The run ended with {process.exitcode}: {Path(f'{out}.log').read_text()[-2000:]}")
        end = time.perf_counter()
        return {phase: end - begun.get(phase, end) for phase in PHASES} | {"the start": end - start}

    def kill(self, out: Path, phase: str, seconds: float) -> str:
        """Starts a run and kills it `seconds` after a phase has begun; returns what it has left."""
        process = self.start(out)
        while process.exitcode is None and not has_begun(phase, out):
            process.join(0.0002)
        process.join(seconds)
        if process.exitcode is not None:
            return "had ended"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return state(out)


def has_begun(phase: str, out: Path) -> bool:
    suffix = PHASES[phase]
    return suffix is None or out.with_name(out.name + suffix).exists()


def state(out: Path) -> str:
    """Returns what a killed run has left."""
    unfinished, work = out.with_name(f"{out.name}.tmp"), out.with_name(f"{out.name}.work")
    if out.exists():
        return "result there, " + ("work folder not yet removed" if work.exists() else "work folder removed")
    if unfinished.exists():
        return f"saving, {len(list(unfinished.iterdir()))} files"
    if work.exists():
        names = [path.name for path in work.iterdir()]
        blocks = sum(name.startswith("block_") and name.endswith(".safetensors") for name in names)
        tuning = ", tuning" if any(name.startswith("e2e") or name.startswith("end") for name in names) else ""
        return f"{blocks} blocks done{tuning}" + (", a file half written" if any(".tmp" in n for n in names) else "")
    return "nothing yet"


def main(arguments: list[str]) -> int:
    """Kills runs; returns 1 if one of them ended otherwise than the undisturbed one."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Runs(from_tests("tiny").save_tiny(folder / "dense"))
        runs.finish(folder / "warm")
        seconds = runs.finish(folder / "undisturbed")
        expected = contents(folder / "undisturbed")
        print(f"{len(expected)} things to compare; seconds to the end:", {k: round(v, 2) for k, v in seconds.items()})
        identical = 0
        for number in range(args.kills):
            out, phase = folder / f"killed{number}", list(PHASES)[number % len(PHASES)]
            moment = rng.uniform(0, seconds[phase])
            left = runs.kill(out, phase, moment)
            runs.finish(out)
            leftovers = [path.name for path in folder.glob(f"{out.name}.*") if not path.name.endswith(".log")]
            found = contents(out)
            wrong = leftovers + [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
            identical += not wrong
            when = f"{moment:.3f} s after {phase}"
            verdict = f"DIFFERENT {sorted(wrong)}" if wrong else "identical"
            print(f"{number + 1:3}  {when:30} {left:46} {verdict}", flush=True)
            shutil.rmtree(out)
    print(f"{identical} of {args.kills} identical (seed {args.seed})")
    return 0 if identical == args.kills else 1
