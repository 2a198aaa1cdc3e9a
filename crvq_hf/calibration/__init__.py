"""Calibration data as a model takes it: text to tokens, and samples of whatever else.

`text` reads texts and cuts them, `tokens` makes the sequences of a run of them, or has the model write its own, and
`samples` takes what is no text, such as sound.

Called by `pipeline`, and by `evaluation`, which reads the texts that it measures.
"""
