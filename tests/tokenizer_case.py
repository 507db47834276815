"""Tokenizers of every kind for tests of where in the tokens a place of the text lies."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
LLAMA = ROOT.parent / "shared" / "data" / "llama2_tokenizer.model"
#: sentencepiece and Hugging Face's form of the same trained tokenizer, byte-level BPE, and a large sentencepiece model.
KINDS = ["sentencepiece", "hugging_face", "byte_level", "llama"]
PROSE = [
    "so x is 12, é日本😀 $\\boxed{42}$",
    "<think>a b</think>\n\n4",
    "we get >4, >4 >4 and </think>4.",
    "答案 is 7\n\n",
]


class Characters:
    """A tokenizer of one id per character: code point plus ten; id 1 starts a prompt, 2 ends a response."""

    vocab_size = 0x110000 + 10
    eos_token_id = 2
    pad_token_id = 2
    bos: int | None = 1
    chat_template: str | None = "in apply_chat"

    def encode(self, text: str) -> list[int]:
        return [ord(char) + 10 for char in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(token_id - 10) for token_id in ids if token_id >= 10)

    def apply_chat(self, messages: Any) -> list[int]:
        return self.chat_ids(self.chat_text(messages))

    def chat_text(self, messages: Any) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"

    def chat_ids(self, text: str) -> list[int]:
        return self.encode(text)


def train(folder: Path) -> Path:
    """A tokenizer of `tools/train_tokenizer.py`, in both forms; \\boxed{ and </think> are one token each."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prose.txt").write_text("\n".join(["the chain of the answer is 1 + 2 = 3 so"] * 5) + "\n")
    arguments = ["--input", str(folder / "prose.txt"), "--vocab-size", "320", "--out", str(folder)]
    assert importlib.import_module("train_tokenizer").main(arguments) == 0
    return folder


def byte_level(folder: Path, special: tuple[str, ...] = (), texts: list[str] = PROSE) -> Path:
    """A byte-level BPE in Hugging Face's format, whose tokens may end anywhere; `special` are control tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Inner

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    ends = [AddedToken(name, special=True) for name in ("</s>", *special)]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=330, special_tokens=ends, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([text for text in texts for _ in range(3)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load_all(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers of `KINDS`; the last only where its file is there."""
    trained = train(folder / "trained")
    found = {
        "sentencepiece": load_tokenizer(trained / "tokenizer.model"),
        "hugging_face": load_tokenizer(trained),
        "byte_level": load_tokenizer(byte_level(folder / "bytes")),
    }
    return found | ({"llama": load_tokenizer(LLAMA)} if LLAMA.is_file() else {})


def choose(tokenizers: dict[str, Tokenizer], kind: str) -> Tokenizer:
    """The tokenizer of a kind; skips the test where it is absent."""
    if kind not in tokenizers:
        pytest.skip(f"{LLAMA} is absent")
    return tokenizers[kind]


def byte_ids(tokenizer: Tokenizer, kind: str, text: str) -> list[int]:
    """`text` with a token for every byte."""
    raw = text.encode()
    if kind == "byte_level":
        inner: Any = getattr(tokenizer, "_inner")  # noqa: B009 (the token of each byte is known to it alone)
        return [inner.convert_tokens_to_ids(symbol) for symbol in _byte_symbols(raw)]
    # The 256 byte pieces stand together, in order.
    first = next(i for i in range(10) if tokenizer.decode([i + ord("A")]) == "A")
    return [first + value for value in raw]


def _byte_symbols(raw: bytes) -> list[str]:
    """What byte-level tokenizers write for bytes: the character itself if it is printable, else the next free one."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printed]
    return [chr(value) if value in printed else chr(256 + others.index(value)) for value in raw]
