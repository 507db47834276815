"""Processes, groups and what is computed across them. Megatron's globals stay here and in `megarl.policy`."""

from megarl.parallel import noise

noise.hold_back()
