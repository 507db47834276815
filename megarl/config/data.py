"""The data section: which rows become prompts, of one file or hub data set or of several. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megarl.config.base import PathText, Settings
from megarl.errors import Refusal

#: The section that names the demonstrations' files.
DEMONSTRATIONS = "data.demonstrations"
#: Endings of the files that can be read; any other name is looked for on the hub.
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


class DataSource(Settings):
    """One of several files or hub data sets. What is left out is as in the section around it."""

    path: PathText = Field(description="Hub name, or a .parquet, .jsonl, .json, .csv or .tsv file.")
    name: str | None = Field(
        default=None,
        min_length=1,
        description="Name in metrics and rewards; default: what the row's source column says, else the file's name.",
    )
    weight: PositiveFloat | None = Field(
        default=None,
        description="Share of the prompts drawn, relative to the other weights. All sources have one or none has; "
        "without weights each row is drawn once per epoch.",
    )
    subset: str | None = Field(default=None, description="As data.subset.")
    split: str | None = Field(default=None, description="As data.split.")
    prompt_column: str | None = Field(default=None, description="As data.prompt_column.")
    answer_column: str | None = Field(default=None, description="As data.answer_column.")
    solution_column: str | None = Field(default=None, description="As data.solution_column.")
    source_column: str | None = Field(default=None, description="As data.source_column.")
    extra_columns: tuple[str, ...] | None = Field(default=None, description="As data.extra_columns.")
    answer_pattern: str | None = Field(default=None, description="As data.answer_pattern.")
    instruction: str | None = Field(default=None, description="As data.instruction.")
    max_rows: PositiveInt | None = Field(default=None, description="As data.max_rows.")


class Sourced(Settings):
    """A section whose rows come from `path`, or from several `sources`; a list as `path` is short for these."""

    @model_validator(mode="before")
    @classmethod
    def _paths_as_sources(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("sources"):
            return {"path": None} | given
        if isinstance(given.get("path"), list):
            sources = [{"path": one} if isinstance(one, str) else one for one in given["path"]]
            return given | {"path": None, "sources": sources}
        return given


class DemonstrationSettings(Sourced):
    """Rows of a question with a whole response to it, its reasoning and its answer."""

    path: PathText | None = Field(default=None, description="As data.path.")
    sources: tuple[DataSource, ...] = Field(default=(), description="As data.sources.")
    subset: str | None = Field(default=None, description="As data.subset.")
    split: str = Field(default="train", description="As data.split.")
    prompt_column: str | None = Field(default=None, description="As data.prompt_column, which is its default.")
    solution_column: str = Field(default="solution", description="Column of the response.")
    max_tokens: PositiveInt | None = Field(
        default=None,
        description="Longest response in tokens, the end token included; default rollout.max_tokens. A longer one is "
        "passed over when its turn comes, and counted.",
    )
    max_rows: PositiveInt | None = Field(default=None, description="As data.max_rows.")


class DataSettings(Sourced):
    path: PathText | None = Field(
        description="Hub name, or a .parquet, .jsonl, .json, .csv or .tsv file; or a list of them, as data.sources."
    )
    sources: tuple[DataSource, ...] = Field(
        default=(),
        description="In place of data.path several files or hub data sets, each a table of path, and where they differ "
        "name, weight, subset, split, max_rows and columns.",
    )
    subset: str | None = Field(default=None, description="Configuration of a hub data set that has several.")
    split: str = Field(default="train", description="Split of a hub data set.")
    prompt_column: str = Field(
        default="prompt",
        description="Column of the question: a string or a list of messages; dots go into records, and numbers behind "
        "them into lists.",
    )
    answer_column: str | None = Field(
        default="reward_model.ground_truth",
        description="Column of the reference answer; dots go into records. null: there are none, for a judge.",
    )
    solution_column: str | None = Field(
        default=None, description="Column of a worked solution, for algorithms that learn it."
    )
    source_column: str | None = Field(
        default="data_source",
        description="Column that names the row's source; the default need not be there, any other must.",
    )
    extra_columns: tuple[str, ...] = Field(
        default=(), description="Further columns that a reward function is handed, as they are; dots go into records."
    )
    answer_pattern: str | None = Field(
        default=None,
        description="Regular expression with one group that picks the reference out of the answer column "
        "(GSM8K: '####\\s*(.+)').",
    )
    instruction: str | None = Field(
        default=None, description="Text that follows the question in its turn, such as how the answer is to be written."
    )
    template: str | None = Field(
        default=None,
        description="Text with {prompt} in it, put around the question; default: the tokenizer's chat template "
        "where it has one, else the question.",
    )
    system: str | None = Field(default=None, description="System message for the chat template.")
    max_prompt_tokens: PositiveInt = Field(
        default=1024, description="Rows with longer prompts are skipped and counted."
    )
    max_rows: PositiveInt | None = Field(default=None, description="Use only the first rows of the file.")
    shuffle: bool = Field(default=True, description="Shuffle each epoch by the run's seed.")
    demonstrations: DemonstrationSettings | None = Field(
        default=None, description="A second data set, of responses to learn beside the rollouts."
    )

    def of_demonstrations(self) -> DataSettings | None:
        """How the demonstrations are read: as the questions, but for what they say of their own."""
        own = self.demonstrations
        if own is None:
            return None
        changes = own.model_dump(include=set(DataSettings.model_fields), exclude={"sources", "prompt_column"})
        column = self.prompt_column if own.prompt_column is None else own.prompt_column
        beside = {"sources": own.sources, "prompt_column": column, "extra_columns": (), "demonstrations": None}
        return self.model_copy(update=changes | beside)


class OneSource(NamedTuple):
    """One file or hub data set: its settings, whose `path` is given, and the `key` under which that path stands."""

    key: str
    settings: DataSettings
    name: str | None = None
    weight: float | None = None


def each_source(data: DataSettings, key: str = "data") -> list[OneSource]:
    """The files or hub data sets of `data`, in order; `key` names the section that gives their paths."""
    if not data.sources:
        return [OneSource(f"{key}.path", data)]
    found = []
    for number, source in enumerate(data.sources):
        changes = source.model_dump(exclude={"name", "weight"}, exclude_none=True) | {"sources": ()}
        settings = data.model_copy(update=changes)
        found.append(OneSource(f"{key}.sources.{number}.path", settings, source.name, source.weight))
    return found


def source_refusals(key: str, path: str | None, sources: tuple[DataSource, ...]) -> Iterator[Refusal]:
    """Rules of a section that gives `path`, `sources` or neither; `key` is its name."""
    if path is not None and path.startswith("["):
        rule = "is one path in an argument, not a list"
        yield Refusal(f"{key}.path={path}", rule, f"give {key}.sources='[{{path: FILE}}, {{path: FILE}}]'")
    if path is not None and sources:
        yield Refusal(f"{key}.path={path}", f"contradicts {key}.sources", f"give one: {key}.path=null")
    weights = [source.weight for source in sources]
    if any(weights) and not all(weights):
        number = weights.index(None)
        rule = "must be given, since other sources have one"
        yield Refusal(f"{key}.sources.{number}.weight", rule, "give all sources a weight, or none")
    names = [source.name for source in sources if source.name is not None]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Refusal(f"{key}.sources: name={name}", "names several sources", "give each a name of its own")
