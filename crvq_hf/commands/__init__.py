"""The command line: arguments in, calls down, words out.

`cli` finds the command; each other file is one (`evaluate` is `crvq eval`), but for `options`, which several share,
and `convert`, the work of `crvq quantize`: a folder that is there complete or not at all.

Called by the entry point `crvq` and by `python -m crvq_hf`.
"""
