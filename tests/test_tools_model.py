"""The tiny checkpoint: transformers' own names and shapes, megarl's reading of it, repeatability."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.config.model_shape import read_model_shape
from megarl.data.tokenizer import check_vocabulary, load_tokenizer

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

make_tiny_model = importlib.import_module("make_tiny_model")
train_tokenizer = importlib.import_module("train_tokenizer")

SMALL = ["--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--ffn", "96"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("12+7=19\n19-5=14\n" * 5)
    assert train_tokenizer.main(["--input", str(folder / "text.txt"), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_transformers_finds_every_parameter_and_no_other(tmp_path: Path, family: str, tied: bool) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert (
        make_tiny_model.main(["--out", str(tmp_path), "--family", family, *SMALL, *(["--tied"] if tied else [])]) == 0
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = load_file(tmp_path / "model.safetensors")
    names = set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert set(written) == names
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in written.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 320)
    assert torch.isfinite(logits).all()


def test_megarl_reads_the_same_shape(tmp_path: Path) -> None:
    make_tiny_model.main(["--out", str(tmp_path), "--family", "qwen3", "--tied", *SMALL])
    shape = read_model_shape(tmp_path)
    assert (shape.family, shape.hidden_size, shape.num_layers, shape.num_heads) == ("qwen3", 64, 2, 4)
    assert (shape.num_kv_heads, shape.head_dim, shape.ffn_size, shape.vocab_size) == (2, 16, 96, 320)
    assert (shape.tied_embeddings, shape.qkv_bias, shape.attention_out_bias, shape.qk_norm) == (
        True,
        False,
        False,
        True,
    )


def test_weights_are_drawn_and_repeatable(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    files = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        make_tiny_model.main(["--out", str(tmp_path / name), "--seed", seed])
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert weights["lm_head.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["model.norm.weight"].mean() == pytest.approx(1.0, abs=0.01)
    assert all(weight.std() > 0.01 for weight in weights.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer_folder: Path, family: str) -> None:
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    arguments = ["--out", str(tmp_path), "--family", family, *SMALL, "--tokenizer", str(tokenizer_folder)]
    assert make_tiny_model.main(arguments) == 0
    original = load_tokenizer(tokenizer_folder)
    check_vocabulary(original, read_model_shape(tmp_path).vocab_size)
    text = "<think>12+7=19\n\n19-5=14</think>\\boxed{14}"
    assert load_tokenizer(tmp_path).encode(text) == original.encode(text)
    # Beside a qwen2 model AutoTokenizer ignores tokenizer.json's own splitting; beside the others it does not.
    loader = PreTrainedTokenizerFast if family == "qwen2" else AutoTokenizer
    theirs = loader.from_pretrained(tmp_path)
    assert theirs.encode(text) == original.encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (original.eos_token_id, original.pad_token_id)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == original.eos_token_id
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == original.eos_token_id


def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for arguments, message in (
        (["--hidden", "65"], "--hidden 65 must be a multiple of --heads 4"),
        (["--kv-heads", "3"], "--heads 4 must be a multiple of --kv-heads 3"),
        (["--hidden", "12"], "even head size"),
        (["--tokenizer", str(tokenizer_folder), "--vocab-size", "20"], "--vocab-size 20 is less than the tokenizer's"),
        (["--tokenizer", str(tmp_path)], "holds neither"),
    ):
        assert make_tiny_model.main(["--out", out, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
    with pytest.raises(SystemExit):
        make_tiny_model.main(["--out", out, "--layers", "0"])
    assert "--layers must be at least 1" in capsys.readouterr().err
