"""Compare a Hugging Face checkpoint with a Megatron one: names, shapes, types, every byte, and log-probs.

Prints a table and ends with exit code 1 where anything differs (2: an input that cannot be read). Where memory allows,
and the tensors are equal, both also answer prompts, Hugging Face's by transformers, Megatron's by a policy in one
process; log-probs of the prompts' tokens may differ by 1e-4.
"""

from __future__ import annotations

import argparse
import sys
from math import prod
from pathlib import Path
from typing import Any

from megarl.config.model_shape import ModelShape

EXAMPLES = """examples:
  python tools/verify_conversion.py --hf models/Qwen2.5-32B --megatron checkpoints/Qwen2.5-32B
  python tools/verify_conversion.py --hf models/tiny --megatron runs/tiny --prompts data/heldout.jsonl --column prompt
"""
#: Log-probs in fp32 of the two implementations differ by rounding alone, about 1e-6.
TOLERANCE = 1e-4
#: Bytes for each byte of the weights in fp32: transformers' copy, the policy's, its gradients, room to work.
COPIES = 4
PROMPTS = (
    "The derivative of x^3 + 2x is 3x^2 + 2, so its slope at x = 2 is 14.",
    "Question: If a train travels 60 miles in 1.5 hours, what is its speed? Answer: 60 / 1.5 = 40 miles per hour.",
    "def add(left, right):\n    return left + right\n",
)


def show(kinds: list[Any]) -> None:
    """Print the table of tensors."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("tensors", "number", "shape", "type", "sha256 Hugging Face", "sha256 Megatron", "equal"):
        table.add_column(title, overflow="fold")
    for kind in kinds:
        same = f"{kind.count - len(kind.different)} of {kind.count}" if kind.different else "all"
        types = " / ".join(dict.fromkeys(kind.dtypes))
        table.add_row(kind.name, str(kind.count), "x".join(map(str, kind.shape)), types, *kind.checksums, same)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The texts to answer."""
    import json

    from megarl.errors import Refusal

    if options.prompts is None:
        return list(PROMPTS)
    try:
        rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()[: options.rows]]
    except ValueError as error:
        raise Refusal(f"--prompts {options.prompts}", f"must be .jsonl ({error})", "give such a file") from None
    if not rows or any(not isinstance(row, dict) or not isinstance(row.get(options.column), str) for row in rows):
        rule = f"must be .jsonl with texts as {options.column!r}"
        raise Refusal(f"--prompts {options.prompts}", rule, "give --column")
    return [row[options.column] for row in rows]


def read_sequences(options: argparse.Namespace, shape: ModelShape) -> list[Any]:
    """The prompts' tokens, of each text but the first token to be answered."""
    import numpy as np

    from megarl.data.tokenizer import check_vocabulary, load_tokenizer
    from megarl.records import Sequence, from_place

    tokenizer = load_tokenizer(options.tokenizer or options.hf)
    check_vocabulary(tokenizer, shape.vocab_size)
    texts = [tokenizer.encode(text)[: shape.max_positions] for text in read_prompts(options)]
    return [Sequence(np.asarray(ids, np.int32), from_place(1, len(ids))) for ids in texts if len(ids) > 1]


def fits(shape: ModelShape) -> bool:
    """Whether both models have room in this machine's memory."""
    import psutil

    from megarl.reshard.weight_map import hf_tensors

    return sum(map(prod, hf_tensors(shape).values())) * 4 * COPIES < psutil.virtual_memory().available


def log_prob_difference(options: argparse.Namespace, sequences: list[Any]) -> float:
    """The largest difference of a token's log-prob."""
    import numpy as np
    import torch
    import transformers

    from megarl.config.model_shape import read_model_shape
    from megarl.config.schema import RunConfig
    from megarl.formats import checkpoint_folder
    from megarl.parallel import bootstrap
    from megarl.parallel.groups import dissolve_grid, form_grid
    from megarl.policy import checkpoint
    from megarl.policy.policy import Policy

    sections = {
        "name": "verify",
        "steps": 1,
        "precision": "fp32",
        "model": {"path": str(options.hf)},
        "algorithm": {"name": "grpo"},
        "data": {"path": "unused"},
        "batch": {"tokens_per_microbatch": max(4096, *(sequence.length for sequence in sequences))},
    }
    config = RunConfig.model_validate(sections)
    world = bootstrap.join()
    policy = Policy(config, read_model_shape(options.hf), world, form_grid(config.parallel, 1), step_budget=1)
    checkpoint.load(policy, checkpoint_folder.newest(options.megatron), optimizer=False)
    ours = policy.measure(sequences)
    dissolve_grid()
    bootstrap.leave()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.hf, dtype=torch.float32)
    largest = 0.0
    for sequence, found in zip(sequences, ours or [], strict=True):
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
        with torch.no_grad():
            theirs = torch.log_softmax(model(tokens[None]).logits[0, :-1].float(), -1)
        theirs = theirs.gather(-1, tokens[1:, None])[:, 0].numpy()
        largest = max(largest, float(np.abs(theirs - found).max()))
    return largest


def main(arguments: list[str] | None = None) -> int:
    from megarl.conversion import command
    from megarl.parallel import terminal

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=command.directory, required=True, help="the Hugging Face checkpoint")
    parser.add_argument("--megatron", type=command.directory, required=True, help="the Megatron checkpoint, or a run")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="the type that was converted to, if another")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin, weights alone")
    parser.add_argument("--tensors-only", action="store_true", help="no log-probs")
    parser.add_argument("--prompts", type=Path, help=".jsonl with texts (default: three built in)")
    parser.add_argument("--column", default="prompt", help="where the texts are (default: prompt)")
    parser.add_argument("--rows", type=command.positive, default=8, help="texts to take (default: 8)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory or .model file (default: beside the model)")
    options = parser.parse_args(arguments)
    terminal.keep()
    return command.run(lambda ranks: verify(options))


def verify(options: argparse.Namespace) -> int:
    """Compare, print, and return the exit code."""
    from megarl.config.model_shape import read_model_shape
    from megarl.conversion import command
    from megarl.conversion.compare import compare
    from megarl.formats import checkpoint_folder
    from megarl.formats.huggingface import PRECISIONS

    shape = read_model_shape(options.hf)
    answers = not options.tensors_only and fits(shape)
    # Read first: a comparison of large models takes long.
    sequences = read_sequences(options, shape) if answers else []
    with command.bar("comparing") as progress:
        found = compare(
            options.hf,
            options.megatron,
            dtype=PRECISIONS.get(options.dtype),
            allow_pickle=options.allow_pickle,
            progress=progress,
        )
    show(found.kinds)
    for problem in found.problems:
        print(f"differs: {problem}")
    for name in found.different:
        print(f"differs: {name}")
    print(f"{sum(kind.count for kind in found.kinds)} tensors compared, {len(found.different)} differ")
    if found.problems or found.different:
        return command.DIFFERENT
    if options.tensors_only:
        return 0
    if not answers:
        print("log-probs: not compared, the model does not fit into this machine's memory")
        return 0
    if not (checkpoint_folder.newest(options.megatron) / "progress.json").is_file():
        print("log-probs: not compared, a policy loads megarl's checkpoints alone")
        return 0
    gap = log_prob_difference(options, sequences)
    print(f"log-probs: largest difference {gap:.1e}, allowed {TOLERANCE:.0e}")
    return 0 if gap <= TOLERANCE else command.DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
