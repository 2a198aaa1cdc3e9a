"""Every causal and image-text architecture of the installed transformers, one line each, in a table.

Each is tried in a process of its own, so that one that crashes or hangs does not end the others. `make sweep` writes
SWEEP.md; names as arguments try only those, and put their lines in place of the old ones. Some vision towers are
timm's: `pip install timm` for these.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from checks import AFTER, BEFORE, REFUSED, RIGHT, UNBUILT, WRONG, Verdict, architectures, check  # noqa: E402

SECONDS = 240
TABLE = HERE / "SWEEP.md"


def in_a_process(architecture: str) -> Verdict:
    """Returns the verdict on one architecture."""
    context = multiprocessing.get_context("fork")  # what is imported already need not be again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(check(architecture).to_dict()))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return Verdict(architecture, AFTER, why=f"not done after {SECONDS} seconds")
        return Verdict(**receiver.recv())
    except EOFError:
        process.join()
        return Verdict(architecture, AFTER, why=f"the process ended with exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def table(verdicts: list[Verdict]) -> str:
    """Returns the text of SWEEP.md."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    lines = [
        "# Every architecture, tried",
        "",
        "`make sweep` makes a tiny random model of every causal and image-text architecture that transformers "
        f"{transformers.__version__} knows, quantizes it with calibration, block and end-to-end tuning and embeddings "
        "in 8 bits, saves it, loads it (bit-equal logits), lets it write, runs it block by block against the whole, "
        "and dequantizes it. What is refused with the advice dataset=None is tried on weights alone too. "
        "Dense is the share of the weights of its blocks that stay dense.",
        "",
        f"{len(verdicts)} of {len(architectures())} tried: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in (RIGHT, REFUSED, WRONG, BEFORE, AFTER, UNBUILT))
        + ".",
        "",
        "| architecture | | dense | |",
        "| --- | --- | --- | --- |",
    ]
    for v in verdicts:
        share = "" if v.dense is None else f"{100 * v.dense:.0f} %"
        lines.append(f"| {v.architecture} | {v.verdict} | {share} | {v.why[:300].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def tried_before() -> dict[str, Verdict]:
    """Returns the verdicts that SWEEP.md has, by architecture."""
    rows = [line[2:-2].split(" | ", 3) for line in TABLE.read_text(encoding="utf-8").splitlines() if " | " in line]
    return {
        row[0]: Verdict(row[0], row[1], int(row[2].split()[0]) / 100 if row[2] else None, row[3])
        for row in rows
        if row[0] in architectures()
    }


def main(names: list[str]) -> None:
    """Tries the named architectures, or all, and writes the table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.DEBUG if os.environ.get("SWEEP_DEBUG") else logging.ERROR, format="%(message)s")
    for name in ("httpx", "urllib3", "filelock", "asyncio", "crvq"):
        logging.getLogger(name).setLevel(logging.ERROR)
    verdicts = tried_before() if names else {}
    check("llama")  # imports what all of them need, before the processes are made
    for name in names or architectures():
        verdicts[name] = v = in_a_process(name)
        print(name, v.verdict, "" if v.dense is None else f"{v.dense:.3f}", v.why[:300], flush=True)
        TABLE.write_text(table([verdicts[key] for key in sorted(verdicts)]), encoding="utf-8")  # it takes long


if __name__ == "__main__":
    main(sys.argv[1:])
