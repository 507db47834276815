r"""Data of the calculator's miniature: products that the tiny policy cannot work out, and a tool that it seldom calls.

    by itself    374*48=  <think>374*48=17952</think>\boxed{17952}
    by a call    374*48=  <think><tool>374*48</tool><result>17952</result></think>\boxed{17952}

The warm-up shows both, the call in a small share of its rows: the start knows its form, and copies the result. By
itself it gets the first digits right and the others wrong.
"""

from __future__ import annotations

import random
from pathlib import Path

from compare.files import write_rows

#: Share of the warm-up's solutions that call the tool.
CALLING = 0.15
#: Least and greatest factors.
FIRST, SECOND = (101, 999), (12, 99)
#: Texts that are one token each: a turn ends right after `</tool>`.
MARKERS = ("<tool>", "</tool>", "<result>", "</result>")


def solution(question: str, answer: str, calls: bool) -> str:
    """The worked solution of a question such as "374*48"."""
    work = f"<tool>{question}</tool><result>{answer}</result>" if calls else f"{question}={answer}"
    return f"<think>{work}</think>\\boxed{{{answer}}}"


def make(out: Path, warmup: int, train: int, heldout: int, seed: int = 0) -> None:
    """Write warmup.jsonl, train.jsonl and heldout.jsonl into `out`; no question is in two files, or twice in one."""
    source = random.Random(f"calls {seed}")
    taken: set[tuple[int, int]] = set()
    out.mkdir(parents=True, exist_ok=True)
    for name, count in {"heldout": heldout, "train": train, "warmup": warmup}.items():
        rows = []
        while len(rows) < count:
            factors = source.randint(*FIRST), source.randint(*SECOND)
            if factors in taken:
                continue
            taken.add(factors)
            question, answer = f"{factors[0]}*{factors[1]}", str(factors[0] * factors[1])
            calls = name != "warmup" or source.random() < CALLING
            text = solution(question, answer, calls)
            rows.append({"prompt": f"{question}=", "answer": answer, "solution": text, "data_source": "products"})
        write_rows(out / f"{name}.jsonl", rows)
