"""Measure what a layout costs: padding on real length distributions, and the activation memory of one forward pass.

`padding` reads texts, counts their tokens, and lays batches of them out as an update would: computed tokens that are
padding / computed tokens, packed and padded. Where a data set has no solutions, responses are drawn with a log-normal
distribution of lengths (--response-median, --response-spread), cut at --response-most, as long answers are.

`memory` trains a random model on sequences that fill micro-batches of as many tokens, and reports the most that
autograd keeps at a time for the backward pass on the fullest process; storages that several operations keep count once,
weights not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python tools/measure_layout.py padding --data gsm8k.jsonl --prompt question --response answer --tokenizer some.model
  python tools/measure_layout.py padding --data dapo.parquet --prompt prompt --tokenizer some.model
  python tools/measure_layout.py memory --tokens 8192 --contexts 1 2
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(value: Any) -> str:
    """A text, or the texts of a conversation."""
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def lengths_of(options: argparse.Namespace) -> list[int]:
    """Tokens of every row's prompt and response."""
    from megarl.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    source = random.Random(options.seed)
    lengths = []
    for row in rows_of(options.data)[: options.rows]:
        prompt = len(tokenizer.encode(text_of(row[options.prompt])))
        if options.response is not None:
            response = len(tokenizer.encode(text_of(row[options.response])))
        else:
            drawn = math.exp(source.gauss(math.log(options.response_median), options.response_spread))
            response = max(1, min(options.response_most, round(drawn)))
        if prompt + response <= options.bound:
            lengths.append(prompt + response)
    return lengths


def sequences(lengths: Sequences[int], vocab: int = 97) -> list[Any]:
    """Training sequences of these lengths, a fifth of each a prompt."""
    import numpy as np

    from megarl.records import Sequence, from_place

    made = []
    for number, length in enumerate(lengths):
        prompt = max(1, length // 5)
        values = np.full(length - prompt, 0.5, np.float32)
        tokens = (np.arange(length) % (vocab - 2) + 1).astype(np.int32)
        positions = from_place(prompt, length)
        made.append(Sequence(tokens, positions, values, rollout_log_probs=values - 4, group=number))
    return made


def padding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of padding by form and layout, over all updates' micro-batches."""
    from megarl.data.packing import balance, microbatches, padded_microbatches
    from megarl.policy.batch import Cut, lay_out

    lengths = lengths_of(options)
    made = sequences(lengths)
    found = []
    for packed in (True, False):
        for context, tensor in ((1, 1), (1, 8), (2, 1), (4, 8)):
            cut = Cut(context, 0, tensor)
            real = computed = batches = 0
            for start in range(0, len(lengths) - options.update + 1, options.update):
                update = lengths[start : start + options.update]
                for share in balance(update, options.data_parallel):
                    plan = microbatches if packed else padded_microbatches
                    for part in plan([cut.padded(update[i]) for i in share], options.bound):
                        batch = lay_out([made[start + share[i]] for i in part], packed=packed, cut=cut)
                        real += batch.real_tokens
                        computed += batch.computed_tokens * context
                        batches += 1
            form = "packed" if packed else "padded"
            found.append(
                {
                    "form": form,
                    "context": context,
                    "sequence_parallel": tensor,
                    "micro_batches": batches,
                    "padding_share": round(1 - real / computed, 5),
                    "fill": round(real / (batches * options.bound), 4),
                }
            )
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    print(f"{len(lengths)} sequences of {min(lengths)} to {longest} tokens, mean {mean:.0f}; bound {options.bound}")
    return found


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes that autograd keeps on each process, by context parallelism and number of sequences."""
    import make_tiny_model

    from megarl.parallel.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        shape = "--family qwen3 --hidden 256 --layers 4 --heads 8 --kv-heads 4 --ffn 768 --vocab-size 512"
        if make_tiny_model.main(["--out", folder, *shape.split(), "--max-positions", str(options.tokens)]):
            raise SystemExit(1)
        found = []
        for context in options.contexts:
            for kind in options.recompute:
                for number in options.sequences:
                    for batches in options.micro_batches:
                        kept = launch(_kept, (folder, context, kind, options.tokens, number, batches), context)
                        found.append(
                            {
                                "context": context,
                                "recompute": kind,
                                "sequences": number,
                                "micro_batches": batches,
                                "bytes": kept,
                            }
                        )
    first = found[0]["bytes"]
    return [line | {"of_first": round(line["bytes"] / first, 3)} for line in found]


class Ledger:
    """Storages that autograd keeps, and the most bytes of them at a time."""

    def __init__(self, left_out: set[int]) -> None:
        self.left_out, self.uses, self.bytes, self.most = left_out, Counter[int](), 0, 0

    def keep(self, tensor: Any) -> KeptTensor:
        return KeptTensor(self, tensor)

    def add(self, storage: Any) -> None:
        self.uses[storage.data_ptr()] += 1
        if self.uses[storage.data_ptr()] == 1:
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)

    def remove(self, storage: Any) -> None:
        self.uses[storage.data_ptr()] -= 1
        if not self.uses[storage.data_ptr()]:
            self.bytes -= storage.nbytes()


class KeptTensor:
    """A tensor that autograd keeps as long as it keeps this."""

    def __init__(self, ledger: Ledger, tensor: Any) -> None:
        self.tensor, self.ledger = tensor, ledger
        self.counted = tensor.untyped_storage().data_ptr() not in ledger.left_out
        if self.counted:
            ledger.add(tensor.untyped_storage())

    def __del__(self) -> None:
        if self.counted:
            self.ledger.remove(self.tensor.untyped_storage())


def _kept(folder: str, context: int, recompute: str, tokens: int, number: int, batches: int) -> int:
    """The largest process's most bytes kept for the backward pass during an update."""
    import torch

    from megarl import algorithms
    from megarl.algorithms.base import AlgorithmContext
    from megarl.algorithms.objective import BatchTotals
    from megarl.config.model_shape import read_model_shape
    from megarl.config.schema import RunConfig
    from megarl.parallel import bootstrap
    from megarl.parallel.exchange import gather_all
    from megarl.parallel.groups import dissolve_grid, form_grid
    from megarl.policy.hf_weights import load_hf_weights
    from megarl.policy.policy import Policy

    config = RunConfig.model_validate(
        {
            "name": "memory",
            "steps": 1,
            "precision": "fp32",
            "model": {"path": folder},
            "algorithm": {"name": "grpo"},
            "data": {"path": "unused"},
            "parallel": {"context": context},
            "recompute": {"kind": recompute},
            "batch": {"tokens_per_microbatch": tokens},
        }
    )
    world = bootstrap.join()
    policy = Policy(config, read_model_shape(folder), world, form_grid(config.parallel, 1), step_budget=1)
    load_hf_weights(policy, folder)
    ledger = Ledger({parameter.untyped_storage().data_ptr() for _, parameter in policy.named_parameters()})
    batch = sequences([tokens // number] * (number * batches), vocab=512)
    trained = float(sum(one.trained for one in batch))
    algorithm = algorithms.build(config.algorithm, AlgorithmContext(tokens, 1))
    with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda kept: kept.tensor):
        totals = BatchTotals.of({"answer": BatchTotals(trained, float(len(batch)))})
        policy.accumulate(batch, algorithm.objectives, totals, old_is_current=True)
        policy.step()
    largest = max(gather_all(ledger.most))
    dissolve_grid()
    bootstrap.leave()
    return largest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    pads = parts.add_parser("padding", help="padding on a length distribution")
    pads.set_defaults(run=padding)
    pads.add_argument("--data", type=Path, required=True, help=".jsonl or .parquet")
    pads.add_argument("--prompt", required=True, help="column of the prompt")
    pads.add_argument("--response", help="column of the response; without it lengths are drawn")
    pads.add_argument("--tokenizer", required=True, help="tokenizer directory or sentencepiece .model file")
    pads.add_argument("--bound", type=int, default=8192, help="tokens of a micro-batch (default 8192)")
    pads.add_argument("--update", type=int, default=512, help="sequences of an update (default 512)")
    pads.add_argument("--data-parallel", type=int, default=4, help="replicas (default 4)")
    pads.add_argument("--rows", type=int, default=4096, help="rows used (default 4096)")
    pads.add_argument("--response-median", type=float, default=1200.0, help="of drawn lengths (default 1200)")
    pads.add_argument("--response-spread", type=float, default=0.8, help="of the logarithm (default 0.8)")
    pads.add_argument("--response-most", type=int, default=6000, help="longest drawn response (default 6000)")
    pads.add_argument("--seed", type=int, default=0, help="of drawn lengths (default 0)")
    kept = parts.add_parser("memory", help="activation memory")
    kept.set_defaults(run=memory)
    kept.add_argument("--tokens", type=int, default=8192, help="tokens of the micro-batch (default 8192)")
    kept.add_argument("--contexts", type=int, nargs="+", default=[1, 2], help="context parallelism (default 1 2)")
    kept.add_argument("--sequences", type=int, nargs="+", default=[1], help="sequences they are cut into (default 1)")
    kept.add_argument("--micro-batches", type=int, nargs="+", default=[1], help="of the update (default 1)")
    kept.add_argument("--recompute", nargs="+", default=["none"], help="none, selective, full (default none)")
    options = parser.parse_args(arguments)
    for line in options.run(options):
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
