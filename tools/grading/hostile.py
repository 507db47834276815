r"""Answers that models write when they go astray, and that parsers do not survive."""

from __future__ import annotations

import random
from collections.abc import Callable

LONG = 100_000
_WORDS = (
    r"\frac \sqrt \boxed \fbox \text \left( \right) \left[ \right] \{ \} { } ( ) [ ] | ^ _ + - * / = < > , ; : . "
    r"! ' $ % & \\ \cdot \times \pm \mp \in \cup \cap \setminus \infty \pi \theta \sin \log \ln \lim \sum \int "
    r"\prod \binom \gcd "
    r"\det \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} \leq \geq \neq \approx \mathbb{R} \overline \vec "
    r"\angle ^\circ \% \$ 0 1 2 9 10 42 3.14 1e9 .5 x y z n i e d dx E A B and or not ~ ½ ² √ π ４ − ∪ ° € "
    r"\frac{1}{2} apples <think> </think> answer is #### \operatorname{rank} \mod \partial \lfloor \rfloor "
    r"\displaystyle \mathrm{d} \prime"
)
_TOKENS = _WORDS.split()
_REPEATED = (
    "\\boxed{", "\\boxed{1}", "{", "}", "(", "\\frac{1}{", "\\sqrt{", "^{9", "9^{", "x^{", "42 or ", "1,", "1+",
    "answer is ", "$", "\\(",
    "\\[", "<think>", "</think>", "\\{", "[", "\\left(", "\\text{", "wait, ", "7", "\\", "\\\\", " ", "\n", "* ",
    "&", "=", "x=",
    "\\pm ", "\\cup ", "½", "．", "1 234 ", "The answer is 42. ", "\\boxed{\\frac{", "|", "!", "-", "\\begin{pmatrix}",
)  # fmt: skip


def _fuzz(rng: random.Random) -> str:
    tokens = rng.choices(_TOKENS, k=rng.randint(1, 60))
    return rng.choice(("", " ")).join(tokens)


def _mutated(rng: random.Random) -> str:
    text = list(rng.choice(_SEEDS))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(text) + 1)
        deed = rng.randrange(3)
        if deed == 0:
            text[place:place] = rng.choice(_TOKENS)
        elif deed == 1:
            del text[place : place + rng.randint(1, 3)]
        else:
            text[place:place] = text[max(0, place - rng.randint(1, 12)) : place]
    return "".join(text)


def _loop(rng: random.Random) -> str:
    piece = rng.choice(_REPEATED)
    text = piece * (rng.choice((2000, LONG)) // len(piece))
    return rng.choice((text, f"\\boxed{{{text}}}", f"\\boxed{{{text}", f"{text} 42}}", f"The answer is {text}"))


def _tower(rng: random.Random) -> str:
    depth, base = rng.randint(2, 9), rng.choice(("9", "10", "x", "e", "2", "(-3)", "0.5", "i", "n", "\\pi"))
    tower = f"{base}^{{" * depth + rng.choice(("9", "x", "-1", "99999", "\\frac{1}{3}")) + "}" * depth
    wrap = rng.choice(
        (
            "{}",
            "{}!",
            "\\sqrt{{{}}}",
            "\\frac{{1}}{{{}}}",
            "\\log({})",
            "\\sin({})",
            "{}+1",
            "\\binom{{{}}}{{7}}",
            "({})!",
        )
    )
    return wrap.format(tower)


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice((
        ("\\frac{1}{1+", "}"), ("\\boxed{", "}"), ("(", ")"), ("{", "}"), ("\\{", "\\}"), ("[", "]"), ("|", "|"),
        ("\\left|", "\\right|"), ("\\sqrt{", "}"), ("\\sin(", ")"), ("f(", ")"), ("x_{", "}"), ("\\text{", "}"),
        ("\\begin{pmatrix}", "\\end{pmatrix}"), ("(1,", ")"), ("\\frac{", "}{2}"), ("-(", ")"),
        ("\\lfloor ", "\\rfloor "),
        ("\\left(x+", "\\right)^2"), ("\\overline{", "}"), ("\\binom{", "}{2}"), ("\\max(1,", ")"),
    ))  # fmt: skip
    depth = rng.choice((2, 4, 6, 8, 12, 20, 40, 200, 2000))
    return opening * depth + rng.choice(("1", "x", "")) + closing * depth


def _large(rng: random.Random) -> str:
    return rng.choice(_LARGE)


_LARGE = (
    "99999999!", "10^{9}!", "((9!)!)!", "\\binom{1000000000}{500000000}", "\\sum_{i=1}^{10^{9}} i^{i}",
    "\\prod_{k=1}^{10^9} k",
    "\\int_0^1 x^{x^{x}} dx", "\\lim_{x \\to 0} \\frac{\\sin x}{x^{9}}", "1e999999999", "1e-999999999",
    "9" * 5000, "0." + "3" * 5000,
    "10^{10^{10}}", "2^{2^{2^{2^{2^2}}}}", "\\gcd(10^{400}, 10^{401})", "\\gcd(9999999999999999, 3)",
    "\\det\\begin{pmatrix}x&y\\\\z&w\\end{pmatrix}",
    "(x+1)^{100000}", "(x+y+z)^{99}(x-y)^{98}", "\\sqrt[999]{999}", "x^{1000}+x^{999}+1>0", "\\sin(10^{10000})",
    "\\tan(\\frac{\\pi}{2})",
    "\\frac{1}{0}", "0^0", "\\infty-\\infty", "\\Gamma(99999999)", "\\log(0)",
    "\\cos(\\cos(\\cos(\\cos(10^{99}))))", "1" + ",000" * 400,
    "+".join(f"\\sqrt{{{n}}}" for n in range(2, 40)), "\\cup".join(f"({n},{n + 1})" for n in range(80)),
    ",".join(map(str, range(300))),
    ",".join(f"x^{{{n}}}" for n in range(18)), "=".join(["x"] * 60), "\\{" + ",".join(map(str, range(60))) + "\\}",
    "\\begin{pmatrix}" + "\\\\".join(["&".join(["x^2"] * 12)] * 12) + "\\end{pmatrix}",
    "\\pm".join(["1"] * 40), "x<" * 60 + "1",
    "\\operatorname{eigenvals}\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\frac{d}{dx}(x^{x^{x}})",
    "e^{e^{e^{e^{9}}}}", "\\exp(\\exp(\\exp(99)))",
)  # fmt: skip
_SEEDS = (
    r"\frac{1}{2}", r"(-\infty,3)\cup(3,\infty)", r"\{1,2,3\}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    "x^2+2x+1=0", "10\\text{ cm}",
    r"\left(\frac{1}{2},3\right]", r"4.5\times10^{33}", r"\$1,\!657", r"1\pm\sqrt{2}", r"x\in[1,2]", r"60^\circ",
    "The answer is 42.",
    r"\frac{e^{at}-e^{-at}}{2a}", r"k\left(4 k^{2}+k-1\right) / 2", r"\lfloor\frac{2 n-1}{5}\rfloor", "10001_2",
    r"\text{Evelyn}",
)  # fmt: skip
#: References of every kind, so that every comparison is met.
REFERENCES = (
    "42", "0.5", r"\frac{1}{2}", r"(1,2)", r"\{1,2\}", "1,2,3", r"(-\infty,3)\cup(3,\infty)", "x^2+1=x^2",
    "12x-4y+3z-169=0", r"x>5",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\frac{n(n+1)}{2}", "4.5e33", r"\sqrt{2}+\sqrt{3}", r"e^{x}-e^{-x}",
    "f(x)=2x", "B",
    r"\text{Evelyn}", r"10\text{ cm}", r"1+i\sqrt{3}", r"[0,\infty)", r"2^{4950}", "x^{x}",
)  # fmt: skip

FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "fuzz": _fuzz, "mutated": _mutated, "tower": _tower, "nested": _nested, "large": _large, "loop": _loop,
}  # fmt: skip
#: Shares of the families.
_WEIGHTS = {"fuzz": 35, "mutated": 25, "tower": 12, "nested": 15, "large": 8, "loop": 5}


def hostile_answers(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """`count` answers: family, response, reference."""
    rng = random.Random(seed)
    families = rng.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()), k=count)
    found = []
    for family in families:
        text = FAMILIES[family](rng)
        if family != "loop" and rng.random() < 0.85:
            text = f"\\boxed{{{text}}}"
        found.append((family, text, rng.choice(REFERENCES)))
    return found
