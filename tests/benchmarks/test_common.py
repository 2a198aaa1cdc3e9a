"""What the benchmarks share: turns and ratios, stamps, rows in files, tables."""

import functools
import itertools
import subprocess

import pytest

from benchmarks.common import rows, timing


@pytest.mark.parametrize(("warm", "turns"), [(False, "abab"), (True, "aabbaabb")])
def test_calls_take_turns(warm, turns):
    called, clock = [], itertools.count()
    calls = {name: functools.partial(called.append, name) for name in "ab"}
    assert timing.paired(calls, 2, lambda: next(clock), warm) == {"a": [1, 1], "b": [1, 1]}
    assert "".join(called) == "aabb" + turns


def test_ratio_is_the_median_of_pairs():
    times = {"slow": [10.0, 100.0, 40.0], "fast": [1.0, 20.0, 2.0]}
    assert timing.ratio(times, "slow", "fast") == 10
    assert timing.ratio(times, "slow", "other") is None


def test_rows_are_appended_below_one_header(tmp_path):
    path = tmp_path / "results" / "rows.csv"
    rows.append(path, [{"a": 1, "b": "x, y"}])
    rows.append(path, [])
    rows.append(path, [{"a": 2, "b": ""}, {"a": 3, "b": None}])
    assert path.read_text() == 'a,b\n1,"x, y"\n2,\n3,\n'
    assert rows.read(path)[0] == {"a": "1", "b": "x, y"}
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], the rows \['a', 'c'\]"):
        rows.append(path, [{"a": 4, "c": 5}])
    rows.replace(path, [{"c": 6}])
    assert path.read_text() == "c\n6\n"


@pytest.mark.parametrize("file", sorted(rows.RESULTS.glob("*.csv")), ids=lambda file: file.stem)
def test_committed_rows_can_be_added_to(file):
    first, *_ = found = rows.read(file)
    assert all(row.keys() == first.keys() and None not in row.values() for row in found)


def test_commit_says_whether_code_has_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "FIGURES", tmp_path / "figures")
    assert rows.commit() == "unknown"
    git("init")
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/rows.csv"):
        (tmp_path / name).write_text("before")
    git("add", ".")
    git("commit", "-m", "x")
    at = rows.commit()
    assert len(at) >= 7 and not at.endswith("+")
    (tmp_path / "results/rows.csv").write_text("after")
    assert rows.commit() == at
    (tmp_path / "code.py").write_text("after")
    assert rows.commit() == f"{at}+"


def test_tables():
    assert rows.markdown([{"a": 1, "b": None}]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    assert rows.aligned([["a", "long"], ["12", "x"]]) == " a  long\n12     x"


def test_versions():
    found = rows.versions("torch", "no-such-package")
    assert found["torch"].startswith("2.") and found["no-such-package"] == ""
