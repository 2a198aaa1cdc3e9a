"""Packaging. The packages in `kernels/` are looked for there: that folder is no package itself, nor may become one.

Hugging Face has a package named `kernels`; an `__init__.py` in ours would hide it from everything started here.
"""

import re
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "crvq_hf/__init__.py").read_text(), re.MULTILINE).group(1)
DATASETS = "datasets>=3.0"  # for dataset="wikitext2" and "c4", and for tables (JSON, CSV, parquet)
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


class BuildModules(build_py):
    """Adds the file that Python reads at every start, which lies beside the modules, in an editable install too."""

    def run(self) -> None:
        super().run()
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.copy_file("crvq_autoload.pth", folder)


class TagWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on the platform of the library, on "any" where that could not be built."""

    def get_tag(self) -> tuple[str, str, str]:
        built = map(Path, self.get_finalized_command("build_ext").get_outputs())
        failed = self.distribution.have_run.get("build_ext") and not all(path.exists() for path in built)
        return "py3", "none", "any" if failed else super().get_tag()[2]


# Optional: where there is no compiler the installation succeeds without it, and PyTorch code does its work.
CPU_KERNEL = Extension(
    "crvq_kernels.cpu.libcrvq_cpu",
    sources=sorted(glob("kernels/crvq_kernels/cpu/*.c", root_dir=ROOT)),
    depends=sorted(glob("kernels/crvq_kernels/cpu/*.h", root_dir=ROOT)),
    extra_compile_args=["-std=gnu11", "-O3", "-fno-tree-slp-vectorize", "-pthread", "-fvisibility=hidden"],
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
    packages=find_packages(include=["crvq_hf*"]) + find_packages("kernels"),
    py_modules=["crvq_autoload", "crvq_import_hooks"],
    package_dir={"crvq_kernels": "kernels/crvq_kernels"},
    package_data={"crvq_kernels.gpu": ["*.cu"]},  # compiled where it runs
    ext_modules=[CPU_KERNEL],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildModules, "bdist_wheel": TagWheel},
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
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "setuptools>=77", "kernels", "peft"),
            "scikit-learn",  # of PEFT's AdaMSS
            *(DATASETS, GGUF, REPORT, *SERVE),
        ],
    },
    entry_points={
        "console_scripts": ["crvq = crvq_hf.commands.cli:main"],
        "vllm.general_plugins": ["crvq = crvq_hf.vllm:register"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
