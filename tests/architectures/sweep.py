"""Every causal and image-text architecture of the installed transformers, one line each, in a table.

Each is tried in a process of its own, so that one that crashes or hangs does not end the others. `make sweep` writes
SWEEP.md; names as arguments try only those, and print.
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
        "and dequantizes it. Dense is the share of the weights of its blocks that stay dense.",
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


def main(names: list[str]) -> None:
    """Tries the named architectures, or all, and writes the table if it is all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.DEBUG if os.environ.get("SWEEP_DEBUG") else logging.ERROR, format="%(message)s")
    for name in ("httpx", "urllib3", "filelock", "asyncio", "crvq"):
        logging.getLogger(name).setLevel(logging.ERROR)
    verdicts = []
    check("llama")  # imports what all of them need, before the processes are made
    for name in names or architectures():
        verdicts.append(in_a_process(name))
        v = verdicts[-1]
        print(name, v.verdict, "" if v.dense is None else f"{v.dense:.3f}", v.why[:300], flush=True)
        if not names:  # at once: it takes hours
            TABLE.write_text(table(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
