"""Where the result goes: folders that are there, links, what cannot be written in; results that are out of date."""

import json
import os
import shutil
from pathlib import Path

import pytest
from made import SETTINGS
from random_models import quantize_randomly
from tiny import TEXT, save_tiny
from transformers import AutoModelForCausalLM
from whole_models import quantized_layers

from crvq_hf import CRVQConfig
from crvq_hf.commands import convert, quantize
from crvq_hf.commands.cli import main
from crvq_hf.commands.convert import finished_report
from crvq_hf.quantizer import CRVQQuantizer
from crvq_hf.resources.workfolder import WorkFolder
from crvq_hf.sharing.report import command_line, read_quantized

REPORT = {
    "seconds": {"quantizing": 1.0},
    "calibration_tokens": 32,
    "activation_bytes": 1,
    "peak_memory_bytes": 1,
    "e2e_loss": None,
}


@pytest.fixture
def dense(tmp_path):
    return save_tiny(tmp_path / "dense")


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """Puts random codes in the place of those that quantizing finds; returns the work folders of all runs."""
    used = []

    def quantize_model(model, tokenizer, config, options):
        used.append(Path(config.work_dir))
        with WorkFolder(config.work_dir, {"seed": config.seed}) as work:
            work.save("calibration", {})
            quantize_randomly(model, tokenizer, config)
            work.finish()
        CRVQQuantizer(config, pre_quantized=True).attach(model)
        layers = quantized_layers(model).items()
        lines = {name: {"relative_error": 0.1, "bits_per_weight": 1, "seconds": 1} for name, _ in layers}
        bits = sum(8 * layer.quantized_weight().nbytes for _, layer in layers)
        weights = sum(layer.in_features * layer.out_features for _, layer in layers)
        model.crvq_report = REPORT | {"layers": lines, "bits_per_weight": bits / weights}

    monkeypatch.setattr(convert, "quantize_model", quantize_model)
    monkeypatch.setattr(convert, "draw_if_possible", lambda out: None)
    return used


def run(dense, out, *options) -> int:
    fields = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return main(["quantize", str(dense), str(out), "--dataset", str(dense / "text.txt"), *fields, *map(str, options)])


def check_complete(out: Path) -> None:
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json"} <= {
        path.name for path in out.iterdir()
    }
    AutoModelForCausalLM.from_pretrained(out)


def refuse_to_rename(monkeypatch, folder: Path) -> None:
    """Makes `folder` what a mount point is: nothing can take its place, nothing can be moved to it from outside."""
    replace = os.replace

    def checked(source, target):
        inside = [folder in Path(path).resolve().parents for path in (source, target)]
        if Path(target).resolve() == folder or inside[0] != inside[1]:
            raise OSError(18, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)


def test_a_mount_point_takes_the_result_and_nothing_is_made_beside_it(dense, tmp_path, monkeypatch, runs):
    mounted = tmp_path / "volume" / "out"
    (mounted / "lost+found").mkdir(parents=True)
    refuse_to_rename(monkeypatch, mounted)
    inode = mounted.stat().st_ino
    assert run(dense, mounted) == 0
    check_complete(mounted)
    assert mounted.stat().st_ino == inode and os.listdir(mounted.parent) == ["out"]
    assert runs == [mounted / ".crvq-unfinished" / "work"]


def test_the_current_folder_takes_the_result(dense, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run(dense, ".", "--evaluate", dense / "text.txt", "--evaluate-seqlen", 32) == 0
    check_complete(here)
    assert read_quantized(Path("."))[1]["evaluation"]["seqlen"] == 32
    assert Path.cwd() == here and Path("config.json").is_file()


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "nothing yet"])
def test_a_link_leads_to_the_result(dense, tmp_path, there):
    target, link = tmp_path / "disk" / "model", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.mkdir()
    link.symlink_to(target)
    assert run(dense, link) == 0
    assert link.is_symlink()
    check_complete(target)
    assert os.listdir(target.parent) == ["model"]


def test_a_link_in_a_circle_is_refused(dense, tmp_path, runs, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert run(dense, tmp_path / "link") == 2
    assert not runs and "name another output" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False], ids=["out", "the folder around it"])
def test_a_folder_that_cannot_be_written_in_is_refused_first(dense, tmp_path, runs, monkeypatch, capsys, there):
    closed = tmp_path / "closed"
    closed.mkdir()
    out = closed if there else closed / "out"

    def refuse(dir):
        assert Path(dir) == closed
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(convert.tempfile, "TemporaryFile", refuse)
    assert run(dense, out) == 2
    assert not runs and f"Cannot write in {closed} (Permission denied)" in capsys.readouterr().err


def test_a_folder_that_is_there_needs_no_writable_one_around_it(dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(convert, "_check_writable", lambda folder: folder == out or pytest.fail(f"{folder} is tried"))
    assert run(dense, out) == 0


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_while_files_are_moved_leaves_no_half_result(dense, tmp_path, runs, monkeypatch, moved):
    """Before the weights are there nothing can be loaded; the same command goes on."""
    out, replace, count = tmp_path / "out", os.replace, 0
    out.mkdir()

    def replace_some(source, target):
        nonlocal count
        if Path(target).parent == out:
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", replace_some)
        assert run(dense, out) == 130
    assert not (out / "report.json").exists()
    assert not (out / "model.safetensors").exists() or (out / "config.json").exists()
    assert run(dense, out) == 0
    check_complete(out)
    assert runs == [out / ".crvq-unfinished" / "work"] * 2


def test_a_work_folder_inside_the_output_is_not_in_the_way(dense, tmp_path, runs, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as context:
        context.setattr(convert, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(dense, out, "--work-dir", out / "work") == 130
    assert os.listdir(out) == ["work"]
    assert run(dense, out, "--work-dir", out / "work") == 0
    check_complete(out)
    assert not (out / "work").exists()


def test_a_failure_leaves_a_folder_as_it_was(dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()

    def fail(model, tokenizer, config, options):
        with WorkFolder(config.work_dir, {}):
            raise ValueError("no")

    monkeypatch.setattr(convert, "quantize_model", fail)
    assert run(dense, out) == 2 and not list(out.iterdir())


@pytest.mark.parametrize(
    "options", [["--dataset", "no.txt"], ["--evaluate", "no.txt"], ["--dataset", "no.jsonl:field"]]
)
def test_a_text_that_is_not_there_is_told_before_the_model_is_loaded(dense, tmp_path, monkeypatch, capsys, options):
    for module in (convert, quantize):
        monkeypatch.setattr(module, "load_dense" if module is convert else "load", None)
    assert run(dense, tmp_path / "out", *options) == 2
    assert "is no file; give the path of a" in capsys.readouterr().err


# Stale results


def other_theta(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (dense / "config.json").write_text(json.dumps(config))


def other_weight(dense: Path) -> None:
    weights = bytearray((dense / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (dense / "model.safetensors").write_bytes(weights)


def other_text(dense: Path) -> None:
    (dense / "text.txt").write_text(f"{TEXT}more")


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_text, "the calibration data"), (other_theta, "the model's files"), (other_weight, "the model's files")],
)
def test_a_result_whose_model_or_text_has_changed_is_not_called_finished(
    dense, tmp_path, runs, capsys, change, message
):
    assert run(dense, tmp_path / "out") == 0
    assert run(dense, tmp_path / "out") == 0 and "nothing to do" in capsys.readouterr().err
    change(dense)
    assert run(dense, tmp_path / "out") == 2
    assert f"but {message} changed since; name another output" in capsys.readouterr().err and len(runs) == 1


def test_another_tokenizer_is_another_result(dense, tmp_path, runs, capsys):
    assert run(dense, tmp_path / "out") == 0
    assert run(dense, tmp_path / "out", "--tokenizer", dense) == 2
    assert "the tokenizer changed since" in capsys.readouterr().err


def test_a_result_from_before_there_were_hashes_is_still_one(dense, tmp_path):
    config = CRVQConfig(dataset=str(dense / "text.txt"), **SETTINGS)
    convert.convert(str(dense), tmp_path / "out", config)
    report = tmp_path / "out" / "report.json"
    report.write_text(report.read_text().replace('"inputs"', '"of old"'))
    assert finished_report(str(dense), tmp_path / "out", config)["command"]


# Where the model is


def test_a_model_in_a_subfolder_is_read_there_with_its_tokenizer(dense, tmp_path, runs, capsys):
    shutil.move(dense, tmp_path / "inner")
    dense.mkdir()
    shutil.move(tmp_path / "inner", dense / "inner")
    shutil.copy(dense / "inner" / "text.txt", dense)
    assert run(dense, tmp_path / "out") == 2 and not runs
    assert run(dense, tmp_path / "out", "--subfolder", "inner") == 0
    check_complete(tmp_path / "out")
    capsys.readouterr()
    assert run(dense, tmp_path / "out", "--subfolder", "inner") == 0 and "nothing to do" in capsys.readouterr().err
    assert "--subfolder inner" in command_line(json.loads((tmp_path / "out/report.json").read_text()))
    measured = ["--text", str(dense / "text.txt"), "--seqlen", "32", "--windows", "1"]
    assert main(["eval", str(dense), "--subfolder", "inner", *measured]) == 0
    assert main(["generate", str(dense), "--subfolder", "inner", "--prompt", "the", "--max-new-tokens", "1"]) == 0


def test_an_adapter_is_to_be_merged_first(dense, tmp_path, runs, capsys):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copy(dense / "text.txt", tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "out") == 2
    assert "is a PEFT adapter; merge it into its base model first" in capsys.readouterr().err and not runs
