"""What can be cut how where weights are quantised in FP8: on multiples of 128 rows and columns. Torch-free."""

from __future__ import annotations

#: Rows and columns of a matrix that share a scale.
BLOCK = 128
