"""benchmarks/speed/plan.py: the table of plans."""

from benchmarks.speed import plan


def test_a_row_for_each_model_and_machine(capsys, monkeypatch):
    monkeypatch.setattr(plan, "MODELS", {"small": (64, 128, 2, 2, 1, 32, 100, False)})
    plan.main(["--table"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + len(plan.MACHINES) and all(len(row) == len(rows[0]) for row in rows)
    assert {row[-1] for row in rows[2:]} == {"yes"}
    assert all(float(value) > 0.4 for row in rows[2:] for value in row[3].split(" / "))
