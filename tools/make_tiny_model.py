r"""Make a small random checkpoint in Hugging Face format.

The folder gets config.json, generation_config.json, model.safetensors (fp32) and the tokenizer's files; both
transformers and vLLM load it (beside a qwen2 model, transformers 5's AutoTokenizer does not follow tokenizer.json;
PreTrainedTokenizerFast does, and so does megarl). Neither torch nor transformers is imported, so it takes well under
a second.

Matrices, biases and embeddings are normal with standard deviation 0.02, norm weights 1 plus the same noise: a
mapping that loses or confuses any of them shows. The same arguments always write the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.formats.companions import TOKENIZER_FILES, copy_files

EXAMPLES = """examples:
  python tools/make_tiny_model.py --out models/tiny --tokenizer models/tokenizer
  python tools/make_tiny_model.py --out models/tied --family qwen3 --layers 2 --hidden 64 --heads 4 --kv-heads 2 --tied
  python tools/make_tiny_model.py --out models/moe --family qwen3_moe --experts 8 --experts-per-token 2 --ffn 128
"""

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the model; see the command line's help. `head_dim` is per head."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab_size: int
    tied: bool
    max_positions: int
    experts: int = 8
    experts_per_token: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def check(self) -> None:
        """Raise ValueError where the sizes do not fit together."""
        if self.hidden % self.heads:
            raise ValueError(f"--hidden {self.hidden} must be a multiple of --heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"--hidden / --heads is {self.head_dim}: rotary embeddings need an even head size")
        if self.family == "qwen3_moe" and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"--experts-per-token {self.experts_per_token} must be between 1 and --experts {self.experts}"
            )


def parameter_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, as transformers uses them, and shapes (outputs, inputs) of all parameters, in a fixed order."""
    hidden, query, key = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield "model.embed_tokens.weight", (sizes.vocab_size, hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name, width in (("q", query), ("k", key), ("v", key)):
            yield f"{prefix}self_attn.{name}_proj.weight", (width, hidden)
            if sizes.family == "qwen2":
                yield f"{prefix}self_attn.{name}_proj.bias", (width,)
        if sizes.family in ("qwen3", "qwen3_moe"):
            yield prefix + "self_attn.q_norm.weight", (sizes.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (sizes.head_dim,)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        blocks = [prefix + "mlp."]
        if sizes.family == "qwen3_moe":
            yield prefix + "mlp.gate.weight", (sizes.experts, hidden)
            blocks = [f"{prefix}mlp.experts.{expert}." for expert in range(sizes.experts)]
        for block in blocks:
            yield block + "gate_proj.weight", (sizes.ffn, hidden)
            yield block + "up_proj.weight", (sizes.ffn, hidden)
            yield block + "down_proj.weight", (hidden, sizes.ffn)
    yield "model.norm.weight", (hidden,)
    if not sizes.tied:
        yield "lm_head.weight", (sizes.vocab_size, hidden)


def draw_weights(sizes: Sizes, seed: int) -> dict[str, Any]:
    """All parameters as fp32 arrays."""
    import numpy

    source = numpy.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(sizes):
        noise = source.standard_normal(shape, dtype=numpy.float32) * numpy.float32(INIT_STD)
        weights[name] = noise + numpy.float32(1) if "norm.weight" in name else noise
    return weights


def model_config(sizes: Sizes, end: int | None, padding: int | None) -> dict[str, Any]:
    """The contents of config.json."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[sizes.family]],
        "model_type": sizes.family,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.max_positions,
        "hidden_act": "silu",
        "initializer_range": INIT_STD,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": sizes.tied,
        "dtype": "float32",
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    if sizes.family == "qwen3_moe":
        config |= {
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.experts_per_token,
            "moe_intermediate_size": sizes.ffn,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    if sizes.family in ("qwen2", "qwen3", "qwen3_moe"):
        config["use_sliding_window"] = False
    if sizes.family in ("qwen3", "qwen3_moe", "llama"):
        config["attention_bias"] = False
    if sizes.family == "llama":
        config["mlp_bias"] = False
    return config


def special_ids(tokenizer: Path | None, vocab_size: int) -> tuple[int | None, int | None]:
    """End and padding ids of a tokenizer directory, (None, None) without one.

    Raises ValueError where it has no files, no end token, or more tokens than `vocab_size`.
    """
    if tokenizer is None:
        return None, None
    if (tokenizer / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        inner = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        names = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        end, padding = (_token_id(inner, names.get(key)) for key in ("eos_token", "pad_token"))
        num_tokens = 1 + max(inner.get_vocab().values())
    elif (tokenizer / "tokenizer.model").is_file():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        end, padding = (None if piece < 0 else piece for piece in (pieces.eos_id(), pieces.pad_id()))
        num_tokens = len(pieces)
    else:
        raise ValueError(f"--tokenizer {tokenizer} holds neither tokenizer.json nor tokenizer.model")
    if end is None:
        raise ValueError(f"--tokenizer {tokenizer} has no end token")
    if num_tokens > vocab_size:
        raise ValueError(f"--vocab-size {vocab_size} is less than the tokenizer's {num_tokens} tokens")
    return end, padding


def _token_id(inner: Any, token: Any) -> int | None:
    """Id of a token that tokenizer_config.json names as text or as a record."""
    name = token["content"] if isinstance(token, dict) else token
    return None if name is None else inner.token_to_id(name)


def make(out: Path, sizes: Sizes, seed: int, tokenizer: Path | None) -> int:
    """Write the checkpoint into `out`; returns the number of parameters. Raises ValueError for unfit sizes."""
    from safetensors.numpy import save_file

    sizes.check()
    end, padding = special_ids(tokenizer, sizes.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    generation = {"eos_token_id": end, "pad_token_id": padding, "do_sample": True}
    for name, content in (("config.json", model_config(sizes, end, padding)), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = draw_weights(sizes, seed)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None and tokenizer.resolve() != out.resolve():
        copy_files(tokenizer, out, TOKENIZER_FILES)
    return sum(weight.size for weight in weights.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), default="qwen2", help="default qwen2")
    for name, default, text in (
        ("hidden", 128, "width of the residual stream"),
        ("layers", 4, "number of layers"),
        ("heads", 4, "attention heads"),
        ("kv-heads", 2, "key and value heads"),
        ("ffn", 384, "width of the feed-forward part, or of each expert's"),
        ("experts", 8, "with qwen3_moe, experts of each layer"),
        ("experts-per-token", 2, "with qwen3_moe, experts that a token goes through"),
        ("vocab-size", 320, "rows of the embedding; may exceed the tokenizer's"),
        ("max-positions", 2048, "longest sequence"),
        ("seed", 0, "seed of the weights"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output layer")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory to copy from")
    options = parser.parse_args(arguments)
    names = (
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "ffn",
        "experts",
        "experts_per_token",
        "vocab_size",
        "max_positions",
    )
    numbers = {name: getattr(options, name) for name in names}
    if least := [name for name, number in numbers.items() if number < 1]:
        parser.error(f"--{least[0].replace('_', '-')} must be at least 1")
    try:
        sizes = Sizes(family=options.family, tied=options.tied, **numbers)
        num_parameters = make(options.out, sizes, options.seed, options.tokenizer)
    except (ValueError, OSError) as error:
        print(f"make_tiny_model: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {num_parameters} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
