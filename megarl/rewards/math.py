r"""Grading of mathematical answers. Torch-free; math-verify is imported on first use (half a second).

Both rules answer one question, is this response right, as True or False; what that is worth is the
grader's business (`reward.low`, `reward.high`).
"""

from __future__ import annotations

from megarl.rewards.comparison import answers_equal
from megarl.rewards.extraction import answer_in, answering, boxed


def boxed_equals(text: str, answer: str) -> bool:
    r"""The strict rule: the last `\boxed{}` equals `answer` as text, blanks at the ends aside.

    A box in the thinking counts only where nothing is said after it.
    """
    content = boxed(answering(text))
    return content is not None and content.strip() == answer.strip()


def math_equals(text: str, answer: str) -> bool:
    r"""True where the answer that `text` gives equals the reference `answer`, however the two are written.

    The answer is what follows the thinking gives: the last `\boxed{}`, else what is stated last. It may take long on
    hostile input: call it in a process that can be killed (`megarl.rewards.grader`).
    """
    found = answer_in(text)
    return found is not None and answers_equal(answer, found)


def prepare() -> None:
    """Import what is slow, before the clock of the first answer runs."""
    answers_equal(r"\sqrt{2}", "x")
