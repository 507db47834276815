"""Generation: the only door to vLLM.

vLLM reads its environment while it is imported, so this package sets it before any of its modules can.
"""

from megarl.rollout.vllm_setup import prepare

prepare()
