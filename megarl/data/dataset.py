"""Prompts with their references from data files or hub data sets. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.data import DEMONSTRATIONS, DataSettings, OneSource, each_source
from megarl.config.schema import RunConfig
from megarl.data.cells import NoText, lookup, names_at, native, text_of
from megarl.data.chat_template import TemplateRefusal, TurnLost
from megarl.data.messages import BESIDE, Message, Unfit, messages_of, question_of
from megarl.data.tables import Row, Table, open_table
from megarl.data.tokenizer import Tokenizer, prompt_ids
from megarl.errors import Refusal
from megarl.records import Prompt

#: Counters of rows that are skipped, and what is wrong with such a row.
REASONS = {
    "no_prompt": "without a question",
    "no_answer": "without an answer",
    "too_long": "with a prompt of more tokens than the limit",
    "no_solution": "without a solution",
    "not_text": "with pictures, sound, files or calls of tools in the prompt",
    "bad_turns": "whose prompt is neither a text nor a list of whole messages",
    "bad_answer": "whose answer or solution is no text",
    "template_refused": "that the chat template refuses",
    "template_lost": "of which the chat template leaves a turn out",
}
#: Counters that are there even where they are 0.
_ALWAYS: tuple[str, ...] = ("rows", "no_prompt", "no_answer", "too_long", "no_solution", "kept")
#: Share of rows that may be skipped before it is worth a warning. Our choice.
SKIPPED_SHARE = 0.1
#: Most names of sources that metrics are told apart by. Our choice: with more of them they name something else.
MOST_SOURCES = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One source's prompts: `count` of `LoadedPrompts.prompts`, drawn by `weight`; None: each row is drawn alike."""

    count: int
    weight: float | None


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The usable rows in file order, source after source, and how many rows were read, skipped (by reason) and kept.

    Counters: rows, kept, and the keys of `REASONS`; rows is the sum of the others. `first` names the first row of each
    reason.
    """

    prompts: tuple[Prompt, ...]
    counters: dict[str, int]
    parts: tuple[Part, ...]
    first: dict[str, str] = field(default_factory=dict)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the prompts' sources, in order, where there are several, by which metrics are told apart."""
        names = tuple(sorted({prompt.source for prompt in self.prompts}))
        return names if 1 < len(names) <= MOST_SOURCES else ()

    @property
    def skipped_share(self) -> float:
        """The part of the rows that is not kept."""
        return 1 - self.counters["kept"] / self.counters["rows"]

    def sentence(self) -> str:
        """How many rows were kept and skipped, why, and which was the first of each kind."""
        rows, kept = self.counters["rows"], self.counters["kept"]
        if rows == kept:
            return f"all {rows:,} rows kept"
        reasons = [
            f"{self.counters[name]:,} {what} (the first is {self.first[name]})"
            for name, what in REASONS.items()
            if self.counters.get(name)
        ]
        return f"{kept:,} of {rows:,} rows kept, skipped: {'; '.join(reasons)}"


def training_data(config: RunConfig, tokenizer: Tokenizer, *, need_solution: bool) -> LoadedPrompts:
    """The prompts that `config` trains on. Raises `Refusal` as `load_prompts`."""
    return load_prompts(config.data, tokenizer, need_solution=need_solution)


def demonstration_data(config: RunConfig, tokenizer: Tokenizer) -> LoadedPrompts:
    """The questions with the responses that `config` learns as demonstrations. Raises `Refusal` as `load_prompts`."""
    settings = config.data.of_demonstrations()
    assert settings is not None
    return load_prompts(settings, tokenizer, need_solution=True, need_answer=False, key=DEMONSTRATIONS)


def evaluation_data(config: RunConfig, tokenizer: Tokenizer) -> LoadedPrompts:
    """The prompts that `config` evaluates on. Raises `Refusal` as `load_prompts`."""
    return load_prompts(evaluation_settings(config), tokenizer, key=evaluation_key(config))


def evaluation_key(config: RunConfig) -> str:
    """The section that names the evaluation's files."""
    return "evaluation" if config.evaluation.names_files else "data"


def evaluation_settings(config: RunConfig) -> DataSettings:
    """The data settings of the evaluation: those of training with its own files, in file order."""
    settings, data = config.evaluation, config.data
    changes: dict[str, Any] = {"max_rows": settings.rows, "shuffle": False, "split": settings.split}
    changes["solution_column"] = None
    if settings.names_files:
        changes |= {"path": settings.path, "sources": settings.sources}
    else:
        training: dict[str, Any] = dict.fromkeys(("weight", "split", "max_rows", "solution_column"))
        changes["sources"] = tuple(source.model_copy(update=training) for source in data.sources)
    return data.model_copy(update=changes)


def load_prompts(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int | None = None,
    need_solution: bool = False,
    need_answer: bool = True,
    key: str = "data",
) -> LoadedPrompts:
    r"""Read the data sets that `settings` names and tokenize their prompts.

    The prompt column holds a question or a list of chat messages; the answer column a reference, or a
    list of equally right references, of which the first becomes `Prompt.answer` and the others
    `Prompt.alternatives`. A row is kept with all its text or not at all: one without prompt or answer, with a prompt
    of more than `max_prompt_tokens` (default `settings.max_prompt_tokens`), where `need_solution` is set without
    a solution, or for another of `REASONS`, is skipped and counted. Without `need_answer` no references are read, and
    they are empty. `key` is the section that names the files.

    Raises `Refusal` where a file is missing, empty or unreadable, a column does not exist, or no row of a source is
    left.
    """
    sources = each_source(settings, key)
    prompts: list[Prompt] = []
    counters = dict.fromkeys(_ALWAYS, 0)
    first: dict[str, str] = {}
    parts = []
    for source in sources:
        reader = SourceReader(
            source, tokenizer, max_prompt_tokens, need_solution, several=len(sources) > 1, need_answer=need_answer
        )
        before, offset = len(prompts), counters["rows"]
        prompts += reader.prompts(offset)
        for name, amount in reader.counters.items():
            counters[name] = counters.get(name, 0) + amount
        first = reader.first | first
        parts.append(Part(len(prompts) - before, source.weight))
    return LoadedPrompts(tuple(prompts), counters, tuple(parts), first)


class _Usable(NamedTuple):
    messages: list[Message]
    answers: list[str]
    solution: str | None
    token_ids: list[int]


class SourceReader:
    """Turns the rows of one source into prompts, and counts those that it skips; `first` names the first of each kind.

    Raises `Refusal` where the source cannot be read, or has no such columns.
    """

    def __init__(
        self,
        source: OneSource,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        need_solution: bool,
        several: bool,
        need_answer: bool = True,
    ) -> None:
        self._source, self._settings = source, source.settings
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens or source.settings.max_prompt_tokens
        self._need_solution = need_solution
        self._answer_column = source.settings.answer_column if need_answer else None
        self._pattern = _compiled(self._settings.answer_pattern)
        if self._settings.template is not None and "{prompt}" not in self._settings.template:
            raise Refusal(
                f"data.template={self._settings.template!r}",
                "must contain {prompt}",
                "write {prompt} where the question goes",
            )
        self.counters = dict.fromkeys(_ALWAYS, 0)
        self.first: dict[str, str] = {}
        self._file = str(self._settings.path)
        self._default_name = Path(self._file).stem if several else ""
        self._table = _with_columns(source, need_answer)
        read = (self._settings.prompt_column, self._answer_column, self._settings.solution_column)
        self._beside = [name for name in BESIDE if name not in read]
        self._refused: TemplateRefusal | None = None

    def prompts(self, offset: int = 0) -> Iterator[Prompt]:
        """The usable rows; the first row has index `offset`. Raises `Refusal` where none of them is usable."""
        for index, row in enumerate(self.rows()):
            prompt = self._prompt(offset + index, row)
            if self.count(prompt, index) and isinstance(prompt, Prompt):
                yield prompt
        self.refuse_if_empty()

    def rows(self) -> Iterator[Row]:
        """The rows to look at."""
        return islice(self._table.rows(), self._settings.max_rows)

    def count(self, found: object, index: int) -> bool:
        """Count what became of the row `index`, the name of a reason where it is a text; whether it is kept."""
        reason = found if isinstance(found, str) else None
        self.counters["rows"] += 1
        self.counters[reason or "kept"] = self.counters.get(reason or "kept", 0) + 1
        if reason is not None and reason not in self.first:
            said = f": {self._refused.rule}" if self._refused is not None and reason.startswith("template") else ""
            self.first[reason] = f"row {index + 1} of {self._file}{said}"
        return reason is None

    def refuse_if_empty(self) -> None:
        """Raise `Refusal` where no row was kept."""
        if self.counters["kept"]:
            return
        value = f"{self._source.key}={self._file}"
        if self._refused is not None:
            where = next(self.first[reason] for reason in self.first if reason.startswith("template"))
            raise Refusal(f"{self._refused.value}, at {where.partition(':')[0]}", self._refused.rule, self._refused.fix)
        skips = ", ".join(f"{reason} {count}" for reason, count in self.counters.items() if reason != "kept" and count)
        fix = "check the column settings, data.answer_pattern and data.max_prompt_tokens"
        raise Refusal(value, f"has no usable row ({skips or 'rows 0'})", fix)

    def usable(self, row: Row, *, tokenize: bool = True) -> _Usable | str:
        """What a prompt is made of, or the reason for which the row is skipped; without `tokenize` there are no ids."""
        found = self._read(row)
        if isinstance(found, str):
            return found
        messages, answers, solution = found
        token_ids = self._token_ids(messages) if tokenize else []
        if isinstance(token_ids, str):
            return token_ids
        if self._need_solution and solution is None:
            return "no_solution"
        return _Usable(messages, answers, solution, token_ids)

    def _read(self, row: Row) -> tuple[list[Message], list[str], str | None] | str:
        if any(row.get(name) not in (None, False, "", [], {}) for name in self._beside):
            return "not_text"
        try:
            messages = messages_of(lookup(row, self._settings.prompt_column))
        except Unfit as unfit:
            return unfit.reason
        try:
            answers = [""]
            if self._answer_column is not None:
                answers = self._answers(lookup(row, self._answer_column))
            solution = None
            if self._settings.solution_column is not None:
                solution = text_of(lookup(row, self._settings.solution_column))
        except NoText:
            return "bad_answer"
        if not answers:
            return "no_answer"
        return messages, answers, solution

    def _token_ids(self, messages: Sequence[Message]) -> list[int] | str:
        try:
            token_ids = question_ids(self._settings, self._tokenizer, messages)
        except TemplateRefusal as error:
            self._refused = self._refused or error
            return "template_lost" if isinstance(error, TurnLost) else "template_refused"
        return "too_long" if len(token_ids) > self._max_tokens else token_ids

    def _prompt(self, index: int, row: Row) -> Prompt | str:
        found = self.usable(row)
        if isinstance(found, str):
            return found
        return Prompt(
            index=index,
            token_ids=tuple(found.token_ids),
            text=question_of(found.messages),
            answer=found.answers[0],
            source=self._source.name or self._named_in(row) or self._default_name,
            solution=found.solution,
            alternatives=tuple(found.answers[1:]),
            extra={column: native(lookup(row, column)) for column in self._settings.extra_columns},
        )

    def _named_in(self, row: Row) -> str | None:
        column = self._settings.source_column
        try:
            return None if column is None else text_of(lookup(row, column))
        except NoText:
            return None

    def _answers(self, value: Any) -> list[str]:
        """The references in one cell, without blanks at their ends, without repetitions, in order."""
        found = []
        for one in value if isinstance(value, list) else [value]:
            text = text_of(one)
            if text is not None and self._pattern is not None:
                match = self._pattern.search(text)
                text = text_of(match.group(1)) if match else None
            if text is not None:
                found.append(text.strip())
        return list(dict.fromkeys(found))


def question_ids(settings: DataSettings, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the whole prompt that asks the question `messages`, with `settings.instruction` behind it.

    `settings.template` with the messages' text where there is one; else the chat, after `settings.system`.
    """
    if settings.instruction is not None:
        *before, last = messages
        messages = [*before, {**last, "content": f"{last['content']} {settings.instruction}"}]
    if settings.template is not None:
        # Not str.format: questions and templates are full of braces.
        return prompt_ids(tokenizer, settings.template.replace("{prompt}", question_of(messages)))
    if settings.system is not None:
        messages = [{"role": "system", "content": settings.system}, *messages]
    return tokenizer.apply_chat(messages)


def _with_columns(source: OneSource, need_answer: bool) -> Table:
    """The source's table. Raises `Refusal` where a column leads nowhere, naming what there is at that depth."""
    settings, section = source.settings, "data" if need_answer else DEMONSTRATIONS
    named = [(settings.prompt_column, "prompt_column")]
    if need_answer and settings.answer_column is not None:
        named.append((settings.answer_column, "answer_column"))
    if settings.solution_column is not None:
        named.append((settings.solution_column, "solution_column"))
    named += [(column, "extra_columns") for column in settings.extra_columns]
    default = DataSettings.model_fields["source_column"].default
    if settings.source_column not in (None, default):
        named.append((settings.source_column, "source_column"))
    columns = [column for column, _ in named]
    table = open_table(source, [*columns, settings.source_column or default, *BESIDE])
    for column, setting in named:
        missing = names_at(iter([table.names]) if table.names is not None else table.rows(), column)
        depth, names = missing or (0, [])
        # A file without any row says no names; it is refused for that.
        if missing is None or not (names or depth or table.names is not None):
            continue
        path = ".".join(column.split(".")[:depth])
        where = f"the fields of {path}" if depth else f"the columns of {settings.path}"
        raise Refusal(
            f"{section}.{setting}={column}",
            f"must be among {where}: {', '.join(names) or 'none'}",
            f"set {section}.{setting}",
        )
    return table


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
