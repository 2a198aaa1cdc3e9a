"""`python -m benchmarks`: what it lists is what there is, and every script starts."""

import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as command_line

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=str)
def test_all_are_listed_with_a_line_each(arguments, capsys):
    assert command_line.main(list(arguments)) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in listed] == list(command_line.FOLDERS)
    assert all(len(line) > 20 and line[-1] in ".:" for _, line in listed)


def test_every_script_is_listed():
    texts = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").rglob("*.py")}
    scripts = {name for name, text in texts.items() if "\ndef main(arguments" in text}
    assert scripts - {"__main__"} == set(command_line.FOLDERS)
    table = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in scripts - {"__main__"})


def test_listing_imports_none_of_them():
    program = "import sys, benchmarks.__main__ as b; b.main([]); assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("name", command_line.FOLDERS)
def test_help(name, capsys):
    if name == "gpu_tiles":
        pytest.importorskip("triton")
    with pytest.raises(SystemExit) as end:
        command_line.main([name, "--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"usage: python -m benchmarks {name} ")
    line = command_line.first_line(f"{command_line.FOLDERS[name]}/{name}.py")
    assert " ".join(line.split()) in out


def test_an_unknown_name_is_named():
    ended = run("nothing")
    assert ended.returncode == 2 and ended.stderr.startswith("There is no benchmark 'nothing'; there are embeddings, ")


def test_processes_of_a_script_find_it():
    """Under `-m` the main module has another name; what is sent to other processes must be found by its own."""
    pytest.importorskip("triton")
    ended = run("gpu", "--dry-run", "--dtypes", "fp16", "--jobs", "2")
    assert sorted(ended.stdout.splitlines()) == [
        "100x592 d16 e11 paper: ok",
        "72x80 d8 e8 default: ok",
        "72x80 d8 e8 paper: ok",
    ], ended.stderr
