"""DeepScaleR's rule with math-verify, as AttnRL grades (arXiv 2509.26628 and its released code), written anew.

The answer is the last box of what follows the last `</think>`, of the whole response where no thinking ends; without a
box what math-verify finds there. It is right where it is the reference's text but for layout, or where math-verify
finds the two equal: numbers to six decimals, sets, intervals and tuples, expressions by SymPy.

The released code also tries the comparison of PRM800K's graders, which SymPy's part of math-verify's covers; that it is
left out here, and the bounds on length and depth, are our choice.
"""

from __future__ import annotations

import logging

from megarl.rewards.extraction import REACH, Taken, boxed
from megarl.rewards.notation import DEEPEST_VALUE, LONGEST_VALUE, is_long, written
from megarl.rewards.reasons import decided

_END = "</think>"


def deepscaler_taken(text: str) -> Taken:
    """What the rule takes for the answer of a response."""
    after = text.rpartition(_END)[2]
    where = "after the last </think>" if _END in text else "in the whole response, which has no </think>"
    content = boxed(after)
    if content is not None:
        return Taken(content.strip(), f"the last box {where}")
    found = _parsed(after[-REACH:])
    if len(found) < 2:
        return Taken(None, f"no box, and nothing that math-verify reads, {where}")
    return Taken(str(found[1]), f"no box; what math-verify reads {where}")


def deepscaler_equal(reference: str, found: str) -> bool:
    """Whether the rule takes `found` for the reference, the last box of which counts where it has one."""
    reference = (boxed(reference) or reference).strip()
    if not reference or not found:
        return decided(False, "the reference is empty" if not reference else "the answer is empty")
    if _bare(found) == _bare(reference):
        return decided(True, "the same text but for layout")
    if is_long(reference) or is_long(found):
        return decided(False, f"longer than {LONGEST_VALUE} characters or more than {DEEPEST_VALUE} brackets deep")
    from math_verify import verify

    expected, given = (_parsed(rf"\boxed{{{text}}}") for text in (reference, found))
    equal = bool(expected and given) and bool(verify(expected, given, timeout_seconds=None))
    return decided(equal, "by math-verify: {} and {}", found, reference)


def _parsed(text: str) -> list:
    """What math-verify reads in a text: the expression, and how it was written."""
    import math_verify

    for library in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # The process that calls has a limit of its own.
    return math_verify.parse(text, parsing_timeout=None)  # type: ignore[arg-type]


def _bare(text: str) -> str:
    return "".join(written(text).split())
