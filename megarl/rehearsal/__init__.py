"""A run rehearsed at full size on one machine: every distinct rank's shard of the real model, and what each phase of a
step takes of a GPU's memory. Nothing real is allocated and nothing communicates."""
