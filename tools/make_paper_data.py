r"""Make the data files that the recipes in configs/reproduce/ read, from data sets of the hub.

    python tools/make_paper_data.py dapo_math_17k                     # writes data/dapo_math_17k.parquet
    python tools/make_paper_data.py math_train --source MATH.jsonl    # from a copy of the data set's rows

A row of a file has the columns that the recipes' defaults name: `prompt` (a conversation), `reward_model.ground_truth`
and `data_source`; files of worked solutions have `prompt`, `answer`, `solution` and `data_source`. The data sets are
read with the package `datasets`, which fetches them. `--source` takes rows from a file of the same columns instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from megarl.rewards.extraction import boxed

Row = dict[str, Any]

#: What is added to a question, each with the space or line before it.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ATTNRL = " Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class Recipe:
    """A file of data/: the hub's data set (its subsets, its split), and how rows become rows."""

    file: str
    hub: str
    rows: Callable[[Iterable[Row], str], Iterator[Row]]
    split: str = "train"
    subsets: tuple[str | None, ...] = (None,)


def asked(question: str, answer: str, source: str) -> Row:
    """A question for reinforcement with its reference, in the columns of data's defaults."""
    prompt = [{"role": "user", "content": question}]
    return {"data_source": source, "prompt": prompt, "reward_model": {"ground_truth": answer, "style": "rule"}}


def dapo(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """Each question once, without the frame of instructions around it, with one that asks for a box.

    The data set has every question about a hundred times. Its frame is a paragraph before and one after the question.
    """
    seen: set[str] = set()
    for row in rows:
        text = row["prompt"][0]["content"]
        question = text.partition("\n\n")[2].rpartition("\n\n")[0].strip()
        if not question:
            raise ValueError(f"a prompt without a paragraph before and after its question: {text[:80]!r}")
        if question not in seen:
            seen.add(question)
            yield asked(question + BOXED, str(row["reward_model"]["ground_truth"]), source)


def problems(ending: str) -> Callable[[Iterable[Row], str], Iterator[Row]]:
    """Of data sets with the columns problem and answer; `ending` is added to every question."""

    def made(rows: Iterable[Row], source: str) -> Iterator[Row]:
        for row in rows:
            yield asked(f"{row['problem']}{ending}", str(row["answer"]), source)

    return made


def solved(levels: frozenset[str] | None = None) -> Callable[[Iterable[Row], str], Iterator[Row]]:
    """MATH's problems with their solutions, of some levels ("Level 3"); the reference is the solution's last box."""

    def made(rows: Iterable[Row], source: str) -> Iterator[Row]:
        for row in rows:
            if levels is not None and row["level"] not in levels:
                continue
            answer = boxed(row["solution"])
            # A few solutions have no box; nothing could be compared with them.
            if answer:
                yield {
                    "prompt": row["problem"],
                    "answer": answer,
                    "solution": row["solution"],
                    "level": row["level"],
                    "data_source": source,
                }

    return made


def math500(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """MATH-500 as it is, in the columns of MATH's training part."""
    for row in rows:
        yield {
            "prompt": row["problem"],
            "answer": str(row["answer"]),
            "solution": row["solution"],
            "level": f"Level {row['level']}",
            "data_source": source,
        }


def deepmath(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """DeepMath's questions with the first of their three distilled traces, whole."""
    for row in rows:
        if row["r1_solution_1"]:
            yield {
                "prompt": row["question"],
                "answer": str(row["final_answer"]),
                "solution": row["r1_solution_1"],
                "data_source": source,
            }


def general(heldout: bool, count: int = 512) -> Callable[[Iterable[Row], str], Iterator[Row]]:
    """Instructions with a reference answer, the last `count` of them held out. Our choice of data."""

    def made(rows: Iterable[Row], source: str) -> Iterator[Row]:
        kept = list(rows)
        for row in kept[-count:] if heldout else kept[:-count]:
            context = f"\n\n{row['context']}" if row["context"] else ""
            yield {"prompt": f"{row['instruction']}{context}", "answer": row["response"], "data_source": source}

    return made


_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_LEVELS = frozenset(("Level 3", "Level 4", "Level 5"))
_HENDRYCKS, _DOLLY = "EleutherAI/hendrycks_math", "databricks/databricks-dolly-15k"

RECIPES: dict[str, Recipe] = {
    "dapo_math_17k": Recipe("dapo_math_17k.parquet", "BytedTsinghua-SIA/DAPO-Math-17k", dapo),
    "deepscaler": Recipe("deepscaler.parquet", "agentica-org/DeepScaleR-Preview-Dataset", problems(ATTNRL)),
    "aime24": Recipe("aime24.parquet", "HuggingFaceH4/aime_2024", problems(ATTNRL)),
    "math500": Recipe("math500.jsonl", "HuggingFaceH4/MATH-500", math500, split="test"),
    "math_train": Recipe("math_train.jsonl", _HENDRYCKS, solved(), subsets=_MATH),
    "math_level3to5": Recipe("math_level3to5.jsonl", _HENDRYCKS, solved(_LEVELS), subsets=_MATH),
    **{
        f"math_level{level}": Recipe(
            f"math_level{level}.jsonl", _HENDRYCKS, solved(frozenset((f"Level {level}",))), split="test", subsets=_MATH
        )
        for level in range(1, 6)
    },
    "deepmath": Recipe("deepmath.jsonl", "zwhe99/DeepMath-103K", deepmath),
    "general_qa": Recipe("general_qa.jsonl", _DOLLY, general(heldout=False)),
    "general_qa_test": Recipe("general_qa_test.jsonl", _DOLLY, general(heldout=True)),
}


def read(recipe: Recipe, source: Path | None) -> Iterator[Row]:
    """The data set's rows, from the hub or from a file with its columns."""
    if source is not None:
        kind = "parquet" if source.suffix == ".parquet" else "json"
        yield from datasets.load_dataset(kind, data_files=str(source), split="train")  # type: ignore[misc]
        return
    for subset in recipe.subsets:
        yield from datasets.load_dataset(recipe.hub, subset, split=recipe.split)  # type: ignore[misc]


def make(name: str, out: Path, source: Path | None = None) -> tuple[Path, int]:
    """Write the file of the recipe `name` into `out`, whole or not at all. Returns it, and how many rows it has.

    Raises ValueError where no row is left, and KeyError where the data set lacks a column.
    """
    recipe = RECIPES[name]
    made = list(recipe.rows(read(recipe, source), name))
    if not made:
        raise ValueError(f"{source or recipe.hub} has no row for {recipe.file}")
    out.mkdir(parents=True, exist_ok=True)
    path, table = out / recipe.file, datasets.Dataset.from_list(made)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".parquet":
        table.to_parquet(str(part))
    else:
        table.to_json(str(part), force_ascii=False)
    part.replace(path)
    return path, len(made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(RECIPES), help="which files")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default data)")
    parser.add_argument("--source", type=Path, help="a file with the data set's rows, in place of the hub")
    options = parser.parse_args(arguments)
    for name in options.names:
        try:
            path, count = make(name, options.out, options.source)
        except KeyError as error:
            print(f"make_paper_data: {name}: the data set has no column {error}", file=sys.stderr)
            return 1
        except (OSError, ValueError) as error:
            print(f"make_paper_data: {name}: {error}", file=sys.stderr)
            return 1
        print(f"{path}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
