"""Text to token ids and back, by a Hugging Face tokenizer directory or a sentencepiece model. Torch-free.

Both libraries are imported on first use: transformers takes about a second, sentencepiece none, and a
sentencepiece model is read without transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megarl.data.chat_template import checked, find_template, render
from megarl.data.messages import Message, question_of
from megarl.errors import Refusal


class Tokenizer(Protocol):
    """What megarl asks of a tokenizer.

    `vocab_size` is the largest id plus one, added tokens included. `eos_token_id` ends a response;
    `pad_token_id` is the end token where there is no other. `bos` is the id that a prompt starts with, or None where
    the tokenizer adds none. `chat_template` is a Jinja template or None.
    """

    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    bos: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. Markers that are tokens of their own, such as <think>, are found anywhere."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control tokens (end, padding, start) and ids past the vocabulary give no text."""
        ...

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks, by the chat template.

        Without one: the start token, then the messages' contents with blank lines between them. Raises
        `TemplateRefusal` where the template raises, or leaves a turn out.
        """
        ...

    def chat_text(self, messages: Sequence[Message]) -> str:
        """The text of a conversation by the chat template, which there is. Raises as `apply_chat`."""
        ...

    def chat_ids(self, text: str) -> list[int]:
        """Ids of a piece of what `chat_text` gives."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer at `path`.

    A file ending in .model, or a directory whose only tokenizer file is tokenizer.model, is read by
    sentencepiece; any other directory by transformers, from local files only. Raises `Refusal` where there
    is none, it cannot be read, or it has no end token.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise Refusal(
            f"tokenizer {path}",
            "must be a directory with a tokenizer.json, or a sentencepiece .model file",
            "set model.tokenizer",
        )
    if any((path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise Refusal(
        f"tokenizer {path}",
        "holds neither tokenizer.json nor tokenizer.model",
        "copy the tokenizer's files there, or set model.tokenizer",
    )


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise `Refusal` where the tokenizer can make ids the model has no embedding for.

    A larger model vocabulary is fine: many are padded.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise Refusal(
            f"a tokenizer of {tokenizer.vocab_size} tokens",
            f"must not exceed the model's vocabulary of {model_vocab_size}",
            "use the tokenizer the model was trained with (model.tokenizer)",
        )


def spread_tokens(tokenizer: Tokenizer, most: int) -> list[int]:
    """At most that many token ids, evenly spread over the vocabulary, its last one among them."""
    size = tokenizer.vocab_size
    count = min(most, size)
    return [size - 1 - place * size // count for place in reversed(range(count))]


def differing_token(tokenizer: Tokenizer, texts: Mapping[int, str]) -> tuple[int, str, str] | None:
    """The first of `texts`, by token id, that the tokenizer has otherwise: id, its text, the other; None without one.

    Blanks around a text are not looked at, as decoders treat them in their ways, nor tokens that are no text alone
    (parts of characters, control tokens).
    """
    for token_id, text in texts.items():
        own, other = tokenizer.decode([token_id]).strip(), text.strip()
        if own and other and "\ufffd" not in own + other and own != other:
            return token_id, own, other
    return None


class SentencePieceTokenizer:
    """A sentencepiece `.model` file, with the chat template beside it, if there is one."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise Refusal(
                f"tokenizer {path}", f"must be a sentencepiece model ({_one_line(error)})", "restore the file"
            ) from None
        self.vocab_size = int(self._model.GetPieceSize())
        self.eos_token_id = _end_token(self._known(self._model.eos_id()), path)
        pad = self._known(self._model.pad_id())
        self.pad_token_id = self.eos_token_id if pad is None else pad
        self.bos = self._known(self._model.bos_id())
        self.chat_template = find_template(path.parent)
        self._path = path
        # Pieces that sentencepiece never finds in a text, such as <s>: a template writes them out.
        pieces = {self._model.IdToPiece(number): number for number in range(self.vocab_size) if self._hidden(number)}
        self._controls: dict[str, int] = pieces

    def _hidden(self, token_id: int) -> bool:
        return bool(self._model.IsControl(token_id) or self._model.IsUnknown(token_id))

    def _known(self, token_id: int) -> int | None:
        return None if token_id < 0 else token_id

    def encode(self, text: str) -> list[int]:
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.DecodeIds([token_id for token_id in ids if 0 <= token_id < self.vocab_size]))

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        if self.chat_template is None:
            return _plain_chat(self, messages)
        return self.chat_ids(self.chat_text(messages))

    def chat_text(self, messages: Sequence[Message]) -> str:
        template = self.chat_template
        assert template is not None
        named = {"bos_token": self.bos, "eos_token": self.eos_token_id, "pad_token": self.pad_token_id}
        tokens = {name: self._model.IdToPiece(number) for name, number in named.items() if number is not None}
        return checked(lambda: render(template, messages, tokens), messages, str(self._path))

    def chat_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self._controls))})", text):
            ids += [self._controls[part]] if part in self._controls else self.encode(part)
        return ids


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer directory, read by transformers."""

    def __init__(self, path: Path) -> None:
        try:
            self._inner: Any = _transformers_class(path).from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # whatever its files make the library raise
            raise Refusal(
                f"tokenizer {path}", f"cannot be read by transformers ({_one_line(error)})", "restore its files"
            ) from None
        self.vocab_size = max(len(self._inner), 1 + max(self._inner.get_vocab().values(), default=-1))
        self.eos_token_id = _end_token(self._inner.eos_token_id, path)
        pad = self._inner.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)
        self.bos = self._start_token()
        template = self._inner.chat_template
        # Where the library finds none there may be one in a form that it does not look at.
        default = template.get("default") if isinstance(template, dict) else template
        self.chat_template = default if isinstance(default, str) else find_template(path)
        self._path = path

    def _start_token(self) -> int | None:
        """The start token, where the tokenizer itself puts it before a text."""
        bos = self._inner.bos_token_id
        return bos if bos is not None and list(self._inner("a").input_ids)[:1] == [bos] else None

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        return str(self._inner.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def apply_chat(self, messages: Sequence[Message]) -> list[int]:
        if self.chat_template is None:
            return _plain_chat(self, messages)
        return self.chat_ids(self.chat_text(messages))

    def chat_text(self, messages: Sequence[Message]) -> str:
        rows = [dict(message) for message in messages]
        options = {"chat_template": self.chat_template, "add_generation_prompt": True, "tokenize": False}
        return checked(lambda: self._inner.apply_chat_template(rows, **options), messages, str(self._path))

    def chat_ids(self, text: str) -> list[int]:
        return self.encode(text)


def _transformers_class(path: Path) -> Any:
    """The class to load `path` with.

    tokenizer.json says everything, so it is read by the class that adds nothing. AutoTokenizer goes by the type of
    the model beside it: for qwen2 it puts Qwen's own splitting in the place of whatever the file asks for
    (transformers 5), which turns a tokenizer of another kind into nonsense. It also imports torch.
    """
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt that is plain text: the start token where the tokenizer has one, then the text."""
    return ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)


def response_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a complete response: the text, then the end token. For supervised training."""
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def _plain_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    return prompt_ids(tokenizer, question_of(messages))


def _end_token(token_id: int | None, path: Path) -> int:
    if token_id is None:
        raise Refusal(
            f"tokenizer {path}",
            "has no end token, so no response could ever stop",
            "set eos_token in its tokenizer_config.json, or train it with an end piece",
        )
    return int(token_id)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
