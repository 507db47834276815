"""Processes, groups and what is computed across them. Megatron's globals stay here and in `megarl.policy`."""

import os

from megarl.parallel import noise

noise.hold_back()
# Megatron would ask git at every import for the commit of the checkout around it, and take that for its own version.
os.environ.setdefault("NO_VCS_VERSION", "1")
