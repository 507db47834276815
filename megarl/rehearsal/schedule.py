"""How many micro-batches a pipeline stage keeps the activations of, by Megatron's schedules. Pure.

Source: Megatron-core 0.19.2, `megatron/core/pipeline_parallel/schedules.py` (`get_pp_rank_microbatches`,
`get_schedule_table`): 1F1B, and interleaved 1F1B where a stage has several model chunks.
"""

from __future__ import annotations

from collections.abc import Sequence


def forward_passes(chunks: int, pipeline: int, micro_batches: int) -> list[int]:
    """The model chunk of each forward pass of a stage, in order. Backward passes have the chunks the other way round.

    >>> forward_passes(2, 2, 4)
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    if chunks == 1:
        return [0] * micro_batches
    return [
        chunk
        for start in range(0, micro_batches, pipeline)
        for chunk in range(chunks)
        for _ in range(start, min(start + pipeline, micro_batches))
    ]


def warmup_passes(chunks: int, pipeline: int, stage: int, micro_batches: int) -> int:
    """Forward passes of a stage before its first backward pass is due."""
    ahead = pipeline - stage - 1
    wanted = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * pipeline
    return min(wanted, chunks * micro_batches)


def peak_of_chunks(sizes: Sequence[float], pipeline: int, stage: int, micro_batches: int) -> float:
    """The most that a stage keeps at a time, where a pass of model chunk c keeps `sizes[c]` until its backward pass."""
    chunks = len(sizes)
    forward = forward_passes(chunks, pipeline, micro_batches)
    backward = [chunks - 1 - chunk for chunk in forward]
    warmup = warmup_passes(chunks, pipeline, stage, micro_batches)
    kept = peak = sum(sizes[chunk] for chunk in forward[:warmup])
    for done, chunk in enumerate(forward[warmup:]):
        kept += sizes[chunk]
        peak = max(peak, kept)
        kept -= sizes[backward[done]]
    return peak
