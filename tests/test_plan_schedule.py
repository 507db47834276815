"""Micro-batches in flight: closed forms, and Megatron's own schedules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules

from megarl.rehearsal.schedule import forward_passes, peak_of_chunks, warmup_passes


@pytest.mark.parametrize("pipeline", [1, 2, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 3, 12])
def test_1f1b_keeps_one_micro_batch_per_stage_behind(pipeline: int, micro_batches: int) -> None:
    for stage in range(pipeline):
        expected = min(pipeline - stage, micro_batches)
        assert peak_of_chunks([1.0], pipeline, stage, micro_batches) == expected


def test_interleaved_stages_keep_more() -> None:
    """Of p stages with v chunks each, stage s has 2 (p - s - 1) + (v - 1) p + 1 passes in flight."""
    for pipeline, chunks in ((2, 2), (4, 3), (8, 2)):
        for stage in range(pipeline):
            expected = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1
            assert peak_of_chunks([1.0] * chunks, pipeline, stage, 8 * pipeline) == expected
        # The first stage's share of activations is (1 + (p - 1) / (p v)) times that of 1F1B (arXiv 2104.04473).
        first = peak_of_chunks([1 / chunks] * chunks, pipeline, 0, 8 * pipeline)
        assert first == pytest.approx(pipeline * (1 + (pipeline - 1) / (pipeline * chunks)))


def test_chunks_of_unlike_size_by_hand() -> None:
    # Two stages, two chunks, stage 1: forward 0 0 | 1 1 0 0 ..., backward 1 1 0 0 ... from the third pass on.
    assert peak_of_chunks([10.0, 1.0], 2, 1, 2) == 10 + 10 + 1
    # With more micro-batches the first chunk's third pass comes while its first two are kept.
    assert peak_of_chunks([10.0, 1.0], 2, 1, 4) == 30.0


@pytest.mark.parametrize(("pipeline", "chunks", "micro_batches"), [(2, 2, 4), (4, 3, 12), (4, 1, 6), (3, 2, 3)])
def test_orders_are_those_of_megatron(pipeline: int, chunks: int, micro_batches: int) -> None:
    table = schedules.get_schedule_table(micro_batches, chunks, pipeline)
    if chunks > 1:
        assert forward_passes(chunks, pipeline, micro_batches) == [chunk for _, chunk in table]
    for stage in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
        virtual = chunks if chunks > 1 else None
        talk: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(micro_batches, chunks, pipeline, p2p_communicator=talk)
        assert warmup_passes(chunks, pipeline, stage, micro_batches) == warmup
