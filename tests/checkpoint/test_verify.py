"""`crvq verify`, hashes, and a disk that is full: nothing is lost unseen."""

import errno
import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.headers import files_of_folder
from crvq_hf.checkpoint.metadata import tensor_hash
from crvq_hf.checkpoint.verify import verify
from crvq_hf.commands import cli, convert
from crvq_hf.resources import workfolder

LAYER = "model.layers.1.mlp.up_proj"
FAST = {"dataset": None, "block_finetune_epochs": 0, "e2e_finetune_epochs": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a whole and two sharded checkpoints, 16-bit, tied 8-bit and tied 2.5-bit embeddings."""
    folder = tmp_path_factory.mktemp("verify")
    for name, bits, tied in (("whole", 16, False), ("sharded", 8, True), ("coded", 2.5, True)):
        work_dir = folder / f"{name}.work"
        config = CRVQConfig(**FAST, embedding_bits=bits, work_dir=work_dir)
        model = quantize_model(tiny_model(tie_word_embeddings=tied), config=config)
        model.save_pretrained(folder / name, max_shard_size="1GB" if name == "whole" else "8KB")
    return folder


@pytest.fixture(params=["whole", "sharded", "coded"])
def saved(request, models, tmp_path):
    """A copy of a checkpoint that a test may spoil."""
    return shutil.copytree(models / request.param, tmp_path / "saved")


@pytest.fixture
def whole(models, tmp_path):
    return shutil.copytree(models / "whole", tmp_path / "whole")


def main(capsys, folder) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = cli.main(["verify", str(folder)])
    return code, capsys.readouterr().out.splitlines()


def rewrite(folder, change, keep_hashes: bool = True) -> None:
    """Rewrites the file of the layer `LAYER` after `change` has edited its tensors in place."""
    file = next(f for f in files_of_folder(folder) if f"{LAYER}.weight" in load_file(f))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata if keep_hashes else {"format": "pt"})


def test_what_was_saved_is_whole(saved, capsys):
    code, lines = main(capsys, saved)
    assert code == 0 and len(lines) == 1
    assert lines[0].endswith("all as they were saved (sha256), config.json too.")


def test_hashes_are_of_what_is_stored(saved):
    recorded = None
    for file in files_of_folder(saved):
        with safe_open(file, "pt") as opened:
            found = json.loads(opened.metadata()["crvq_sha256"])
            assert recorded in (None, found)
            recorded = found
    stored = {name: t for file in files_of_folder(saved) for name, t in load_file(file).items()}
    assert recorded == {name: tensor_hash(tensor) for name, tensor in stored.items()}


def test_saving_again_gives_the_same_hashes(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "again/model.safetensors", "pt") as again,
        safe_open(files_of_folder(saved)[0], "pt") as f,
    ):
        assert again.metadata()["crvq_sha256"] == f.metadata()["crvq_sha256"]


def test_the_hash_knows_dtype_and_shape():
    tensor = torch.zeros(4, 6)
    assert len({tensor_hash(t) for t in (tensor, tensor.view(6, 4), tensor.view(torch.int32), tensor.view(-1))}) == 4
    assert tensor_hash(tensor.t()) == tensor_hash(tensor.t().contiguous())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[f"{LAYER}.weight"].view(-1)[9].add_(1), f"{LAYER}.weight in .* has changed since it was saved"),
        (lambda t: t.update(extra=torch.ones(2)), "extra was not saved with the others"),
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale was saved, but is missing"),
        (
            lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(3).half()}),
            "up_proj.weight is U8 .64, 5., expected U8 .3, 5.",
        ),
    ],
    ids=["number", "extra", "missing", "shape"],
)
def test_every_change_is_named(whole, capsys, change, problem):
    rewrite(whole, change)
    code, lines = main(capsys, whole)
    assert code == 1 and any(re.search(problem, line) for line in lines), lines
    assert len(set(lines)) == len(lines)


def test_old_checkpoints_have_no_hashes_and_are_checked_otherwise(whole, capsys):
    rewrite(whole, lambda tensors: None, keep_hashes=False)
    code, (line,) = main(capsys, whole)
    assert code == 0 and "carry no hashes" in line and "save the model again" in line

    def spoil(tensors):
        tensors[f"{LAYER}.weight_scale"][3] = torch.inf
        tensors["model.layers.0.mlp.up_proj.weight_order"][0] = 7
        tensors["model.layers.0.mlp.up_proj.weight_order"][1] = 7

    rewrite(whole, spoil, keep_hashes=False)
    code, lines = main(capsys, whole)
    assert code == 1 and len(lines) == 2
    assert "weight_order must hold every channel" in lines[0] and f"{LAYER}.weight_scale holds NaN" in lines[1]


def test_a_changed_config_is_seen(saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config, indent=7))
    assert main(capsys, saved)[0] == 0  # another layout says the same
    (saved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    code, lines = main(capsys, saved)
    assert code == 1 and "config.json is not the one that was saved" in lines[0]


def test_shards_of_two_models(models, tmp_path, capsys):
    mixed = shutil.copytree(models / "sharded", tmp_path / "mixed")
    other = quantize_model(tiny_model(tie_word_embeddings=True), config=CRVQConfig(
        **FAST, embedding_bits=8, seed=1, work_dir=tmp_path / "work"))  # fmt: skip
    other.save_pretrained(tmp_path / "other", max_shard_size="8KB")
    name = files_of_folder(mixed)[2].name
    shutil.copy(tmp_path / "other" / name, mixed / name)
    code, lines = main(capsys, mixed)
    assert code == 1 and any(line.startswith(f"{name} was not saved together with the other files") for line in lines)


def test_an_index_that_lies(models, tmp_path, capsys):
    folder = shutil.copytree(models / "sharded", tmp_path / "folder")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    first, name = next(
        (f, n) for n, f in index["weight_map"].items() if list(index["weight_map"].values()).count(f) > 1
    )
    index["weight_map"][name] = last
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(capsys, folder) == (1, [f"{name}: the index says that it is in {last}, it is in {first}."])


@pytest.mark.parametrize("spoil", ["no config", "no json", "dense", "truncated", "no tensors", "not utf-8"])
def test_what_cannot_be_read_is_one_line(whole, capsys, spoil):
    config, file = whole / "config.json", whole / "model.safetensors"
    {
        "no config": lambda: config.unlink(),
        "no json": lambda: config.write_text("{"),
        "dense": lambda: config.write_text("{}"),
        "truncated": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "no tensors": lambda: file.unlink(),
        "not utf-8": lambda: config.write_bytes(b"\xff{}"),
    }[spoil]()
    code, lines = main(capsys, whole)
    assert code == 1 and len(lines) == 1, lines


def test_what_is_no_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        verify(tmp_path / "nothing")


def test_loading_runs_no_code_from_a_checkpoint(whole, tmp_path, monkeypatch):
    """Neither pickles nor Python files in the folder are so much as opened."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    (whole / "modeling_trap.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')")
    torch.save({"x": Trap()}, whole / "pytorch_model.bin")
    torch.save({"x": Trap()}, whole / "training_args.bin")
    config = json.loads((whole / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    (whole / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    monkeypatch.setattr(torch, "load", None)
    AutoModelForCausalLM.from_pretrained(whole)
    verify(whole)
    (whole / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="consists of safetensors files"):
        AutoModelForCausalLM.from_pretrained(whole)
    assert not (tmp_path / "trapped").exists()


# A full disk


FULL = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space (os error 28)")]


@pytest.fixture
def dense(tmp_path):
    return save_tiny(tmp_path / "dense")


def error_of(capsys, arguments) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crvq: error: ")]
    return line


def test_a_device_that_is_really_full(tmp_path):
    """/dev/full answers every write as a full disk does."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "fingerprint.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="The disk is full: .*fingerprint.json could not be written; free") as error:
        workfolder.WorkFolder(folder, {})
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == [".lock"]
    with workfolder.WorkFolder(folder, {}) as work:
        work.save("block", {"a": torch.ones(9)})


@pytest.mark.parametrize("failure", FULL, ids=["os", "safetensors"])
@pytest.mark.parametrize("point", range(7))
def test_a_disk_that_fills_up_at_any_write(dense, tmp_path, monkeypatch, capsys, failure, point):
    """The writes of a run, one after the other, fail; then the same command again succeeds."""
    out, calls = tmp_path / "out", []
    command = ["quantize", dense, out, "--dataset", "none", "--e2e-finetune-epochs", "0"]

    def failing(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == point + 1:
                raise failure
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as context:
        context.setattr(workfolder, "save_file", failing(workfolder.save_file))
        context.setattr(PreTrainedModel, "save_pretrained", failing(PreTrainedModel.save_pretrained))
        context.setattr(convert, "_remove_indentation", failing(convert._remove_indentation))
        context.setattr(convert, "flush", failing(convert.flush))
        message = error_of(capsys, command)
    assert "disk is full" in message and "run the same command again" in message
    assert not out.exists() and not (tmp_path / "out.tmp").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert cli.main([str(argument) for argument in command]) == 0
    assert main(capsys, out)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
