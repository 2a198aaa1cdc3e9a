"""What is measured and checked by hand: `python -m benchmarks --help`. Nothing here is installed."""
