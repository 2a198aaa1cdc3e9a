"""What the benchmarks share: `commands` (arguments, processes, installs), `rows` (stamps, CSV, tables), `timing`."""
