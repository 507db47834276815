r"""One writing for the many of an answer: Unicode, synonyms of LaTeX, punctuation, labels, separators of thousands.

What comes out is LaTeX that math-verify's parser reads, and in which `megarl.rewards.structure` finds the parts.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

#: Characters of a value that are still parsed; braces and brackets nested in it. Our choices: no reference of the usual
#: benchmarks comes near them, and beyond them parsing takes seconds.
LONGEST_VALUE, DEEPEST_VALUE = 400, 8

#: Characters whose compatibility form (NFKC) is not what they mean, and their LaTeX.
_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    **dict.fromkeys("∗＊", "*"),
    **dict.fromkeys("×✕✖", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("。．｡", "."),
    **dict.fromkeys("、،", ","),
    **dict.fromkeys("≤⩽≦", r"\leq "),
    **dict.fromkeys("≥⩾≧", r"\geq "),
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("∅⌀Ø", r"\emptyset "),
    **dict.fromkeys("“”„«»", ""),
    **dict.fromkeys("′’‘", "'"),
    **dict.fromkeys("⟨〈", "("),
    **dict.fromkeys("⟩〉", ")"),
    **dict.fromkeys("∆△", r"\triangle "),
    "″": "''",
    "⅟": "1/",
    "℃": r"^\circ C",
    "℉": r"^\circ F",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∈": r"\in ",
    "∠": r"\angle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "∂": r"\partial ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "ℏ": r"\hbar ",
    "π": r"\pi ",
    "‰": r"\times 10^{-3}",
}
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
#: A root reaches as far as the number, the letter or the brackets that follow it.
_ROOT = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|[^\W\d_])|\(([^()]*)\))?")
_SCRIPTS = {"<super>": "^", "<sub>": "_"}

#: What is only layout, and what it becomes.
_LAYOUT = [
    (r"\\(?:left|right|middle)(?![a-zA-Z])\s*\.", ""),
    (r"\\(?:left|right|middle|displaystyle|textstyle|scriptstyle|limits|nolimits|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|"
     r"Biggl?|Biggr?|rm|bf|it|hfill|noindent|centering|large|Large|huge|Huge|normalsize|ensuremath|m)(?![a-zA-Z])", ""),
    (r"\\(?:hspace|vspace|tag|label|kern|mspace|hphantom|vphantom|phantom)\*?\s*\{[^{}]*\}", ""),
    (r"\\phantom\s*(?=[-+\d])[-+\d]?", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\(?:dfrac|tfrac|cfrac|nicefrac|sfrac)(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom"),
    (r"\\(?:text(?:rm|bf|it|sf|tt|normal|up)|mbox|hbox|mathrm|operatorname\*?|mathsf|mathtt|textsc|emph|unit|si)"
     r"(?=\s*\{)", r"\\text"),
    (r"\\(?:mathbf|mathit|mathnormal|boldsymbol|bm|pmb|underline|mathord|mathop|boxed|fbox|framebox|mathstrut)\s*\{",
     "{"),
    (r"\\(?:geqslant|geqq|ge)(?![a-zA-Z])", r"\\geq "),
    (r"\\(?:leqslant|leqq|le)(?![a-zA-Z])", r"\\leq "),
    (r"\\(?:ne)(?![a-zA-Z])", r"\\neq "),
    (r"\\(?:gt)(?![a-zA-Z])", ">"),
    (r"\\(?:lt)(?![a-zA-Z])", "<"),
    (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
    (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:lbrack)(?![a-zA-Z])", "["),
    (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
    (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
    (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
    (r"\\(?:lor|vee)(?![a-zA-Z])", ","),
    (r"\\(?:colon)(?![a-zA-Z])", ":"),
    (r"\\(?:simeq|sim|thickapprox|doteq)(?![a-zA-Z])", r"\\approx "),
    (r"\\(?:backslash)(?![a-zA-Z])", r"\\setminus "),
    (r"\\(?:degree|textdegree)(?![a-zA-Z])|\\(?:text\{\s*(?:°|o)\s*\})", r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\\(?:euro|texteuro)(?![a-zA-Z])", "€"),
    (r"\\(?:pounds|textsterling)(?![a-zA-Z])", "£"),
    (r"\\(?:textdollar)(?![a-zA-Z])", r"\\$"),
    (r"\\begin\{[bvV]?matrix\}|\\begin\{(?:small)?matrix\}|\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{[bvV]?matrix\}|\\end\{(?:small)?matrix\}|\\end\{array\}", r"\\end{pmatrix}"),
    (r"[(\[]\s*(\\begin\{pmatrix\})", r"\1"),
    (r"(\\end\{pmatrix\})\s*[)\]]", r"\1"),
    (r"\\\$\s*\\!|\\!", ""),
]  # fmt: skip
_LAYOUT_STEPS = [(re.compile(pattern), replacement) for pattern, replacement in _LAYOUT]

#: Three digits more, after a separator that can be nothing else than one of thousands; after a comma or blank it may.
_SURE_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:\{,\}|,\\!|\\[,!;:> ]|~|[\u00a0\u2009\u202f'])\d{3})+)(?!\d)")
_BLANK_THOUSANDS = re.compile(r"(?<![\d.])(?<![\d.,] )(\d{1,3})((?: \d{3})+)(?! ?\d| ?/| ?\\frac)")
_NOT_DIGIT = re.compile(r"[^\d]+")

_SUBSCRIPT = re.compile(r"_\s*([a-zA-Z0-9])(?![a-zA-Z0-9])")
_DOUBLE_BRACES = re.compile(r"(?<!\\)\{\s*\{([^{}\\]*)\}\s*\}")
_SPACES = re.compile(
    r"\\(?:quad|qquad|thinspace|enspace|enskip|space|nobreakspace|newline)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~|\s+"
)
_E_NOTATION = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])")
#: What calculators and plain text write: 5x10^3, sqrt(2), pi.
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_UNSLASHED = re.compile(
    r"(?<![\\a-zA-Z{])(sqrt|pi|infty|infinity|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|theta|alpha|beta|gamma)"
    r"(?![a-zA-Z])"
)
_SQUARE_ROOT = re.compile(r"(\\sqrt(?:\s*\[[^\[\]]*\])?)\s*(?:(\d|[a-zA-Z])|\(([^()]*)\))")
_RAISED_UNIT = re.compile(r"\\text\s*\{([^{}]*)\^\s*\{\s*(-?\d+)\s*\}([^{}]*)\}")
_CALCULATOR = re.compile(r"(?:\*\*|\^)\s*(\(\s*)?(-?\d+)(?(1)\s*\))(?![\d.{])")
_PERCENT = re.compile(
    r"\\text\s*\{\s*(?:\\?%|percentage|percent|pct|per\s+cent)(?:\s+points?)?\.?\s*\}|\\?%|"
    r"\b(?:percentage|percent|pct|per\s+cent)\b(?:\s+points?)?",
    re.IGNORECASE,
)
#: `5 million`, `5\\text{million dollars}`.
_MAGNITUDE = re.compile(
    r"(?<=[\d}])\s*(?P<open>\\text\{)?\s*(?P<name>dozen|hundred|thousand|million|billion|trillion)\b\s*"
    r"(?P<close>(?(open)\}|))?",
    re.IGNORECASE,
)
_MAGNITUDES = {
    "dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
    "trillion": "10^{12}",
}  # fmt: skip
_WORDS = re.compile(r"\\text\s*\{([^{}]*)\}")
_JOINED = re.compile(r"\s*(?:,\s*)?(?:\\text\{(?:and|or)\}|(?<=\s|,)(?:and|or)(?=\s))\s*")
_LABEL = re.compile(
    r"\s*(?:(?:so|thus|therefore|hence|and)\s*,?\s+)?(?:the\s+)?(?:(?:final|correct|required|right)\s+)?"
    r"(?:answer|ans|result|solution|total|option|choice)\b\.?\s*(?:is|are|=|:)*\s*:?\s*",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"\s*(?:approximately|approx\.?|about|around|roughly|exactly|precisely|nearly|almost|equals?|is)\s+|"
    r"\s*\\text\s*\{\s*(?:approximately|approx\.?|about|around|roughly|exactly|precisely)\s*\}\s*",
    re.IGNORECASE,
)
#: `(B) 42`, `B. 42`, `\text{(B)} 42`.
_CHOICE = re.compile(r"(?:\(\s*([A-J])\s*\)\s+|([A-J])\s*[).:]\s+|\\text\{\(?([A-J])(?:\)|[.:])\}\s*)(?=[^\s,;])")
_LETTER = re.compile(r"(?:\\text\{|\()*(?:(?:option|choice|answer)\s+)?\(?([A-J])[).:]*\}?\)?", re.IGNORECASE)
_ENDING = ' \t\r\n.,;:*_"`'


@lru_cache(maxsize=4096)
def written(content: str) -> str:
    r"""The answer or reference `content` in the one writing; "" where nothing is left.

    >>> written(r"$\dfrac{1}{2}$.")
    '\\frac{1}{2}'
    >>> written("1\\,234\\,567 €")
    '1234567 €'
    """
    text = _ended(_undelimited(_ascii(content)))
    text = _SURE_THOUSANDS.sub(_digits, text)
    for pattern, replacement in _LAYOUT_STEPS:
        text = pattern.sub(replacement, text)
    text = _SUBSCRIPT.sub(r"_{\1}", text)
    for _ in range(4):
        text = _DOUBLE_BRACES.sub(r"{\1}", text)
    text = _BLANK_THOUSANDS.sub(_digits, _SPACES.sub(" ", text))
    text = _E_NOTATION.sub(r"\1\\times 10^{\2}", text)
    text = _TIMES.sub(r"\\times ", _UNSLASHED.sub(r"\\\1", text))
    text = _SQUARE_ROOT.sub(lambda match: f"{match[1]}{{{match[2] or match[3]}}}", text)
    text = _CALCULATOR.sub(r"^{\2}", text)
    text = _PERCENT.sub(r"\\%", text).replace("*", r"\cdot " if re.search(r"\w\s*\*\s*\w", text) else "")
    text = _RAISED_UNIT.sub(r"\\text{\1^\2\3}", text)
    text = _MAGNITUDE.sub(_multiplied, _WORDS.sub(_spoken, text))
    text = _JOINED.sub(", ", text)
    return _ended(_unlabelled(_ended(text)))


def choice(text: str) -> str | None:
    """The letter of a multiple choice that the written `text` is or begins with, else None."""
    match = _LETTER.fullmatch(text) or _CHOICE.match(text)
    return next(letter for letter in match.groups() if letter).upper() if match else None


def without_choice(text: str) -> str:
    """The written `text` without the letter of a multiple choice before it."""
    return _CHOICE.sub("", text, count=1) if _CHOICE.match(text) else text


def _undelimited(text: str) -> str:
    r"""`text` without what delimits mathematics; `\$` is money and stays."""
    text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"(?<!\\)\\[()\[\]]", " ", text)


def _spoken(match: re.Match[str]) -> str:
    r"""What `\text{...}` holds: mathematics where there is a digit in it, else words."""
    words = " ".join(match[1].split()).strip(_ENDING)
    if any(char.isdigit() for char in words):
        return f" {words} "
    return rf"\text{{{words}}}" if words else " "


def _multiplied(match: re.Match[str]) -> str:
    rest = r" \text{" if match["open"] and not match["close"] else " "
    return rf"\times {_MAGNITUDES[match['name'].lower()]}{rest}"


def _unlabelled(text: str) -> str:
    """`text` without `Answer:` and `approximately` before it."""
    for _ in range(3):
        spoken = re.match(r"\\text\{([^{}]*)\}\s*(?=\S)", text)
        if spoken and _LABEL.fullmatch(spoken[1]):
            text = text[spoken.end() :].lstrip(" =:")
        for pattern in (_LABEL, _ABOUT):
            match = pattern.match(text)
            if match and match.end() < len(text):
                text = text[match.end() :]
        text = re.sub(r"^\s*\\approx\s*", "", text)
    return text


def _ended(text: str) -> str:
    """`text` without blanks and punctuation at its ends; a point before a digit belongs to it."""
    text = text.lstrip(_ENDING.replace(".", "") + "=").rstrip(_ENDING)
    while text.endswith("\\"):
        text = text[:-1].rstrip(_ENDING)
    return text


def _digits(match: re.Match[str]) -> str:
    return match[1] + _NOT_DIGIT.sub("", match[2])


def _ascii(text: str) -> str:
    """`text` with LaTeX or ASCII for the characters beyond ASCII that mean something in mathematics."""
    if text.isascii():
        return text
    text = _ROOT.sub(
        lambda match: f"{_ROOTS[match[1]]}{{{match[2] or match[3]}}}" if match[2] or match[3] else _ROOTS[match[1]],
        text,
    )
    joined = "".join(char if char.isascii() else _character(char) for char in text)
    # Neighbouring exponents are one: x¹² is x^{1}^{2} so far.
    return re.sub(r"([\^_])(\{[^{}]*\}(?:\1\{[^{}]*\})+)", _one_script, joined)


def _one_script(match: re.Match[str]) -> str:
    inner = re.sub(r"[{}]|[\^_](?=\{)", "", match[2])
    return f"{match[1]}{{{inner}}}"


def _character(char: str) -> str:
    """LaTeX or ASCII for one character."""
    if char in _CHARACTERS:
        return _CHARACTERS[char]
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    kind = unicodedata.decomposition(char).partition(" ")[0]
    plain = unicodedata.normalize("NFKC", char)
    if kind in _SCRIPTS:
        return f"{_SCRIPTS[kind]}{{{plain.replace('−', '-')}}}"
    if kind == "<fraction>" and "⁄" in plain:
        upper, lower = plain.split("⁄")
        return rf"\frac{{{upper}}}{{{lower}}}"
    name = unicodedata.name(char, "")
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name)
    if greek:
        letter = greek[2].lower().replace("lamda", "lambda")
        return "\\" + (letter if greek[1] == "SMALL" else letter.capitalize()) + " "
    return plain


def is_long(text: str) -> bool:
    """Whether a value has more characters, or more brackets in each other, than math-verify's parser is asked about."""
    if len(text) > LONGEST_VALUE:
        return True
    depth = 0
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if depth > DEEPEST_VALUE:
            return True
    return False
