"""benchmarks/speed/head.py: times only what was found right."""

import pytest

from benchmarks.speed import head

OPTIONS = ["--vocabulary", "64", "--channels", "32", "--tokens", "1", "3", "--times", "2"]


def test_a_line_for_each_dtype_and_number_of_tokens(capsys):
    head.main(OPTIONS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[d, t] for d in ("float32", "bfloat16", "float16") for t in "13"]


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = head.rows_linear
    monkeypatch.setattr(head, "rows_linear", lambda *arguments: right(*arguments) * 1.03)
    with pytest.raises(SystemExit, match="torch.float32, 1 tokens: the relative error of int8 is 0.0[23]"):
        head.main(OPTIONS)
