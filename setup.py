"""Packaging. The packages are listed one by one: the folder `kernels/` is no package itself, nor may become one.

Hugging Face has a package named `kernels`; an `__init__.py` in ours would hide it from everything started here.
"""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "crvq_hf/__init__.py").read_text(), re.MULTILINE).group(1)
DATASETS = "datasets>=3.0"  # for dataset="wikitext2" and "c4"
GGUF = "gguf>=0.10"  # for --gguf-file
REPORT = "matplotlib>=3.8"  # for report.html and report.png; whoever only loads a model needs none
SERVE = ["fastapi", "uvicorn", "openai>=1.98"]  # what transformers[serving] adds
LM_EVAL = "lm_eval>=0.4.9"  # for crvq eval --tasks


class BuildLibrary(build_ext):
    """Builds the CPU kernel as a plain shared library, loaded by name with ctypes: nothing in it is Python's."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)


# Optional: where there is no compiler the installation succeeds without it, and PyTorch code does its work.
CPU_KERNEL = Extension(
    "crvq_kernels.cpu.libcrvq_cpu",
    sources=sorted(glob("kernels/crvq_kernels/cpu/*.c", root_dir=ROOT)),
    depends=sorted(glob("kernels/crvq_kernels/cpu/*.h", root_dir=ROOT)),
    extra_compile_args=["-std=gnu11", "-O3", "-pthread", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    name="crvq-hf",
    version=VERSION,
    description="CRVQ (channel-relaxed vector quantization) for Hugging Face transformers, with Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["crvq_hf", "crvq_kernels", "crvq_kernels.cpu", "crvq_kernels.gpu"],
    py_modules=["crvq_autoload"],
    package_dir={"crvq_hf": "crvq_hf", "crvq_kernels": "kernels/crvq_kernels"},
    ext_modules=[CPU_KERNEL],
    cmdclass={"build_ext": BuildLibrary},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<6",
        "accelerate",
        "optimum",
        "safetensors",
        "huggingface_hub",
        "filelock",
        "tqdm",
        "numpy",
        "psutil",
        "triton>=3.2; platform_system=='Linux'",
    ],
    extras_require={
        "datasets": [DATASETS],
        "gguf": [GGUF],
        "report": [REPORT],
        "demo": [DATASETS, GGUF, REPORT],
        "serve": SERVE,
        "eval": [LM_EVAL],
        "dev": [
            *("pytest", "pytest-timeout", "hypothesis", "ruff", "setuptools>=77", "kernels", "peft"),
            *(GGUF, REPORT, *SERVE),
        ],
    },
    entry_points={
        "console_scripts": ["crvq = crvq_hf.commands.cli:main"],
        "torch.backends": ["crvq = crvq_autoload:install"],  # called by `import torch`
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
