"""Shows the whole package at home among its neighbours: transformers, the hub, serving, PEFT, lm_eval.

    python -m benchmarks ecosystem [--model DIR] [--system-packages] [options of crvq quantize]

Builds a wheel of this checkout, installs it into an empty virtual environment and does there what a user does, every
step in processes of their own; the programs are in benchmarks/checks/programs. Prints the commands, the lines of their
output that matter (one that is missing is a failure) and PASS or FAIL; the exit code is 1 if anything failed. DIR is
a dense model with a chat template; without it the script makes a tiny random one. The hub is a server on the loopback
interface.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.commands import command_line, copy_source, from_tests, without_crvq
from ..common.rows import ROOT

hub_server = from_tests("sharing/hub_server")
NAME = "user/name"  # of the model on the hub
LIMIT = 3600  # seconds that one command may take
PROMPT = "The sea is"


class Failed(Exception):
    """What was expected of a command did not happen."""


class User:
    """Someone with a virtual environment, a folder to work in and a token for a hub.

    Attributes:
        work: the folder.
        hub: the server.
        model: folder of the dense model.
        options: of `crvq quantize`.
    """

    def __init__(self, work: Path, hub: hub_server.Hub, model: str, options: list[str]) -> None:
        self.work, self.hub, self.model, self.options = work, hub, model, options
        self.written: list[str] = []  # by the pipeline, to compare with
        self.bin = work / "venv" / "bin"
        dropped = ("HF_", "PYTHON", "TRITON_", "CRVQ_", "VIRTUAL_ENV", "TORCH_DEVICE_BACKEND")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.environment |= {"HF_HOME": str(work / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        self.environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Prints a command and starts it, its program found in the virtual environment."""
        print("$ " + self.short(shlex.join([*(f"{n}={v}" for n, v in environment.items()), *command])), flush=True)
        return subprocess.Popen(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.work,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, shows: tuple[str, ...] = (), fails: bool = False, **environment: str) -> str:
        """Runs a command to its end and prints the lines that one of the regexes `shows` is found in.

        Returns:
            All that it printed.

        Raises:
            Failed: its exit code is not as expected, or one of `shows` is not there.
        """
        process = self.start(*command, **environment)
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nkilled after {LIMIT} s"
        lines = [line.strip() for line in output.splitlines()]
        for line in dict.fromkeys(lines):
            if any(re.search(pattern, line) for pattern in shows):
                print(f"    {self.short(line)[:200]}", flush=True)
        missing = [pattern for pattern in shows if not any(re.search(pattern, line) for line in lines)]
        if (process.returncode != 0) != fails or missing:
            wanted = f", no line has {missing}" if missing else ""
            raise Failed("\n".join([*lines[-15:], f"exit code {process.returncode}{wanted}"]))
        return output

    def short(self, text: str) -> str:
        return text.replace(f"{self.work}/", "").replace(f"{ROOT}/", "")


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


def value_of(output: str, title: str) -> list[str]:
    """Returns what follows `title` in all lines that start with it."""
    return re.findall(rf"^{title}\s+(.+)$", output, re.MULTILINE)


def install(user: User, system_packages: bool) -> None:
    """Makes the virtual environment and what the user starts from: a model and texts."""
    venv.create(user.work / "venv", with_pip=True, symlinks=True)
    copy_source(user.work / "source")
    pip = ("python", "-m", "pip", "--disable-pip-version-check")
    user.run(*pip, "wheel", "--no-deps", "-w", "wheels", "./source", shows=("Successfully built",))
    constraints = ["-c", str(ROOT / "constraints.txt")]
    if system_packages:
        print(f"Packages are those of {sys.prefix}, without its crvq-hf; only what is missing there is downloaded.")
        site = sysconfig.get_path("purelib", vars={"base": str(user.work / "venv")})
        others = without_crvq(user.work / "others")  # outside of the environment: pip must not change them
        Path(site, "others.pth").write_text(f"{others}\n")
        constraints = []
    else:
        print("Packages are downloaded, in the versions of constraints.txt.")
    (wheel,) = (user.work / "wheels").glob("*.whl")
    wanted = (f"{wheel}[report,serve,eval]", "peft")
    user.run(*pip, "install", *constraints, *wanted, shows=("Successfully installed .*crvq[-_]hf",))
    texts = ("README.md", "CONTRIBUTING.md")
    for name, text in zip(("calibration.txt", "held-out.txt"), texts, strict=True):
        shutil.copy(ROOT / text, user.work / name)
    shutil.copytree(Path(__file__).with_name("programs"), user.work, dirs_exist_ok=True)
    (user.work / "tasks").mkdir()
    for file in user.work.glob("words.*"):
        file.rename(user.work / "tasks" / file.name)
    if user.model == "dense":
        user.run("python", "tiny_model.py", str(ROOT / "tests"))


def doctor(user: User) -> None:
    user.run("crvq", "doctor", shows=("^(torch|transformers|crvq-hf|cpu kernel) ", "agrees with the reference"))


def quantize(user: User) -> None:
    evaluation = ("--evaluate", "held-out.txt", "--evaluate-seqlen", "128")
    command = ("crvq", "quantize", user.model, "out", "--dataset", "calibration.txt", *evaluation, *user.options)
    shows = ("^layers ", "^bits per weight ", "^relative error ", "^perplexity .* after", "^checkpoint ")
    user.run(*command, shows=shows)


def inspect(user: User) -> None:
    user.run("crvq", "info", "out", shows=("^whole size ", "^quantized "))
    user.run("crvq", "verify", "out", shows=("all as they were saved",))
    user.run("crvq", "report", "out", shows=("report.html", "report.png"))


def push(user: User) -> None:
    user.run("crvq", "push", "out", NAME, shows=(re.escape(f"{user.hub.url}/{NAME}"),), HF_TOKEN=hub_server.TOKEN)
    files = user.hub.repositories[NAME]["files"]
    card = files["README.md"].decode()
    print(f"    on the hub: {', '.join(sorted(files))}")
    print("\n".join(f"    card: {line}" for line in card.splitlines() if line.startswith(("| bits", "| perplexity"))))
    expect(not user.hub.missing, f"The hub has no route for {user.hub.missing}")


def load_by_id(user: User) -> None:
    shows = ("CRVQLinear", "^by .*/venv/.*/crvq_hf/__init__.py", "^written ")
    user.written = value_of(user.run("python", "write.py", NAME, PROMPT, shows=shows), "written")
    downloads = [path for method, path in user.hub.requests if method == "GET" and path.endswith("model.safetensors")]
    print(f"    downloaded {downloads}")
    expect(bool(downloads), "model.safetensors was not downloaded from the hub.")


@contextmanager
def server(user: User) -> Iterator[str]:
    """Runs `transformers serve`; yields its URL."""
    command = ("python", "-m", "transformers.cli.transformers", "serve", NAME, "--device", "cpu", "--port", "0")
    process = user.start(*command)
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if found := re.search(r"running on (http://\S+:\d+)", line):
                break
        else:
            raise Failed("\n".join([*said[-15:], "The server ended."]))
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
        yield found[1]
    finally:
        timer.cancel()
        process.terminate()
        process.wait()


def serve(user: User) -> None:
    with server(user) as url:
        output = user.run("python", "chat.py", url, NAME, PROMPT, shows=("^plain ", "^streamed ", "^pieces [1-9]"))
    plain, streamed = value_of(output, "plain"), value_of(output, "streamed")
    expect(plain == user.written, "The plain answer and the pipeline's differ.")
    # Of a character whose bytes are not all there at the end (random models write such) nothing is streamed.
    said, heard = (ast.literal_eval(answer[0]).rstrip("\ufffd") for answer in (plain, streamed))
    expect(said == heard, "The plain and the streamed answer differ.")
    expect(int(value_of(output, "pieces")[0]) > 1, "The stream came in one piece.")


def lora(user: User) -> None:
    shows = ("^trainable params", "^loss ", "^trained loss ")
    trained = user.run("python", "lora.py", "train", NAME, "held-out.txt", shows=shows)
    reloaded = user.run("python", "lora.py", "reload", NAME, "held-out.txt", shows=("^reloaded loss ",))
    losses = [float(loss) for loss in value_of(trained, "loss")]
    expect(losses[-1] < losses[0] - 0.1, "The loss did not fall.")
    before, after = float(value_of(trained, "trained loss")[0]), float(value_of(reloaded, "reloaded loss")[0])
    expect(abs(after - before) < 1e-5 * before, "The reloaded adapter has another loss.")


def evaluate(user: User) -> None:
    """By lm_eval's own command, which knows nothing of CRVQ, and by ours."""
    task = ("--tasks", "words", "--device", "cpu")
    model = ("--model", "hf", "--model_args", f"pretrained={NAME}", "--include_path", "tasks")
    theirs = user.run("python", "-m", "lm_eval", "run", *model, *task, shows=(r"\|words\s*\|",))
    ours = user.run("crvq", "eval", NAME, "--include-path", "tasks", *task, shows=(r"\|words\s*\|",))
    rows = [re.search(r"\|words.*", output)[0].split("|") for output in (theirs, ours)]
    expect(rows[0] == rows[1], "The two results differ.")


def embeddings(user: User) -> None:
    command = ("crvq", "quantize", user.model, "out8", "--dataset", "calibration.txt", "--embedding-bits", "8")
    user.run(*command, *user.options, shows=("^checkpoint ",))
    user.run("crvq", "verify", "out8", shows=("all as they were saved",))
    user.run("python", "write.py", "out8", PROMPT, shows=("CRVQLinear", "^embedding Int8Embedding", "^written '.+'"))
    sizes = [(user.work / out / "model.safetensors").stat().st_size for out in ("out8", "out")]
    expect(sizes[0] < sizes[1], f"The checkpoint has {sizes[0]} bytes, {sizes[1]} with 16-bit embeddings.")


def uninstall(user: User) -> None:
    user.run("python", "-m", "pip", "uninstall", "-y", "crvq-hf", shows=("Successfully uninstalled",))
    shows = ("Unknown quantization type, got crvq", "^RuntimeError")
    user.run("python", "write.py", NAME, PROMPT, shows=shows, fails=True)
    stored = json.loads(user.hub.repositories[NAME]["files"]["config.json"])["quantization_config"]
    print(f"    config.json: quantizer_package {stored['quantizer_package']!r}")
    expect(stored["quantizer_package"] == "crvq-hf", "config.json does not name the package.")


STEPS: dict[str, Callable[[User], None]] = {
    "crvq doctor": doctor,
    "crvq quantize, with perplexity": quantize,
    "crvq info, verify, report": inspect,
    "crvq push": push,
    "a pipeline by id, without an import": load_by_id,
    "transformers serve and the openai client": serve,
    "LoRA with PEFT: train, save, reload": lora,
    "lm_eval and crvq eval --tasks": evaluate,
    "8-bit embeddings": embeddings,
    "without crvq-hf loading fails, and says why": uninstall,
}


def passed(number: int, title: str, step: Callable[[], None]) -> bool:
    """Runs one step between its headline and its result."""
    print(f"\n== {number}. {title}", flush=True)
    start = time.monotonic()
    try:
        step()
        result = "PASS"
    except Exception as error:  # any: the other steps still have something to tell
        print("\n".join(f"    ! {line}" for line in (str(error) or repr(error)).splitlines()))
        result = "FAIL" if isinstance(error, Failed) else f"FAIL ({type(error).__name__})"
    print(f"{result} {number}. {title} ({time.monotonic() - start:.0f} s)", flush=True)
    return result == "PASS"


def main(arguments: list[str]) -> int:
    """Does all steps; returns 1 if one of them failed."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("--model", metavar="DIR", help="folder of a dense model (default: a tiny one)")
    text = "take torch and all else from the environment of this Python, not from PyPI: some minutes less"
    parser.add_argument("--system-packages", action="store_true", help=text)
    args, options = parser.parse_known_args(arguments)
    options = ["--nsamples", "4", "--seqlen", "128", *options]
    model = str(Path(args.model).resolve()) if args.model else "dense"
    with tempfile.TemporaryDirectory() as folder, hub_server.running_hub() as hub:
        user = User(Path(folder).resolve(), hub, model, options)
        failures = []
        if not passed(0, "wheel and empty environment", lambda: install(user, args.system_packages)):
            return 1
        for number, (title, step) in enumerate(STEPS.items(), 1):
            if not passed(number, title, lambda step=step: step(user)):
                failures.append(number)
        failed = f", failed: {failures}" if failures else ""
        print(f"\n{len(STEPS) - len(failures)} of {len(STEPS)} steps passed{failed}", flush=True)
    return 1 if failures else 0
