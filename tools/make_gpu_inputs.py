r"""Make what launch/gpu_check.sh measures: layers of Qwen2.5-7B, as many as a GPU holds, and sequences of 8,192 tokens.

The folder gets step_model/ and push_model/ (a config.json each; weights are drawn), tokenizer/ and long.jsonl, rows
of a prompt and a solution of random digits, each of them a token. The same arguments always write the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent
#: Qwen2.5-7B's config.json, but for the number of layers and the positions that are needed.
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LAYERS = 28
#: Parameters of a layer and of both ends of the model.
PER_LAYER, ENDS = 233_057_792, 2 * 152_064 * 3_584 + 3_584
#: Bytes a parameter: in training weights, gradients, and Adam's weights and moments in fp32; for a push those without
#: moments, which are made at the first step, and the engine's weights.
TRAINED, PUSHED = 2 + 4 + 12, 2 + 4 + 4 + 2
#: Bytes of a layer's activations for 8,192 tokens, of which nothing is recomputed, and what else a GPU must have free.
#: Our estimates.
ACTIVATIONS, RESERVED = 2 << 30, 10 << 30
#: Tokens of prompt, line break and end token beside the digits.
AROUND = 32
TOKENS = 8192


def layers_that_fit(memory: int, per_parameter: int, activations: int = 0) -> int:
    """Layers for a GPU of `memory` bytes, at least one and at most the model's own 28.

    >>> layers_that_fit(80 << 30, TRAINED, ACTIVATIONS), layers_that_fit(140 << 30, PUSHED)
    (8, 28)
    """
    free = memory - RESERVED - ENDS * per_parameter
    return max(1, min(LAYERS, free // (PER_LAYER * per_parameter + activations)))


def gpu_memory() -> int:
    """Bytes of the first GPU. Raises ValueError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("no GPU: give --memory-gib")
    return torch.cuda.get_device_properties(0).total_memory


def write(out: Path, memory: int, rows: int, seed: int) -> dict[str, int]:
    """Write everything; the numbers of layers by model."""
    layers = {
        "step_model": layers_that_fit(memory, TRAINED, ACTIVATIONS),
        "push_model": layers_that_fit(memory, PUSHED),
    }
    for name, number in layers.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "config.json").write_text(
            json.dumps(QWEN_7B | {"num_hidden_layers": number}, indent=1), encoding="utf-8"
        )
    draw = random.Random(seed)
    with (out / "long.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            digits = "".join(draw.choices("0123456789", k=TOKENS - AROUND))
            file.write(json.dumps({"prompt": f"{number:04d}", "answer": digits[-1], "solution": digits}) + "\n")
    command = [sys.executable, str(TOOLS / "train_tokenizer.py"), "--input", str(out / "long.jsonl")]
    command += ["--columns", "prompt", "--vocab-size", "300", "--out", str(out / "tokenizer")]
    subprocess.run(command, check=True)
    return layers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the inputs")
    parser.add_argument("--memory-gib", type=float, help="of the GPU; default: what the first one has")
    parser.add_argument("--rows", type=int, default=64, help="sequences (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the digits (default 0)")
    options = parser.parse_args(arguments)
    try:
        memory = gpu_memory() if options.memory_gib is None else int(options.memory_gib * 2**30)
        layers = write(options.out, memory, options.rows, options.seed)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"make_gpu_inputs: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"layers": layers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
