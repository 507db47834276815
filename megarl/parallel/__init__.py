"""Processes, groups and what is computed across them. Megatron's globals stay here and in `megarl.policy`."""

import sys
import warnings

if not sys.warnoptions:
    # Megatron warns in every process of each accelerator that is absent and of its own deprecations; a run's own lines
    # would drown in it. `python -W default` shows them.
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed\.checkpoint)")
