"""Prompts with their references from a data file or a hub data set. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.sections import DataSettings
from megarl.data.tokenizer import Message, Tokenizer, prompt_ids
from megarl.errors import Refusal
from megarl.records import Prompt

#: File endings and the reader of the `datasets` library for each.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The usable rows in file order, and how many rows were read, skipped (by reason) and kept.

    Counters: rows, no_prompt, no_answer, too_long, no_solution, kept; rows is the sum of the others.
    """

    prompts: tuple[Prompt, ...]
    counters: dict[str, int]


def load_prompts(
    settings: DataSettings, tokenizer: Tokenizer, *, max_prompt_tokens: int | None = None, need_solution: bool = False
) -> LoadedPrompts:
    r"""Read the data set that `settings` names and tokenize its prompts.

    The prompt column holds a question or a list of chat messages; the answer column a reference, or a
    list of equally right references, of which the first becomes `Prompt.answer` and the others
    `Prompt.alternatives`. Rows without prompt or answer, with a prompt of more than
    `max_prompt_tokens` (default `settings.max_prompt_tokens`), and where `need_solution` is set without
    a solution, are skipped and counted.

    Raises `Refusal` where the file is missing, empty or unreadable, a column does not exist, or no row is left.
    """
    table = _read(settings)
    paths = [(settings.prompt_column, "prompt_column"), (settings.answer_column, "answer_column")]
    if settings.solution_column is not None:
        paths.append((settings.solution_column, "solution_column"))
    paths += [(column, "extra_columns") for column in settings.extra_columns]
    for column, setting in paths:
        _check_column(settings, table.features, column, setting)
    reader = _RowReader(settings, tokenizer, max_prompt_tokens or settings.max_prompt_tokens, need_solution)
    counters: dict[str, int] = dict.fromkeys(("rows", "no_prompt", "no_answer", "too_long", "no_solution", "kept"), 0)
    prompts = []
    for index, row in enumerate(_rows(table, settings.max_rows)):
        prompt = reader.prompt(index, row)
        counters["rows"] += 1
        if isinstance(prompt, str):
            counters[prompt] += 1
        else:
            counters["kept"] += 1
            prompts.append(prompt)
    if not prompts:
        skips = ", ".join(f"{reason} {count}" for reason, count in counters.items() if reason != "kept" and count)
        raise Refusal(
            f"data.path={settings.path}",
            f"has no usable row ({skips or 'rows 0'})",
            "check the column settings, data.answer_pattern and data.max_prompt_tokens",
        )
    return LoadedPrompts(tuple(prompts), counters)


class _RowReader:
    """Turns one row into a `Prompt`, or into the name of the counter of its skip."""

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, max_tokens: int, need_solution: bool) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._need_solution = need_solution
        self._pattern = _compiled(settings.answer_pattern)
        if settings.template is not None and "{prompt}" not in settings.template:
            raise Refusal(
                f"data.template={settings.template!r}",
                "must contain {prompt}",
                "write {prompt} where the question goes",
            )

    def prompt(self, index: int, row: Mapping[str, Any]) -> Prompt | str:
        messages = _messages(_lookup(row, self._settings.prompt_column))
        if not messages:
            return "no_prompt"
        answers = self._answers(_lookup(row, self._settings.answer_column))
        if not answers:
            return "no_answer"
        text, token_ids = self._tokenized(messages)
        if len(token_ids) > self._max_tokens:
            return "too_long"
        solution = None
        if self._settings.solution_column is not None:
            solution = _text(_lookup(row, self._settings.solution_column))
        if self._need_solution and solution is None:
            return "no_solution"
        source = self._settings.source_column
        return Prompt(
            index=index,
            token_ids=tuple(token_ids),
            text=text,
            answer=answers[0],
            source="" if source is None else _text(_lookup(row, source)) or "",
            solution=solution,
            alternatives=tuple(answers[1:]),
            extra={column: _lookup(row, column) for column in self._settings.extra_columns},
        )

    def _answers(self, value: Any) -> list[str]:
        """The references in one cell, without blanks at their ends, without repetitions, in order."""
        found = []
        for one in value if isinstance(value, list) else [value]:
            text = _text(one)
            if text is not None and self._pattern is not None:
                match = self._pattern.search(text)
                text = _text(match.group(1)) if match else None
            if text is not None:
                found.append(text.strip())
        return list(dict.fromkeys(found))

    def _tokenized(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The question as text, and the ids of the whole prompt."""
        return _question(messages), question_ids(self._settings, self._tokenizer, messages)


def question_ids(settings: DataSettings, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the whole prompt that asks the question `messages`.

    `settings.template` with the messages' text where there is one; else the chat, after `settings.system`.
    """
    if settings.template is not None:
        # Not str.format: questions and templates are full of braces.
        return prompt_ids(tokenizer, settings.template.replace("{prompt}", _question(messages)))
    if settings.system is not None:
        messages = [{"role": "system", "content": settings.system}, *messages]
    return tokenizer.apply_chat(messages)


def _question(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _read(settings: DataSettings) -> Any:
    """The table of `settings.path` as a `datasets.Dataset`.

    Importing the library and reading GSM8K take under a second together. Its cache is locked per file, so any
    number of processes may read the same data at once: one of them converts it, the others map the result.
    """
    path = Path(settings.path)
    reader = READERS.get(path.suffix)
    if reader is None:
        if path.exists() or path.is_absolute() or settings.path.startswith("."):
            raise Refusal(
                f"data.path={settings.path}",
                f"must end in one of {', '.join(READERS)}",
                "convert the file, or give a hub name",
            )
        return _load(settings, settings.path, name=settings.subset, split=settings.split)
    if not path.is_file():
        raise Refusal(
            f"data.path={settings.path}", "is not a file", "correct the path; it is relative to where you start megarl"
        )
    if path.stat().st_size == 0:
        raise Refusal(f"data.path={settings.path}", "is an empty file", "write it again")
    return _load(settings, reader, data_files=str(path.resolve()), split="train")


def _load(settings: DataSettings, path: str, **options: Any) -> Any:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options)
    except Exception as error:  # the library raises whatever its readers, its file systems and the network raise
        cause = error.__cause__ or error
        raise Refusal(
            f"data.path={settings.path}",
            f"cannot be read ({type(cause).__name__}: {' '.join(str(cause).split())[:300]})",
            "check the file's format, or the hub name, data.subset, data.split and the connection",
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _rows(table: Any, max_rows: int | None) -> Iterator[dict[str, Any]]:
    return iter(table if max_rows is None else table.select(range(min(max_rows, len(table)))))


def _check_column(settings: DataSettings, features: Any, column: str, setting: str) -> None:
    """Raise `Refusal` where the dotted `column` leads nowhere, naming what there is at that depth."""
    inside: Any = features
    for depth, part in enumerate(column.split(".")):
        names = list(inside) if isinstance(inside, Mapping) else []
        if part not in names:
            where = (
                f"the columns of {settings.path}"
                if depth == 0
                else f"the fields of {'.'.join(column.split('.')[:depth])}"
            )
            raise Refusal(
                f"data.{setting}={column}",
                f"must be among {where}: {', '.join(names) or 'none'}",
                f"set data.{setting}",
            )
        inside = inside[part]


def _lookup(row: Mapping[str, Any], column: str) -> Any:
    """The value at a dotted column, None where a record on the way is missing."""
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _text(value: Any) -> str | None:
    """A cell as text; None for a missing or blank one. Whole floats lose their .0: readers make them of ints."""
    if value is None or isinstance(value, (list, Mapping)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text if text.strip() else None


def _messages(value: Any) -> list[dict[str, str]]:
    """Chat messages of a prompt cell; empty where it holds no question."""
    if isinstance(value, list):
        messages = [
            {"role": _text(message.get("role")) or "user", "content": content}
            for message in value
            if isinstance(message, Mapping) and (content := _text(message.get("content"))) is not None
        ]
        return messages if any(message["role"] != "system" for message in messages) else []
    text = _text(value)
    return [] if text is None else [{"role": "user", "content": text}]


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    """Compile `data.answer_pattern`. Raises `Refusal` where it is no expression with exactly one group."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Refusal(
            f"data.answer_pattern={pattern!r}", f"must be a regular expression ({error})", "correct it"
        ) from None
    if compiled.groups != 1:
        raise Refusal(
            f"data.answer_pattern={pattern!r}",
            f"must have one group, not {compiled.groups}",
            "put ( ) around the answer",
        )
    return compiled
