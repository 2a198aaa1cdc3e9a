"""Pushing to a hub with the real client, and loading back by id; the model card; what goes wrong.

The hub is `hub_server.py` on the loopback interface.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard
from made import SETTINGS
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.info import read_info
from crvq_hf.commands.cli import main
from crvq_hf.sharing.hub import card_text, licence_in, prepare, push

# What someone else does with the models, in a new process where crvq-hf is installed and not imported: load both by id
# and compare them with what was pushed.
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "crvq_hf" not in sys.modules

tokens = torch.arange(3, 27).view(2, 12)
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    there, here = (AutoModelForCausalLM.from_pretrained(source) for source in (name, folder))
    assert torch.equal(there(tokens).logits, here(tokens).logits), name
    there, here = (AutoTokenizer.from_pretrained(source)("quick").input_ids for source in (name, folder))
    assert there == here
    from crvq_hf.checkpoint.info import read_info  # only now
    assert read_info(name).bits_per_weight == read_info(folder).bits_per_weight
"""

EVALUATION = {
    "text": "held.txt",
    "text_sha256": "ab" * 32,
    "seqlen": 64,
    "most_windows": 9,
    "windows": 7,
    "tokens": 441,
    "device": "cpu",
    "dtype": "float32",
    "command": "crvq eval MODEL --text held.txt --seqlen 64 --windows 9",
    "before": {"value": 12.3456, "seconds": 1.0},
    "after": {"value": 78.9012, "seconds": 1.0},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client of this process talks to, logged in."""
    with running_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def files_of(hub, repo_id: str = "user/model") -> dict[str, bytes]:
    return hub.repositories[repo_id]["files"]


def card_of(hub, repo_id: str = "user/model") -> ModelCard:
    return ModelCard(files_of(hub, repo_id)["README.md"].decode())


def error_of(capsys, *arguments) -> str:
    """Returns the one line of an error exit, without what every such line starts with."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crvq: error: ")]
    assert len(lines) == 1
    return lines[0]


# Everything there and back


def test_pushed_and_loaded_by_id(made, installed, tmp_path):
    """By the command line and from memory; the environment is a user's, with nothing of the client replaced."""
    dense, out = made
    program = (
        "import sys; from crvq_hf.commands.cli import main; from transformers import AutoModelForCausalLM;"
        "assert main(['push', sys.argv[1], 'user/model']) == 0;"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub('user/again', max_shard_size='20KB')"
    )
    with running_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRITON_"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        pusher = environment | {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "pusher")}
        reader = environment | {"HF_HOME": str(tmp_path / "reader")}
        for variables, *command in (
            (pusher, sys.executable, "-c", program, out),
            (reader, *installed.python, "-c", STRANGER, "user/model", out, "user/again", out),
        ):
            result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
            assert result.returncode == 0, result.stdout + result.stderr
            if variables is pusher:
                assert result.stdout.strip() == f"{hub.url}/user/model"
        assert hub.repositories["user/model"]["commits"] == 2  # the empty one of its creation, and ours
        local = {path.name: path.read_bytes() for path in out.iterdir()}
        pushed = {
            name: content for name, content in files_of(hub).items() if name not in (".gitattributes", "README.md")
        }
        assert pushed == local
        assert sum(name.endswith(".safetensors") for name in files_of(hub, "user/again")) > 1
        cards = [card_of(hub, name) for name in ("user/model", "user/again")]
        measured = [card.text.partition("## Layers")[2] for card in cards]
        assert measured[0] == measured[1] and "q_proj" in measured[0]
        assert hub.missing == []
        part = [
            (method, path) for method, path in hub.requests if path == "/user/model/resolve/main/model.safetensors"
        ]
        assert ("GET", part[0][1]) in part


def test_nothing_private_is_pushed(made, hub):
    dense, out = made
    push(out, "user/model")
    for name, content in files_of(hub).items():
        for secret in (str(dense.parent), "private", TOKEN):
            assert secret.encode() not in content, (name, secret)


def test_an_old_report_loses_its_paths(out, hub):
    """Earlier versions wrote the absolute paths of model and text."""
    report = json.loads((out / "report.json").read_text())
    report["command"]["model"] = "/home/someone/secret/tiny-model"
    report["command"]["config"]["dataset"] = "/home/someone/secret/text.txt"
    del report["base_model"]
    (out / "report.json").write_text(json.dumps(report))
    push(out, "user/model")
    assert not any(b"someone" in content for content in files_of(hub).values())
    assert json.loads(files_of(hub)["report.json"])["command"]["model"] == "tiny-model"


def test_a_model_in_memory_brings_card_and_tokenizer(hub, made):
    dense, _ = made
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=CRVQConfig(dataset=str(dense / "text.txt"), **SETTINGS)
    )
    model.push_to_hub("user/model", private=True, tags="mine", commit_message="Mine")
    assert hub.repositories["user/model"]["private"]
    names = set(files_of(hub))
    assert {"tokenizer.json", "report.json", "report.png", "config.json", "model.safetensors", "README.md"} <= names
    data = card_of(hub).data
    assert data.base_model is None and {"crvq", "quantized", "mine"} <= set(data.tags)
    assert len(data.tags) == len(set(data.tags))
    assert f"| {model.crvq_report['calibration_tokens']} tokens |" in card_of(hub).text
    assert "tiny-model" in card_of(hub).text and str(dense.parent) not in card_of(hub).text


def test_what_was_measured_is_not_claimed_of_a_model_in_memory(hub, out):
    """It may have been trained since it was loaded."""
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | {"evaluation": EVALUATION}))
    AutoModelForCausalLM.from_pretrained(out).push_to_hub("user/model")
    assert "| perplexity | not measured |" in card_of(hub).text and "| v_proj | 2 |" in card_of(hub).text
    assert "evaluation" not in json.loads(files_of(hub)["report.json"])


def test_a_model_of_another_class_has_no_report(hub, made):
    """A head-less model has the same layers under other names."""
    model = AutoModel.from_pretrained(made[1])
    model.push_to_hub("user/model")
    assert "report.json" not in files_of(hub) and "| perplexity | not measured |" in card_of(hub).text


def test_a_model_without_a_past(hub):
    """Neither the tokenizer nor the origin is known: the card says nothing about them."""
    model = quantize_model(tiny_model(), config=CRVQConfig(dataset=None, **SETTINGS))
    model.push_to_hub("user/model", tokenizer=tiny_tokenizer())
    assert "tokenizer.json" in files_of(hub) and "| 0 tokens |" in card_of(hub).text
    assert "command" not in json.loads(files_of(hub)["report.json"])


def test_copies_push_themselves_and_dense_models_as_ever():
    model = quantize_model(tiny_model(), config=CRVQConfig(dataset=None, **SETTINGS))
    other = copy.deepcopy(model)
    assert other.push_to_hub.args[0] is other
    assert model.dequantize().push_to_hub.__func__ is PreTrainedModel.push_to_hub


def test_pushing_again_leaves_no_old_weights(out, hub):
    """A single file is preferred to shards by whoever loads: an old one would be loaded in place of the new shards."""
    push(out, "user/model")
    theirs = {"notes.txt": b"theirs", "adapter_model.safetensors": b"theirs"}
    hub.add("user/model")["files"] |= theirs
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(out, max_shard_size="20KB")
    (out / "model.safetensors").unlink(missing_ok=True)
    push(out, "user/model")
    names = set(files_of(hub))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names and theirs.keys() <= names
    assert {path.name for path in out.glob("*.safetensors")} == {n for n in names if re.match(r"model.*tensors$", n)}


def test_a_branch(out, hub):
    push(out, "user/model", revision="trial")
    assert "trial" in hub.repositories["user/model"]["branches"]
    assert ("POST", "/api/models/user/model/commit/trial") in hub.requests


# The card


def test_the_card_says_what_the_report_says(out, hub, capsys):
    report = json.loads((out / "report.json").read_text())
    report["base_model"] = "org/base"
    report["evaluation"] = EVALUATION
    (out / "report.json").write_text(json.dumps(report))
    hub.add("org/base", **{"README.md": b"---\nlicense: other\nlicense_name: base-licence\n---\n# Base"})
    push(out, "user/model")
    card = card_of(hub)
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"crvq", "quantized"} <= set(data["tags"])
    assert data["license"] == "other" and data["license_name"] == "base-licence"
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))
    info = read_info(str(out))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert rows["bits per weight of the quantized layers"].startswith(f"{report['bits_per_weight']:.4f},")
    assert rows["whole checkpoint"].startswith(f"{size:,} bytes")
    assert f"{sum(layer.nbytes for layer in info.layers.values()):,} bytes" in rows["quantized"]
    assert rows["perplexity before"] == "12.35" and rows["perplexity after"] == "78.90"
    assert rows["calibration"] == f"{report['calibration_tokens']} tokens"
    assert report["evaluation"]["command"] in card.text and "7 windows of 64 tokens" in card.text
    assert "pip install crvq-hf" in card.text and 'model="user/model"' in card.text
    assert "(report.png)" in card.text and "report.png" in files_of(hub)
    errors = [line["relative_error"] for name, line in report["layers"].items() if name.endswith("v_proj")]
    row = re.search(r"^\| v_proj \| 2 \| \S+ \| (\S+) \| (\S+) \|", card.text, re.MULTILINE)
    assert row.groups() == (f"{sum(errors) / 2:.4f}", f"{max(errors):.4f}")


def test_what_was_not_measured_is_not_claimed(out, hub):
    (out / "report.json").unlink()
    (out / "report.png").unlink()
    push(out, "user/model")
    card = card_of(hub)
    assert "| perplexity | not measured |" in card.text and "(report.png)" not in card.text
    assert card.data.base_model is None and card.data.license is None
    assert re.search(r"^\| v_proj \| 2 \| \S+ \| - \| - \| - \|$", card.text, re.MULTILINE)
    assert "calibration" not in card.text.partition("## Layers")[0].replace("calibration tokens", "")


def test_the_base_model_can_be_named(out, hub):
    hub.add("org/base", **{"README.md": b"---\nlicense: mit\n---\n"})
    push(out, "user/model", base_model="org/base")
    assert card_of(hub).data.base_model == "org/base" and card_of(hub).data.license == "mit"
    push(out, "user/model", base_model="org/unknown")
    assert card_of(hub).data.base_model == "org/unknown" and card_of(hub).data.license is None


def test_the_licence_of_a_local_base_model_is_kept(tmp_path):
    assert licence_in(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlicense_name: [1]\n---\n# Base")
    assert licence_in(tmp_path) == {"license": "apache-2.0"}
    for damaged in ("# No metadata", "---\n- a\n---\n", "---\n\tlicense: [\n---\n"):
        (tmp_path / "README.md").write_text(damaged)
        assert licence_in(tmp_path) is None


def test_the_users_own_card_is_pushed(out, hub):
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(out, "user/model")
    assert files_of(hub)["README.md"] == (out / "README.md").read_bytes()


def test_hidden_and_unfinished_files_stay_here(out, hub):
    (out / ".cache").mkdir()
    (out / ".cache" / "note").write_text("mine")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    push(out, "user/model")
    assert "additional_chat_templates/rag.jinja" in files_of(hub)
    assert not any("cache" in name for name in files_of(hub))


def test_a_dry_run_asks_nothing_and_shows_the_card(out, hub, capsys):
    assert main(["push", str(out), "user/model", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert card_text(prepare(out, "user/model")) in printed and "\nmodel.safetensors\n" in printed
    assert hub.requests == []


# What goes wrong


def test_no_token(out, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token for the hub; run hf auth login" in error_of(capsys, "push", out, "user/model")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("user/model", ["--token", "hf_wrong"], "does not accept this token for user/model"),
        ("other/model", [], "may not write to other/model .*name a repository of your own"),
        ("other/new", [], "may not write to other/new .*name a repository of your own"),
        ("user/public", ["--private"], "user/public exists and is public"),
        ("user/a/b", [], "Repo id must be"),
        ("user/mo del", [], "Repo id must"),
    ],
)
def test_refused(out, hub, capsys, repo_id, options, message):
    hub.add("other/model")
    hub.add("user/public")
    assert re.search(message, error_of(capsys, "push", out, repo_id, *options))
    assert all(repository["commits"] == 1 for repository in hub.repositories.values())


@pytest.mark.parametrize(
    ("request_", "answer", "message"),
    [
        (("PUT", "/upload/"), (403, "expired"), "may not write|answered 403"),
        (
            ("POST", "/commit/"),
            (413, "too large"),
            r"answered 413 for user/model \(.*too large.*nothing was committed",
        ),
        (("POST", "/preupload/"), (403, "storage is full"), "storage is full"),
        (("GET", "/api/models/user/model"), (404, "gone"), "has no user/model that this token may see"),
    ],
)
def test_a_push_that_fails_changes_nothing(out, hub, capsys, request_, answer, message):
    hub.fails[request_] = answer
    assert re.search(message, error_of(capsys, "push", out, "user/model"))
    assert list(files_of(hub)) == [".gitattributes"]
    hub.fails.clear()
    assert main(["push", str(out), "user/model"]) == 0


def test_no_hub(out, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in error_of(capsys, "push", out, "user/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, "push", out, "user/model")


def test_what_is_no_crvq_model(made, out, hub, tmp_path, capsys):
    dense, _ = made
    half = shutil.copytree(out, tmp_path / "half")
    (half / ".crvq-unfinished").touch()
    cut = shutil.copytree(out, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    other = shutil.copytree(out, tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(report | {"bits_per_weight": 1.0}))
    shards = shutil.copytree(out, tmp_path / "shards")
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(shards, max_shard_size="20KB")
    (shards / "model.safetensors").unlink(missing_ok=True)
    sorted(shards.glob("*.safetensors"))[-1].unlink()
    (tmp_path / "begun.work").mkdir()
    for folder, message in [
        (dense, "is no CRVQ model; give the output folder of crvq quantize"),
        (tmp_path / "none", "There is no folder"),
        (tmp_path / "begun", "is not finished; run the same crvq quantize command again"),
        (half, "is not finished; run the same crvq quantize command again"),
        (cut, "is truncated or damaged"),
        (other, "is the report of another model"),
        (shards, "cannot be read"),
        (Path(__file__), "There is no folder"),
    ]:
        assert message in error_of(capsys, "push", folder, "user/model"), folder
    assert hub.requests == []
