"""The command line in one process: every command; what goes wrong, and what that leaves behind."""

import errno
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from crvq_kernels import cpu
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import TEXT, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from crvq_hf import CRVQConfig
from crvq_hf.checkpoint import info
from crvq_hf.checkpoint.headers import read_headers
from crvq_hf.commands import convert, doctor, quantize
from crvq_hf.commands.cli import main
from crvq_hf.commands.options import NOT_OPTIONS
from crvq_hf.config import FIELDS
from crvq_hf.evaluation import perplexity as evaluate
from crvq_hf.pipeline import quantize_block
from crvq_hf.quantized_weight import TENSOR_NAMES

FAST = ["--nsamples", "2", "--seqlen", "16", "--nbits-per-codebook", "4", "--e2e-finetune-epochs", "1"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def quantized(dense, tmp_path_factory):
    """A quantized model; tests must not change it."""
    out = tmp_path_factory.mktemp("made") / "model"
    assert main(command(dense, out)) == 0
    return out


@pytest.fixture
def finished(quantized, tmp_path):
    """A copy of the quantized model that a test may spoil."""
    return shutil.copytree(quantized, tmp_path / "finished")


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if anything is quantized."""

    def refuse(*args, **kwargs):
        raise AssertionError("a layer is quantized")

    monkeypatch.setattr(quantize_block, "fit_weight", refuse)


def command(dense, out, *options) -> list[str]:
    return ["quantize", str(dense), str(out), "--dataset", str(dense / "text.txt"), *FAST, *options]


def error_of(capsys, arguments) -> str:
    """Returns the one line of an error exit, without what every such line starts with."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("crvq: error: ")]
    assert code == 2 and len(lines) == 1 and printed.out == "", printed
    assert "Traceback" not in printed.err
    return lines[0]


def siblings(path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir() if other.name.startswith(path.name))


# A whole round


def test_quantize_leaves_the_result_and_nothing_else(quantized):
    assert siblings(quantized) == ["model"]
    names = {path.name for path in quantized.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "report.json"} <= names
    assert not any(name.startswith(".") for name in names)
    report = json.loads((quantized / "report.json").read_text())
    assert len(report["layers"]) == 14 and report["command"]["config"]["nbits_per_codebook"] == 4


def test_quantize_prints_a_summary(dense, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(dense, out)) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert f"{report['bits_per_weight']:.3f} (stored, channel order counted)" in printed
    assert "32 tokens" in printed and "stay dense         0.0% of the weights of the blocks" in printed
    worst = max(report["layers"].items(), key=lambda item: item[1]["relative_error"])
    assert f"{worst[1]['relative_error']:.4f} in {worst[0]}" in printed


def test_info_counts_every_byte(quantized, capsys):
    assert main(["info", str(quantized)]) == 0
    printed = capsys.readouterr().out
    tensors = load_file(quantized / "model.safetensors")
    layers = {name.removesuffix(".weight_order") for name in tensors if name.endswith(".weight_order")}
    stored = {f"{layer}.{name}" for layer in layers for name in TENSOR_NAMES}
    nbytes = sum(tensors[name].nbytes for name in stored)
    weights = sum(len(tensors[f"{name}.weight_scale"]) * len(tensors[f"{name}.weight_order"]) for name in layers)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in stored)
    whole = sum(path.stat().st_size for path in quantized.iterdir())
    bits = 8 * nbytes / weights
    assert f"14 layers, {weights:,} weights, {nbytes / 1e6:.3f} MB: {bits:.3f} bits per weight" in printed
    assert f"{whole / 1e6:.3f} MB in {len(list(quantized.iterdir()))} files" in printed
    assert f"{len(tensors) - len(stored)} tensors, {rest / 1e6:.3f} MB" in printed
    assert "model.embed_tokens.weight (1 of [300, 32], F32)" in printed
    share = 2 * 300 * 32 / (2 * 300 * 32 + weights)
    assert f"stay dense      0.0% of the weights of the blocks, {share:.1%} of all" in printed
    row = r"^model\.layers\.\*\.mlp\.down_proj +32 x 64 +2 of 16 x 8 +8 of 64 +U8 .* 2$"
    assert re.search(row, printed, re.MULTILINE), printed


def test_info_of_a_dense_model(dense, capsys):
    assert main(["info", str(dense)]) == 0
    assert "nothing: this checkpoint has no CRVQ layers" in capsys.readouterr().out


def test_info_of_the_hub_reads_headers_only(quantized, monkeypatch, capsys):
    headers = read_headers(quantized)

    class Api:
        def get_safetensors_metadata(self, name):
            class Tensor:
                def __init__(self, found):
                    self.shape, self.dtype, self.data_offsets = list(found.shape), found.dtype, (8, 8 + found.nbytes)

            part = type("Part", (), {"tensors": {name: Tensor(found) for name, found in headers.items()}})
            return type("Metadata", (), {"files_metadata": {"model.safetensors": part}})

        def model_info(self, name, files_metadata):
            files = [type("File", (), {"size": path.stat().st_size}) for path in quantized.iterdir()]
            return type("Model", (), {"siblings": files})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(info, "cached_file", lambda name, file: str(quantized / file))
    assert main(["info", str(quantized)]) == 0
    local = capsys.readouterr().out
    assert main(["info", "someone/model"]) == 0
    assert capsys.readouterr().out.replace("someone/model", str(quantized)) == local


@pytest.mark.parametrize("which", ["dense", "quantized"])
def test_eval_is_what_python_computes(which, request, dense, capsys):
    folder = request.getfixturevalue(which)
    arguments = ["eval", str(folder), "--text", str(dense / "text.txt"), "--seqlen", "32", "--windows", "3"]
    assert main([*arguments, "--json", "--speed", "4", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    expected = evaluate.perplexity(model, tokens, 32, 3, progress=False)
    assert found["value"] == pytest.approx(expected.value, rel=1e-5)
    assert found["tokens"] == 93 and found["tokens_per_second"] > 0
    assert (found["device"], found["dtype"]) == ("cpu", "torch.float32")
    assert main(arguments) == 0
    assert f"perplexity {expected.value:.4f} over 93 tokens (3 windows of 32)" in capsys.readouterr().out


def test_eval_against_itself_and_another(dense, quantized, capsys):
    arguments = ["eval", str(quantized), "--text", str(dense / "text.txt"), "--seqlen", "32", "--json", "--against"]
    found = []
    for other in (quantized, dense):
        assert main([*arguments, str(other)]) == 0
        found.append(json.loads(capsys.readouterr().out)["against"])
    assert abs(found[0]["kl"]) < 1e-6 and found[0]["same"] == 1
    assert found[1]["kl"] > 1e-4 and found[1]["same"] < 1 and found[1]["tokens"] == found[0]["tokens"]


def test_eval_in_another_dtype(dense, capsys):
    arguments = ["eval", str(dense), "--text", str(dense / "text.txt"), "--seqlen", "32", "--json"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "torch.bfloat16"


def test_generate_prints_what_the_model_adds(quantized, capsys):
    assert main(["generate", str(quantized), "--prompt", "the quick", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(quantized), AutoTokenizer.from_pretrained(quantized)
    tokens = tokenizer("the quick", return_tensors="pt")["input_ids"]
    written = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "The"], ["eval", "--text", __file__]], ids=lambda c: c[0]
)
def test_a_model_without_a_tokenizer(command, quantized, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(quantized / name, tmp_path)
    name, *options = command
    assert main([name, str(tmp_path), *options]) == 2
    assert "has no tokenizer that transformers can load; put that of" in capsys.readouterr().err


def test_generate_draws_what_the_seed_says(quantized, capsys):
    texts = []
    for options in ([], ["--temperature", "2"], ["--temperature", "2"], ["--temperature", "2", "--seed", "1"]):
        assert main(["generate", str(quantized), "--prompt", "the quick", "--max-new-tokens", "9", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] and len({texts[0], texts[1], texts[3]}) == 3
    assert main(["generate", str(quantized), "--prompt", "the", "--temperature", "-1"]) == 2
    assert "temperature must be a number from 0 on, got -1.0." in capsys.readouterr().err


def test_generate_uses_the_chat_template(finished, capsys):
    (finished / "chat_template.jinja").write_text("{% for m in messages %}the {{ m.content }} dog{% endfor %}")
    assert main(["generate", str(finished), "--prompt", "lazy", "--max-new-tokens", "5"]) == 0
    chat = capsys.readouterr().out
    assert main(["generate", str(finished), "--prompt", "the lazy dog", "--max-new-tokens", "5", "--raw"]) == 0
    assert capsys.readouterr().out == chat
    assert main(["generate", str(finished), "--prompt", "lazy", "--max-new-tokens", "5", "--raw"]) == 0
    assert capsys.readouterr().out != chat


# Options


def test_every_field_is_an_option_with_its_default_and_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["quantize", "--help"])
    assert exit.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert (f"--{name.replace('_', '-')} " in printed) == (name not in NOT_OPTIONS), name
        if name not in (*NOT_OPTIONS, "dataset"):
            assert field.metadata["help"] in printed
            assert field.default is None or f"(default: {field.default})" in printed


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([], {}),
        (["--critical-ratio", "0.1", "--importance", "weight"], {"critical_ratio": 0.1, "importance": "weight"}),
        (["--dataset", "none"], {"dataset": None}),
        (
            ["--modules-to-not-convert", "q_proj", "--modules-to-not-convert", "o_proj"],
            {"modules_to_not_convert": ["q_proj", "o_proj"]},
        ),
        (
            ["--device", "cpu", "--work-dir", "here", "--tokenizer", "t"],
            {"device": "cpu", "work_dir": "here", "tokenizer": "t"},
        ),
    ],
)
def test_options_reach_the_config(options, fields, monkeypatch):
    given = []

    def record(source, out, config, gguf_file, loading):
        given.append((source, out, config, gguf_file, loading))
        raise ValueError("that is all")

    monkeypatch.setattr(quantize, "convert", record)
    places = ["--revision", "v2", "--subfolder", "sub", "--trust-remote-code"]
    assert main(["quantize", "model", "out", *options, "--gguf-file", "m.gguf"]) == 2
    assert main(["quantize", "model", "out", *options, *places]) == 2
    loading = {"revision": "v2", "subfolder": "sub", "trust_remote_code": True}
    config = CRVQConfig(**fields)
    assert given == [("model", "out", config, "m.gguf", {}), ("model", "out", config, None, loading)]


# Errors


def test_errors_are_one_line(dense, quantized, tmp_path, capsys):
    text, file = dense / "text.txt", tmp_path / "file"
    file.write_text("something")
    out = tmp_path / "out"
    for arguments, message in [
        (["quantize", tmp_path / "no" / "model", out], "There is no folder"),
        (["quantize", file, out], "is a file"),
        (["quantize", "no/such-model", out], "couldn't connect|cannot find|could not|not.*cached"),
        (["quantize", quantized, out], r"already quantized \(crvq\)"),
        (["quantize", dense, out, "--nbits-per-codebook", "13"], "must be an integer from 4 to 12, got 13"),
        (["quantize", dense, out, "--nsamples", "many"], "argument --nsamples: invalid int value: 'many'"),
        (["quantize", dense, out, "--nsample", "3"], "unrecognized arguments: --nsample 3"),
        ([*command(dense, out), "--dataset", tmp_path / "none.txt"], "is no file"),
        ([*command(dense, out), "--seqlen", "129"], "seqlen=129 is more than the 128 tokens"),
        (["quantize", dense, out, "--device", "warp"], "device must be a device"),
        (["quantize", dense, file / "out"], "Cannot write in"),
        (["quantize", dense], "required: OUT"),
        (["eval", quantized, "--text", tmp_path / "none.txt"], "is no file"),
        (["eval", quantized, "--text", text, "--seqlen", "4096"], "from 2 to the 128 tokens"),
        (["eval", quantized], "give --text FILE, --tasks NAME or both"),
        (["eval", quantized, "--tasks", "x", "--against", quantized], "give --text FILE too"),
        (["generate", quantized, "--prompt", ""], "The prompt is empty"),
        (["generate", quantized, "--prompt", "a", "--max-new-tokens", "0"], "at least 1, got 0"),
        (["info", tmp_path], "holds no config.json"),
        (["info", tmp_path / "a" / "b"], "There is no folder"),
        (["info", "no/such-model"], "couldn't connect|cannot find|could not|not.*cached"),
        (["sing"], "invalid choice"),
        ([], "required: COMMAND"),
    ]:
        assert re.search(message, error_of(capsys, arguments)), arguments
    assert siblings(out) == [] and file.read_text() == "something"


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="There is no folder"):
        main(["info", str(tmp_path / "no" / "model"), "--debug"])
    monkeypatch.setenv("CRVQ_DEBUG", "1")
    with pytest.raises(ValueError, match="There is no folder"):
        main(["info", str(tmp_path / "no" / "model")])


def test_bugs_are_not_hidden(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_interrupt(monkeypatch, dense, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "convert", interrupt)
    assert main(command(dense, tmp_path / "out")) == 130
    assert "the same command again continues" in capsys.readouterr().err


# What is in the way


def test_the_same_command_again_does_nothing(dense, quantized, no_work, capsys):
    before = {path: path.stat().st_mtime_ns for path in quantized.iterdir()}
    assert main(command(dense, quantized)) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in quantized.iterdir()} == before


def test_another_command_does_not_overwrite(dense, quantized, no_work, capsys):
    assert "result of another command" in error_of(capsys, command(dense, quantized, "--seed", "1"))
    assert (quantized / "config.json").is_file()


@pytest.mark.parametrize("damage", ["another file", "no report", "a file"])
def test_something_else_is_not_overwritten(dense, tmp_path, no_work, capsys, damage):
    out = tmp_path / "out"
    if damage == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("report.json" if damage == "no report" else "thesis.txt")).write_text("mine")
    content = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert "holds something else" in error_of(capsys, command(dense, out))
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == content


def test_an_empty_folder_is_taken(dense, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(command(dense, tmp_path / "out")) == 0
    assert (tmp_path / "out/config.json").is_file()


def test_the_folder_of_someone_else_is_not_removed(dense, tmp_path, no_work, capsys):
    other = tmp_path / "out.tmp"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "is in the way" in error_of(capsys, command(dense, tmp_path / "out"))
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_a_killed_run_left_is_replaced(dense, tmp_path):
    left = tmp_path / "out.tmp"
    left.mkdir()
    (left / convert._UNFINISHED).touch()
    (left / "model-00007-of-00008.safetensors").write_text("half")
    assert main(command(dense, tmp_path / "out")) == 0
    assert siblings(tmp_path / "out") == ["out"]
    assert not (tmp_path / "out/model-00007-of-00008.safetensors").exists()


def test_a_disk_that_is_too_small_is_seen_first(dense, tmp_path, no_work, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    message = error_of(capsys, command(dense, tmp_path / "out"))
    assert re.search(r"has 0 MB of free space, the result and the work folder need \d+ MB", message)
    assert siblings(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
    ids=["full disk", "full disk in safetensors", "broken disk"],
)
def test_a_save_that_fails_leaves_the_work_and_no_half_result(dense, tmp_path, monkeypatch, capsys, failure, message):
    out = tmp_path / "out"

    def save_half(self, folder, **kwargs):
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as context:
        context.setattr(PreTrainedModel, "save_pretrained", save_half)
        found = error_of(capsys, command(dense, out))
    assert message in found and f"{out}.work" in found and "run the same command again" in found
    assert siblings(out) == ["out.work"]

    with monkeypatch.context() as context:  # the same command again has nothing left to quantize
        context.setattr(quantize_block, "fit_weight", None)
        assert main(command(dense, out)) == 0
    assert siblings(out) == ["out"]
    AutoModelForCausalLM.from_pretrained(out)


def test_a_work_folder_can_be_named(dense, tmp_path, monkeypatch):
    used = []
    quantize_model = convert.quantize_model

    def record(model, tokenizer, config, options):
        used.append(config.work_dir)
        return quantize_model(model, tokenizer, config, options)

    monkeypatch.setattr(convert, "quantize_model", record)
    assert main(command(dense, tmp_path / "out", "--work-dir", str(tmp_path / "elsewhere"))) == 0
    assert used == [str(tmp_path / "elsewhere")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_is_no_work_folder_is_not_touched(dense, tmp_path, no_work, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    message = error_of(capsys, command(dense, tmp_path / "out", "--work-dir", str(mine)))
    assert "not empty and not a work folder" in message
    assert (mine / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_keeps_its_work_and_continues(dense, tmp_path, monkeypatch, capsys):
    out, fitted, fit_weight = tmp_path / "out", [], quantize_block.fit_weight

    def stop_at_the_last_layer(*args, **kwargs):
        if len(fitted) == 13:
            raise KeyboardInterrupt
        fitted.append(1)
        return fit_weight(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(quantize_block, "fit_weight", stop_at_the_last_layer)
        assert main(command(dense, out)) == 130
    assert siblings(out) == ["out.work"]
    with monkeypatch.context() as context:
        context.setattr(
            quantize_block, "fit_weight", lambda *a, **options: fitted.append(1) or fit_weight(*a, **options)
        )
        assert main(command(dense, out)) == 0
    assert len(fitted) == 13 + 7  # the layers of the first block once, those of the second again
    assert siblings(out) == ["out"]


# The machine


@pytest.mark.parametrize("choice", [None, "torch", "scalar"])
def test_doctor_names_the_path_and_checks_it(monkeypatch, capsys, choice):
    if choice is not None:
        monkeypatch.setenv("CRVQ_CPU", choice)
    cpu.library.cache_clear()
    if choice == "scalar" and not cpu.binding.FILE.exists():
        pytest.skip("no compiled kernel here")
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    name = "torch" if cpu.library() is None else cpu.INSTRUCTIONS[cpu.library().level]
    assert f"cpu ({name}): tables; agrees with the reference" in printed
    assert re.findall(r"^for (\d+) tokens? +cpu ", printed, re.MULTILINE) == ["1", "8", "64", "2048"]
    if choice is not None:
        assert f"cpu ({choice}): dequantize + matmul; agrees with the reference" in printed
        assert re.search(rf"^cpu kernel +(scalar|none, PyTorch instead): CRVQ_CPU={choice}$", printed, re.MULTILINE)
    cpu.library.cache_clear()
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    assert re.search(r"^fast bfloat16 +(yes|no)$", printed, re.MULTILINE)


def test_doctor_sees_a_wrong_kernel(monkeypatch, capsys):
    linear = doctor.linear
    monkeypatch.setattr(doctor, "linear", lambda *args: linear(*args) * 1.05)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "DIFFERS from the reference" in capsys.readouterr().out


def test_as_a_module(tmp_path):
    result = subprocess.run([sys.executable, "-m", "crvq_hf", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "quantize" in result.stdout, result.stderr
