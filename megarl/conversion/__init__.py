"""Checkpoints from one format to the other, piece by piece, over any number of processes."""
