"""Several processes on one run, joined over gloo: the result of one, resumable, failing together, the first writes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from whole_models import FIELDS, make, use_small_steps

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.pipeline import block_loop as pipeline
from crvq_hf.pipeline import quantize_block, streams
from crvq_hf.resources import distributed
from crvq_hf.resources.workfolder import WorkFolder
from crvq_hf.tuning import end_to_end

pytestmark = pytest.mark.usefixtures("precision", "quiet")

HERE = Path(__file__).parent
SETTINGS = FIELDS | {"embedding_bits": 2.5}


# The arithmetic of sharing


@pytest.fixture
def as_process(monkeypatch):
    """Returns a function that lets this process take itself for one of several."""

    def pretend(rank: int, count: int, sequences: int = 0) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "gather", lambda value: [sequences])

    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("seqlen", [150, 256, 300, 512, 4096])
@pytest.mark.parametrize("sequences", [1, 16, 41])
def test_batches_and_steps_are_those_of_one_process_each_in_one(count, seqlen, sequences, as_process):
    samples = torch.arange(sequences * seqlen).view(sequences, seqlen)
    wanted = streams.batches(samples), samples.split(max(1, streams.STEP_TOKENS // seqlen))
    shares, steps = [], []
    for rank in range(count):
        as_process(rank, count, sequences)
        shares.append(streams.share(samples))
        steps.append(streams.steps(shares[-1]))
        prefix = streams.share(samples[: sequences // 2])
        assert torch.equal(prefix, shares[-1][: len(prefix)])
    for number, batch in enumerate(wanted[0]):
        assert torch.equal(streams.batches(shares[number % count])[number // count], batch)
    assert sum(map(len, shares)) == sequences
    for step, *found in zip(wanted[1], *steps, strict=True):
        (owner,) = [view for view in found if len(view)]
        assert torch.equal(owner, step)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_samples_are_each_in_one_process(count, as_process):
    samples, shares, steps = [{"x": torch.ones(1, n)} for n in range(1, 6)], [], []
    for rank in range(count):
        as_process(rank, count, 5)
        shares.append(streams.share(samples))
        steps.append(streams.steps(shares[-1]))
        assert streams.share(samples[:3]) == shares[-1][: len(streams.share(samples[:3]))]
    assert sum(map(len, shares)) == 5
    for number, found in enumerate(zip(*steps, strict=True)):
        assert [step for step in found if step] == [[samples[number]]] and found[number % count]


def test_tasks_are_each_taken_once_and_evenly(as_process):
    costs = {"q": 4, "k": 1, "v": 1, "gate": 14, "up": 14, "down": 14, "o": 4}
    taken = []
    for rank in range(3):
        as_process(rank, 3)
        taken.append(distributed.own(costs))
    assert sorted(name for names in taken for name in names) == sorted(costs)
    assert max(sum(costs[name] for name in names) for names in taken) <= 18


def test_one_process_is_not_touched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    tensor, samples = torch.ones(2, requires_grad=True), torch.arange(5)[:, None]
    with distributed.together():
        assert (distributed.rank(), distributed.world_size(), distributed.local_size()) == (0, 1, 1)
        assert distributed.gather(3) == [3] and distributed.first(lambda: "a") == "a"
        assert distributed.sum_(tensor) is tensor and distributed.sum_gradients_([tensor], 0.1) == 0.1
        assert torch.equal(streams.share(samples), samples)
        assert distributed.own({"a": 1, "b": 2}) == {"a", "b"}
    distributed.leave()
    assert not torch.distributed.is_initialized()


# Several processes


def check_quantized(folder: Path, architecture: str) -> None:
    """Also checks that each process fits some layers, and only the first writes."""
    fit_weight, write, counts = quantize_block.fit_weight, WorkFolder._write, [0, 0]

    def counted_fit(weight, hessian, **fields):
        counts[0] += 1
        return fit_weight(weight, hessian, **fields)

    def counted_write(*args):
        counts[1] += 1
        return write(*args)

    quantize_block.fit_weight, WorkFolder._write = counted_fit, counted_write
    quantized(folder, architecture, "work")
    fits, (writes, *nothing) = zip(*distributed.gather(counts), strict=True)
    assert min(fits) >= 2 and writes > 4 and not any(nothing), (fits, writes, nothing)


def weights_only(folder: Path) -> None:
    quantized(folder, "llama", "work", dataset=None)


def killed(folder: Path, rank: int, name: str) -> None:
    """Is killed right after a save, in one process."""
    end_to_end.CHECKPOINT_SECONDS = -1.0
    save = WorkFolder.save

    def save_and_die(self, saved, *args):
        save(self, saved, *args)
        if saved == name and distributed.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    WorkFolder.save = save_and_die
    quantized(folder, "llama", "work")


def resumed(folder: Path) -> None:
    quantized(folder, "llama", "work")


def failing(folder: Path, ranks: list[int]) -> None:
    fit_weight, left = quantize_block.fit_weight, [3]

    def failing_fit(*args, **fields):
        left[0] -= 1
        if not left[0]:
            raise ValueError(f"no luck in process {distributed.rank()}")
        return fit_weight(*args, **fields)

    if distributed.rank() in ranks:
        quantize_block.fit_weight = failing_fit
    quantized(folder, "llama", "work")


# Name of a folder, number of processes, function and its arguments; in this order. There are 2 batches of calibration
# text, and 3 with what is for end-to-end fine-tuning.
PLAN = {
    "llama": (2, "check_quantized", "llama"),
    "qwen3_moe": (2, "check_quantized", "qwen3_moe"),
    "llama, three": (3, "check_quantized", "llama"),
    "qwen3_moe, three": (3, "check_quantized", "qwen3_moe"),
    "weights only": (3, "weights_only"),
    "first killed": (2, "killed", 0, "block_0000"),
    "second killed": (2, "killed", 1, "block_0000"),
    "killed in tuning": (2, "killed", 0, "end_to_end"),
    "first failing": (2, "failing", [0]),
    "second failing": (2, "failing", [1]),
    "both failing": (2, "failing", [0, 1]),
}
KILLED = {"first killed": 0, "second killed": 1, "killed in tuning": 0}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs all of the plan, what was killed twice; returns the folder, and how processes ended (minus the signal).

    One process imports all, which takes longer than the rest, and forks.
    """
    folder = tmp_path_factory.mktemp("ran")
    script = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    script += f"import test_distributed; test_distributed.run_plan({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def run_plan(folder: str) -> None:
    use_small_steps(setattr)
    pipeline.has_fast_bfloat16 = lambda device_type: False
    codes = {}
    for name, (count, *call) in PLAN.items():
        place = Path(folder, name)
        place.mkdir()
        codes[name] = fork(place, count, *call)
        if name in KILLED:
            codes[f"{name}, resumed"] = fork(place, count, "resumed")
    print(json.dumps(codes))


def fork(folder: Path, count: int, name: str, *arguments) -> list[int]:
    """Runs a function of this file in joined processes; returns how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(in_process(folder, rank, name, arguments))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_process(folder: Path, rank: int, name: str, arguments: tuple) -> int:
    """Runs a function as one process of several; returns the exit code and leaves a failure in a file."""
    try:
        torch.set_num_threads(1)
        with distributed.together("cpu"):
            globals()[name](folder, *arguments)
        return 0
    except BaseException as error:
        (folder / f"failure{rank}").write_text(f"{type(error).__name__}: {error}")
        return 3
    finally:
        distributed.leave()


def quantized(folder: Path, architecture: str, work: str, **fields) -> None:
    """Quantizes, and leaves what each process has."""
    model = make(architecture)
    quantize_model(model, None, CRVQConfig(**SETTINGS | fields, work_dir=folder / work))
    torch.save(model.state_dict(), folder / f"model{distributed.rank()}.pt")
    (folder / f"report{distributed.rank()}.json").write_text(json.dumps(model.crvq_report))


def failures(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("failure*"))]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Returns a function that quantizes in this process, on one thread as the others."""
    use_small_steps(monkeypatch.setattr)
    monkeypatch.setattr(pipeline, "has_fast_bfloat16", lambda device_type: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda architecture, **fields: quantize_model(
        make(architecture), None, CRVQConfig(**SETTINGS | fields, work_dir=tmp_path / "alone")
    )
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "llama, three", "qwen3_moe, three", "weights only"])
def test_all_bits_are_those_of_one_process(name, alone, ran):
    folder, codes, (count, *_) = ran[0] / name, ran[1][name], PLAN[name]
    assert codes == [0] * count, failures(folder)
    if name == "weights only":
        model = alone("llama", dataset=None)
    else:
        model = alone(name.partition(",")[0])
    assert all(same(torch.load(folder / f"model{rank}.pt"), model.state_dict()) for rank in range(count))
    report = json.loads((folder / "report0.json").read_text())
    for key in ("bits_per_weight", "calibration_tokens", "e2e_tokens", "activation_bytes", "e2e_loss"):
        assert report[key] == model.crvq_report[key]
    errors = [
        {name: line["relative_error"] for name, line in r["layers"].items()} for r in (report, model.crvq_report)
    ]
    assert errors[0] == errors[1]


def test_one_process_goes_on_where_two_were(alone, ran, tmp_path):
    shutil.copytree(ran[0] / "llama/work", tmp_path / "alone")
    for finished in ("end_to_end", "block_0001"):
        (tmp_path / f"alone/{finished}.safetensors").unlink()
    assert same(torch.load(ran[0] / "llama/model1.pt"), alone("llama").state_dict())


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_equals_uninterrupted(name, ran):
    folder, codes = ran[0] / name, ran[1]
    assert codes[name][KILLED[name]] == -signal.SIGKILL and codes[name][1 - KILLED[name]] == 3
    assert len(failures(folder)) == 1
    assert failures(folder)[0].startswith("ProcessLost: Another process of this run was killed")
    assert codes[f"{name}, resumed"] == [0, 0]
    whole = torch.load(ran[0] / "llama/model0.pt")
    assert all(same(torch.load(folder / f"model{rank}.pt"), whole) for rank in range(2))


@pytest.mark.parametrize(
    ("name", "ranks"), [("first failing", [0]), ("second failing", [1]), ("both failing", [0, 1])]
)
def test_a_failure_is_that_of_all(name, ranks, ran):
    assert ran[1][name] == [3, 3]
    sentence = f"ValueError: no luck in process {ranks[0]}"
    expected = [f"EndedElsewhere: Process {ranks[0]} of 2 has failed: {sentence}"] * 2
    expected[ranks[0]] = sentence
    assert failures(ran[0] / name) == expected


# torchrun and accelerate

PROGRAM = """
import os, sys
from crvq_hf.commands import cli
from crvq_hf.pipeline import quantize_block
fit_weight = quantize_block.fit_weight
def fit(*args, **fields):
    if os.environ["RANK"] == os.environ.get("FAILING"):
        raise ValueError("no luck")
    return fit_weight(*args, **fields)
quantize_block.fit_weight = fit
sys.exit(cli.main(sys.argv[1:]))
"""


def test_torchrun_tells_one_sentence_and_accelerate_goes_on(tmp_path):
    dense, out, program = save_tiny(tmp_path / "dense"), tmp_path / "out", tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    accelerate = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command = [str(program), "quantize", str(dense), str(out), "--dataset", str(dense / "text.txt"), "--device", "cpu"]
    command += ["--nsamples", "3", "--seqlen", "16", "--nbits-per-codebook", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run(launcher, **more):
        line = [sys.executable, *launcher, *command]
        return subprocess.run(line, env=environment | more, capture_output=True, text=True, timeout=250)

    failed = run(torchrun, FAILING="1")
    assert failed.returncode != 0 and not out.exists()
    assert re.findall(r"^crvq: error: .*", failed.stderr, re.MULTILINE) == ["crvq: error: no luck"], failed.stderr
    done = run(accelerate)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per weight") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "program.py"]
    assert len(json.loads((out / "report.json").read_text())["layers"]) == 14
