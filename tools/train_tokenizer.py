r"""Train a small sentencepiece tokenizer and write it for both kinds of loader.

The folder gets tokenizer.model (sentencepiece) and tokenizer.json with tokenizer_config.json (Hugging Face); both
give the same ids for the same text. Text is taken as it is (no normalisation, no added blanks), digits are
single tokens, unknown characters fall back to bytes, so every text without U+2581 comes back exactly. The markers
<think>, </think>, \boxed{, }, the newline and the blank line are one token each, wherever they stand.

Input files are plain text (one text per line) or .jsonl, of which the columns named by --columns are read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python tools/train_tokenizer.py --input data/arithmetic/train.jsonl --markers Answer: --out models/tokenizer
  python tools/train_tokenizer.py --input corpus.txt more.txt --vocab-size 4000 --out models/tokenizer
"""

#: Pieces that are one token wherever they stand.
MARKERS = ("<think>", "</think>", "\n\n", "\n", "\\boxed{", "}")
UNKNOWN, PADDING, END = "<unk>", "<|pad|>", "<|end|>"
#: sentencepiece writes a blank as this character.
BLANK = "\u2581"
#: Puts the question on a line of its own; the answer follows.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '\\n' }}{% endfor %}"
#: The score sentencepiece gives a marker when it segments text: above that of every ordinary piece.
MARKER_SCORE = -0.1


def read_texts(files: list[Path], columns: list[str]) -> Iterator[str]:
    """The texts to train on. Raises ValueError for a file without any, naming it."""
    for file in files:
        count = 0
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                texts = [line.rstrip("\n")]
                if file.suffix == ".jsonl":
                    row: dict[str, Any] = json.loads(line)
                    texts = [str(row[column]) for column in columns if row.get(column) is not None]
                for text in filter(None, texts):
                    count += 1
                    yield text
        if not count:
            raise ValueError(f"{file} holds no text to train on (columns {', '.join(columns)})")


def train(texts: Iterator[str], vocab_size: int, markers: list[str]) -> bytes:
    """Train a unigram model of at most `vocab_size` pieces; returns the serialised sentencepiece model.

    The model has fewer pieces where the texts do not support more. Raises ValueError where `vocab_size` cannot hold
    the bytes, the markers and the characters of the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            byte_fallback=True,
            user_defined_symbols=markers,
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            unk_piece=UNKNOWN,
            eos_piece=END,
            pad_piece=PADDING,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece refuses: {' '.join(str(error).split())}") from error
    return model.getvalue()


def hugging_face_tokenizer(model: bytes, markers: list[str]) -> Any:
    """The same tokenizer as a `tokenizers.Tokenizer`."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = [MARKER_SCORE if pieces.IdToPiece(i) in markers else pieces.GetScore(i) for i in range(len(pieces))]
    vocabulary = [(pieces.IdToPiece(i), score) for i, score in enumerate(scores)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    # Byte pieces stand for bytes, never for their own names in a text. Cutting around the digit, which is always a
    # piece of its own, keeps "<0x41>" from being found whole and changes nothing else.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=<)0(?=x[0-9A-F]{2}>)"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (UNKNOWN, END, PADDING)])
    return tokenizer


def write(model: bytes, out: Path, markers: list[str]) -> int:
    """Write the three files into `out`; returns the number of pieces."""
    tokenizer = hugging_face_tokenizer(model, markers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PADDING,
        "unk_token": UNKNOWN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".txt or .jsonl files")
    parser.add_argument("--columns", nargs="+", default=["prompt", "solution"], help="default prompt solution")
    parser.add_argument("--vocab-size", type=int, default=320, help="most pieces, 256 bytes included (default 320)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer's files")
    parser.add_argument("--markers", nargs="*", default=[], help="further texts, without blanks, that are one token")
    options = parser.parse_args(arguments)
    markers: list[str] = list(dict.fromkeys((*MARKERS, *options.markers)))
    try:
        if wrong := [marker for marker in options.markers if not marker or " " in marker]:
            raise ValueError(f"--markers {wrong[0]!r} must not be empty or contain blanks")
        model = train(read_texts(options.input, options.columns), options.vocab_size, markers)
        num_pieces = write(model, options.out, markers)
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {num_pieces} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
