r"""Natural rewritings of a reference: how people and models write the same answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

_INTEGER = re.compile(r"-?\d{1,3}(,?\d{3})*|-?\d+")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")


def rewritings(reference: str) -> Iterator[tuple[str, str]]:
    """Name and text of each rewriting that makes sense for `reference`, as the response that holds it."""
    bare = reference.strip()
    inner = bare.replace("$", "") if bare.startswith("$") else bare
    yield "itself", rf"Thus \boxed{{{reference}}}"
    yield "full stop", rf"Thus \boxed{{{bare}.}}."
    yield "fbox", rf"Thus \fbox{{{bare}}}"
    yield "dollars", rf"Thus \boxed{{${inner}$}}"
    yield "thin space", rf"Thus \boxed{{{bare}\,}}"
    yield "display style", rf"Thus \boxed{{\displaystyle {inner}}}"
    yield "label", rf"Thus \boxed{{\text{{Answer: }}{inner}}}"
    yield "sentence", f"The answer is ${inner}$."
    yield "after thinking", rf"<think>Perhaps \boxed{{-98765}}.</think>\boxed{{{bare}}}"
    if r"\frac" in bare:
        yield "dfrac", rf"\boxed{{{bare.replace(chr(92) + 'frac', chr(92) + 'dfrac')}}}"
    if "(" in bare and r"\left" not in bare and r"\big" not in bare:
        yield (
            "left right",
            rf"\boxed{{{bare.replace('(', chr(92) + 'left(').replace(')', chr(92) + 'right)')}}}".replace(
                r"\right)}", r"\right)}"
            ),
        )
    if ", " in bare and r"\text" not in bare:
        yield "no blanks", rf"\boxed{{{bare.replace(', ', ',')}}}"
    yield from _of_numbers(bare)


def _of_numbers(bare: str) -> Iterator[tuple[str, str]]:
    if not _NUMBER.fullmatch(bare.replace(",", "")) or not (_NUMBER.fullmatch(bare) or _INTEGER.fullmatch(bare)):
        return
    plain = bare.replace(",", "")
    yield "unit", rf"\boxed{{{plain}\text{{ units}}}}"
    yield "words behind", rf"\boxed{{{plain} apples}}"
    yield "dollar sign", rf"\boxed{{\${plain}}}"
    yield "assignment", rf"\boxed{{x = {plain}}}"
    yield "full width", rf"\boxed{{{plain.translate(_FULL_WIDTH)}}}"
    yield "minus sign", rf"\boxed{{{plain.replace('-', '−')}}}"
    mantissa, exponent = f"{float(plain):.15e}".split("e")
    if float(plain) != 0 and float(f"{float(plain):.15e}") == float(plain) and len(plain) < 15:
        short = mantissa.rstrip("0").rstrip(".")
        yield "e-notation", rf"\boxed{{{short}e{int(exponent)}}}"
        yield "power of ten", rf"\boxed{{{short} \times 10^{{{int(exponent)}}}}}"
    if _INTEGER.fullmatch(bare):
        number = int(plain)
        yield "point zero", rf"\boxed{{{plain}.0}}"
        yield "plain sentence", f"So the total is {plain}."
        yield "hashes", f"#### {bare}"
        if abs(number) >= 1000:
            for name, separator in (("commas", ","), ("braced commas", "{,}"), ("thin spaces", r"\,")):
                yield name, rf"\boxed{{{number:,}}}".replace(",", separator)
