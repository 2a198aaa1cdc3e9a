"""Formats of layers that every kernel must know."""

import pytest

# in_group_size, nbits, num_extended, num_critical_groups; 144 channels are no multiple of any block.
FORMATS = [
    pytest.param(8, 8, 3, 2, id="d8-e8-E3"),
    pytest.param(4, 5, 1, 1, id="d4-e5-E1"),
    pytest.param(16, 10, 3, 9, id="d16-e10-all-critical"),
    pytest.param(8, 4, 0, 0, id="d8-e4-E0"),
    pytest.param(8, 9, 7, 1, id="d8-e9-E7"),
    pytest.param(8, 11, 1, 2, id="d8-e11-E1"),
    pytest.param(4, 12, 3, 3, id="d4-e12-E3"),
    pytest.param(4, 11, 7, 3, id="d4-e11-E7"),
    pytest.param(8, 12, 3, 0, id="d8-e12-none-critical"),
]
