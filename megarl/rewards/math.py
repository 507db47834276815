"""Rules that grade mathematical answers, and say what they took for the answer and why they decided so.

Torch-free; math-verify is imported on first use (half a second). Each rule answers one question, is this response
right, as True or False; what that is worth is the grader's business (`reward.low`, `reward.high`). They may take long
on hostile input: call them in a process that can be killed (`megarl.rewards.grader`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megarl.rewards.comparison import answers_equal
from megarl.rewards.deepscaler import deepscaler_equal, deepscaler_taken
from megarl.rewards.extraction import Taken, after_thinking, answering, boxed, taken
from megarl.rewards.reasons import decided, listening

#: Characters of an answer that a decision shows. Our choice.
SHOWN = 1500


class Decision(NamedTuple):
    """Whether a response is right, what was taken for its answer (None: nothing), and why it was decided so."""

    right: bool
    found: str | None
    why: str


class Rule(NamedTuple):
    """How a response is graded: what is taken for its answer, and whether that equals a reference."""

    take: Callable[[str], Taken]
    equal: Callable[[str, str], bool]


def _take_box(text: str) -> Taken:
    part = answering(text)
    content = boxed(part)
    if content is None:
        return Taken(None, "no complete box")
    inside = part is text and after_thinking(text) != text
    where = "the last box, in the thinking, since nothing is said after it" if inside else "the last box"
    return Taken(content.strip(), where)


def _same_text(reference: str, found: str) -> bool:
    return decided(found.strip() == reference.strip(), "as text: {} and {}", found, reference)


#: The rules by the name that `reward.kind` has for them.
#: math: the answer equals the reference, however the two are written. boxed: the last box is the reference's text, as
#: in NFT (arXiv 2505.18116), which looks at the last 100 characters (`reward.last_characters`). deepscaler: AttnRL's.
RULES = {
    "math": Rule(taken, answers_equal),
    "boxed": Rule(_take_box, _same_text),
    "deepscaler": Rule(deepscaler_taken, deepscaler_equal),
}


def decide(kind: str, text: str, references: Sequence[str]) -> Decision:
    """The decision of the rule `kind` on a response; it is right where it equals one of the references."""
    rule = RULES[kind]
    answer, where = rule.take(text)
    if answer is None:
        return Decision(False, None, where)
    whys = []
    for reference in references:
        with listening() as notes:
            equal = rule.equal(reference, answer)
        said = "; ".join(notes)
        if equal:
            return Decision(True, answer[:SHOWN], f"{where}; equal ({said})")
        whys.append(said)
    return Decision(False, answer[:SHOWN], f"{where}; different ({'; or '.join(whys[:3])})")


def boxed_equals(text: str, answer: str) -> bool:
    r"""The strict rule: the last `\boxed{}` equals `answer` as text, blanks at the ends aside.

    A box in the thinking counts only where nothing is said after it.
    """
    return decide("boxed", text, (answer,)).right


def math_equals(text: str, answer: str) -> bool:
    r"""True where the answer that `text` gives equals the reference `answer`, however the two are written.

    The answer is what follows the thinking gives: the last `\boxed{}`, else what is stated last.
    """
    return decide("math", text, (answer,)).right


def prepare() -> None:
    """Import what is slow, before the clock of the first answer runs."""
    answers_equal(r"\sqrt{2}", "x")
    deepscaler_equal(r"\sqrt{2}", "x")
