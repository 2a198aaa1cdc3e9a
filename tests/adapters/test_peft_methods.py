"""Every method in the registry of the installed PEFT is right on quantized layers or refused, as PEFT.md says."""

import re
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

from peft_methods import CASES, row, try_case  # noqa: E402

PAGE = (Path(__file__).parent / "PEFT.md").read_text(encoding="utf-8")
# What PEFT itself wants for some methods and does not install.
NEEDS = {"ADAMSS": "sklearn"}


def test_every_method_has_a_case():
    assert set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) == set(CASES), "try a new method, and put it into CASES"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "variant"), [(method, variant) for method in CASES for variant in CASES[method]])
def test_right_or_refused(method, variant):
    if method in NEEDS:
        pytest.importorskip(NEEDS[method])
    outcome = try_case(method, variant)
    assert outcome.right or outcome.sentence, outcome
    for sentence in filter(None, (outcome.sentence, outcome.merging)):
        assert len(sentence) < 400 and sentence.endswith((".", ". ", "README.md."))
    if peft.__version__ == re.search(r"with PEFT ([\d.]+),", PAGE)[1]:
        line = row(method, variant, outcome).partition("refused: ")[0]  # why may depend on what else is installed
        assert any(found.startswith(line) for found in PAGE.splitlines()), "run tests/adapters/peft_methods.py again"


def test_the_page_has_no_other_lines():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| [A-Z]", line)]
    assert len(lines) == sum(map(len, CASES.values()))
