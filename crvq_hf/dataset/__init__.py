"""Calibration data: what names it, and reading what is named.

`grammar` is what a `dataset` may be, `rows` reads texts of tables, datasets of the hub and chats, `sound` recordings.

Called by `config`, which checks it, by `calibration`, and by `sharing`, which says no more of it than may be known.
"""
