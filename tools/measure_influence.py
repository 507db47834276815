"""Measure what it takes to listen to attention (`megarl.policy.influence`) on the CPU: memory and time.

`memory` listens to one layer of random queries and keys and reports the most bytes that the allocator handed out
meanwhile (PyTorch's profiler, memory inside operations included): what a pass takes beside the model. `linear` is the
same for steps of --step tokens each, `worst` where every token is a step; both must grow as the tokens do.

`time` makes passes for log-probs of one sequence over a random model of Qwen2.5-1.5B's shape, with and without
listening, in turns, and reports processor time, of all threads together, and the median of the ratios. With fewer
--layers the vocabulary is as much smaller, so that the head's share of a pass stays that of all 28. --divide makes
hidden size, width of heads, MLP and vocabulary that much smaller: the linear layers' work falls with its square, the
logits' in proportion, the softmax's not at all, so that --divide 1 alone has the real share. Shares of the work are of
multiplications, by formula.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

EXAMPLES = """examples:
  python tools/measure_influence.py memory
  python tools/measure_influence.py time --divide 8
  python tools/measure_influence.py time --layers 2
"""
#: Qwen2.5-1.5B.
LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, MLP, VOCABULARY = 28, 12, 2, 128, 1536, 8960, 151936


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that are allocated at a time and were not before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events: list[Any] = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    moves = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    return int(np.cumsum([0, *(size for _, size in moves)]).max())


def listened(tokens: int, steps: np.ndarray, block: int) -> int:
    """The memory of a layer that is listened to."""
    import torch

    from megarl.config.grid import Chunk, Grid
    from megarl.config.influence import InfluenceSettings
    from megarl.policy.batch import lay_out
    from megarl.policy.cpu_attention import cpu_packing
    from megarl.policy.influence import InfluenceTap
    from megarl.records import Sequence, from_place

    class Core(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, packed_seq_params: Any) -> None: ...

    query, key = torch.randn(tokens, 1, HEADS, WIDTH), torch.randn(tokens, 1, KV_HEADS, WIDTH)
    batch = lay_out([Sequence(tokens=np.zeros(tokens, np.int32), positions=from_place(1, tokens))], packed=True)
    packing = cpu_packing(batch, torch.rand(WIDTH // 2), 1.0, torch.float32)
    core = Core()
    layer = SimpleNamespace(self_attention=SimpleNamespace(core_attention=core))
    tap = InfluenceTap(InfluenceSettings(query_block=block), [steps], [tokens], Grid(), HEADS, WIDTH**-0.5)
    tap.now(batch, [0])
    module = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
    with torch.no_grad(), tap.listening([module], [Chunk(range(1), True, True)]):
        return peak_bytes(lambda: core(query, key, packed_seq_params=packing))


def memory(options: argparse.Namespace) -> list[dict[str, float]]:
    """MiB by length."""
    found: list[dict[str, float]] = []
    for tokens in options.lengths:
        kinds = {"linear": np.arange(0, tokens, options.step), "worst": np.arange(tokens)}
        sizes = {name: round(listened(tokens, steps, options.block) / 2**20, 1) for name, steps in kinds.items()}
        found.append({"tokens": tokens, **sizes})
    return found


def vocabulary_of(options: dict[str, Any]) -> int:
    """As much smaller as the layers are fewer."""
    return VOCABULARY // options["divide"] * options["layers"] // LAYERS


def shape_of(options: dict[str, Any]) -> Any:
    """The model's shape, made smaller."""
    from megarl.config.model_shape import model_shape_from_hf

    by = options["divide"]
    return model_shape_from_hf(
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": HIDDEN // by,
            "num_hidden_layers": options["layers"],
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "intermediate_size": MLP // by,
            "vocab_size": vocabulary_of(options),
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
    )


def share_of_logits(by: int, tokens: int) -> float:
    """Multiplications for logits, over those of the pass: linear layers, the two products of causal attention, head."""
    hidden, width = HIDDEN // by, WIDTH // by
    linear = hidden * width * (2 * HEADS + 2 * KV_HEADS) + 3 * hidden * (MLP // by)
    logits = HEADS * width * tokens / 2
    return logits / (linear + 2 * logits + hidden * (VOCABULARY // by) / LAYERS)


def timed(options: dict[str, Any]) -> list[tuple[float, float]]:
    """Processor time of passes without and with listening, by round, in seconds. In a process of its own."""
    import torch

    from megarl.config.influence import InfluenceSettings
    from megarl.config.schema import RunConfig
    from megarl.parallel import bootstrap
    from megarl.parallel.groups import form_grid
    from megarl.policy.network import Network
    from megarl.records import Sequence, from_place

    world, tokens = bootstrap.join(), options["tokens"]
    torch.set_num_threads(options["threads"])
    config = RunConfig.model_validate(
        {
            "name": "influence",
            "steps": 1,
            "precision": "fp32",
            "model": {"path": "unused"},
            "algorithm": {"name": "grpo"},
            "data": {"path": "unused"},
            "batch": {"tokens_per_microbatch": tokens},
        }
    )
    network = Network(config, shape_of(options), world, form_grid(config.parallel, config.seed))
    for _, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = np.random.default_rng(0).integers(0, vocabulary_of(options), tokens).astype(np.int32)
    sequence = Sequence(tokens=ids, positions=from_place(tokens // 16, tokens))
    # A prompt, then steps that are alike.
    steps = np.array([0, *range(tokens // 16, tokens, options["step"])])
    found: list[tuple[float, float]] = []
    for number in range(options["rounds"] + 1):
        seconds: list[float] = []
        for given in (None, [steps]):
            start = time.process_time()
            network.survey([sequence], given, InfluenceSettings(query_block=options["block"]))
            seconds.append(time.process_time() - start)
        if number:  # the first round warms caches
            found.append((seconds[0], seconds[1]))
    bootstrap.leave()
    return found


def duration(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time in seconds, the listening's share of the time without it, and of the work."""
    from megarl.parallel.launch import launch

    found = launch(timed, (vars(options),), 1)
    extra = [heard / without - 1 for without, heard in found]
    return {
        "seconds": round(statistics.median(without for without, _ in found), 2),
        "seconds_listening": round(statistics.median(heard for _, heard in found), 2),
        "extra": [round(one, 3) for one in extra],
        "extra_median": round(statistics.median(extra), 3),
        "logits_of_work": round(share_of_logits(options.divide, options.tokens), 4),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    by_length = commands.add_parser("memory", help="memory by length")
    by_length.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens")
    pass_time = commands.add_parser("time", help="time of a pass")
    pass_time.add_argument("--tokens", type=int, default=4096, help="tokens of the sequence (default: 4096)")
    pass_time.add_argument("--layers", type=int, default=LAYERS, help="layers (default: 28)")
    pass_time.add_argument("--divide", type=int, default=1, help="how much smaller all widths are (default: 1)")
    pass_time.add_argument("--rounds", type=int, default=3, help="measured rounds (default: 3)")
    pass_time.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    for one in (by_length, pass_time):
        one.add_argument("--block", type=int, default=64, help="queries at a time (default: 64)")
        one.add_argument("--step", type=int, default=64, help="tokens of a step (default: 64)")
    options = parser.parse_args(arguments)
    if options.command == "memory":
        for row in memory(options):
            print(json.dumps(row))
    else:
        print(json.dumps(duration(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
