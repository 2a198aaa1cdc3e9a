"""Puts the root of the repository, where the package `benchmarks` lies, on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
