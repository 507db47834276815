"""The rules of kind math, without processes: what equals a reference, and what does not."""

import pytest

from megarl.rewards.comparison import answers_equal
from megarl.rewards.math import boxed_equals, math_equals

#: By kind: the answer in the box, the reference.
RIGHT = {
    "equal forms": [
        ("42.0", "42"), (r"\frac{1}{2}", "0.5"), ("x^2+2x+1", "(x+1)^2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), (r"2\cdot 3^{5}", "486"), ("2^{10}", "1024"),
        (r"\binom{10}{3}", "120"),
        (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"), ("(2+i)^2", "3+4i"), (r"1-\cos^2 x", r"\sin^2 x"),
        ("4^{2475}", "2^{4950}"),
        (r"\frac{n^2+n}{2}", r"\frac{n(n+1)}{2}"), ("2f(x)+1", "f(x)+f(x)+1"),
        ("10000000000000000000001", "10^{22}+1"), (r"\tan 45^\circ", "1"), (r"\sin(30^{\circ})", "0.5"),
    ],
    "decimals": [
        ("0.333333", r"\frac13"), ("1.41421", r"\sqrt2"), ("3.14159", r"\pi"), ("0.30000000000000004", "0.3"),
        (".5", "0.5"),
        ("0.50", "1/2"), (r"6.0221408\times10^{23}", r"6.02214076\times10^{23}"),
        (r"6.6260701\times10^{-34}", "6.62607015e-34"),
        (r"0.333333x", r"\frac{x}{3}"), ("1.0", "1"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", r"\frac13"), (r"-1.1\overline{6}", "-7/6"), (r"0.\dot{3}", "1/3"), ("0.1(6)", "1/6"),
        ("0.166667", r"0.1\overline{6}"), (r"0.\overline{9}", "1"),
    ],
    "words of number": [
        ("5 million", "5000000"), (r"\$2.5\text{ million}", "2500000"), (r"1.2\text{ billion dollars}", "1.2e9"),
        ("2 dozen", "24"), (r"\frac12\text{ million}", "500000"), ("3 thousand people", r"3\text{ thousand}"),
    ],
    "powers of ten": [
        (r"4.5\times10^{33}", "4.5e33"), ("1e-5", "10^{-5}"), ("1.5e3", "1500"), ("5E-3", "0.005"),
        ("5*10^-3", "0.005"),
        ("5x10^{-3}", "0.005"), ("5·10⁻³", "0.005"), ("1200", "1.2e3"), (r"5 \cdot 10^{-3}", "5e-3"),
        ("2**10", "1024"),
    ],
    "punctuation": [
        ("204.", "204"), ("17", "{17}."), ("30", r"30^\circ."), ("7", r"7\text{ hours}."), ("42;", "42"),
        ("3.14...", "3.14"),
        ("1.", "1"), ("**42**", "42"), ('"42"', "42"), ("42\\\\", "42"), (r"42\text{.}", "42"),
        (r"x = 3 \quad", "3"), ("{42}", "42"),
    ],
    "unicode": [
        ("４２", "42"), ("½", "0.5"), ("3½", "3.5"), ("⅓", r"\frac13"), ("⅟8", "1/8"), ("1⁄2", "0.5"), ("𝟒𝟐", "42"),
        ("٤٢", "42"),
        ("१२", "12"), ("①", "1"), ("−5", "-5"), ("−½", "-0.5"), ("10⁻³", "0.001"), ("x²+1", "x^2+1"),
        ("x₁+1", "x_1+1"), ("2√3", r"2\sqrt{3}"),
        ("√12/2", r"\sqrt{3}"), ("∛8", "2"), ("π/2", r"\frac{\pi}{2}"), ("∅", r"\emptyset"), ("∞", r"\infty"),
        ("(−∞, 3]", r"(-\infty,3]"),
        ("[0,1)∪(2,3]", r"[0,1)\cup(2,3]"), ("x ≥ 2", r"x \ge 2"), ("1，000", "1000"), ("±2", r"\pm 2"),
        ("５．５", "5.5"),
    ],
    "layout": [
        ("$42$", "42"), (r"\(42\)", "42"), (r"\mathbf{42}", "42"), (r"\varnothing", r"\emptyset"),
        (r"\displaystyle\dfrac{1}{2}", r"\frac12"),
        (r"\text{Answer: }42", "42"), (r"\text{The answer is } 42", "42"), (r"\textcolor{red}{42}", "42"),
        (r"\langle 1,2\rangle", "(1,2)"),
        (r"\boxed{42}", "42"), ("sqrt(2)", r"\sqrt{2}"), ("pi", r"\pi"), (r"\left\{1,2\right\}", r"\{1,2\}"),
        (r"\{ 1, 2 \}", r"\{1,2\}"),
    ],
    "thousands": [
        ("1,000", "1000"), (r"1\,234\,567", "1234567"), ("1 234 567", "1234567"), ("1{,}008{,}016", "1008016"),
        (r"\frac{2469}{20,000}", r"\dfrac{2469}{20,\!000}"),
        ("1'234", "1234"), ("2,125", "2125"), ("(1,000, 2,000)", "(1000,2000)"),
    ],
    "units": [
        ("60°", "60"), (r"60^\circ", "60"), ("42 apples", "42"), (r"\text{42 apples}", "42"),
        ("42 miles per hour", "42"), ("5 m", "5"),
        ("5cm", "5"), ("60 km/h", "60"), (r"9.8\,\mathrm{m/s^2}", "9.8"), (r"9.8 \text{ m/s}^2", "9.8"),
        ("25°C", "25"), ("12 cm^2", r"12\text{ cm}^2"),
        ("12 square centimeters", r"12\text{ cm}^2"), ("15000", r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}"),
        ("4:51:06 pm", r"4\!:\!51\!:\!06 \text{ p.m.}"),
        (r"\frac{1}{2}\text{ of the cake}", "1/2"), ("12 feet", r"12\text{ ft}"),
    ],
    "money": [
        ("€18", "18"), (r"\$18", "18"), (r"18\$", "18"), ("£3.50", "3.5"), ("Rs. 50", "50"), ("18 USD", "18"),
        ("18 dollars", r"\$18"), ("¥1,000", "1000"),
        ("1657", r"\$1,\!657"), (r"\frac23", r"\$\dfrac23 \approx \$0.67"),
    ],
    "percent": [
        ("50%", "0.5"), ("50%", "50"), (r"12.5\%", "0.125"), ("12.5 percent", "12.5"), ("17.5", "17.5%"),
        ("56%", r"0.56 = 56\%"), ("0.125", r"12.5\%"),
    ],
    "mixed numbers": [("3 1/2", "3.5"), (r"3\frac{1}{2}", "3.5"), (r"-2\frac{1}{3}", "-7/3"), ("2⅔",
    r"\frac83"), (r"3+\frac12", "3.5")],
    "bases": [("10001_2", "10001_{2}"), ("1061", "1061_{9}")],
    "lists and sets": [
        (r"\{2,1\}", "1,2"), ("1,2", "(1,2)"), ("1;2", "1,2"), ("(3,4), (1,2)", "(1,2),(3,4)"),
        ("(1,2) and (3,4)", "(1,2),(3,4)"), ("D, E", "E, D"),
        (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), ("2, -2", r"\pm 2"), ("x=1 or x=2", "1,2"),
        (r"x_1=1,\ x_2=2", "1,2"), (r"\{5\}", "5"),
        (r"x = -12 \text{ or } x=-30", r"-12 \text{ or } -30"), ("6, 8, 10", r"6, 8\text{, and }10"),
        (r"S=\{1,2\}", r"\{1,2\}"), (r"\{\}", r"\emptyset"),
    ],
    "intervals": [
        ("x>5", r"(5,\infty)"), (r"(5,\infty)", "x>5"), ("5<x", "x>5"), ("1<x<2", "(1,2)"),
        (r"x\in[1,2]", "[1,2]"), ("[-80,82]", r"-80\leq g(x)\leq 82"),
        ("x<2 or x>3", r"(-\infty,2)\cup(3,\infty)"), (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3"),
        (r"x\in(2,3)", "2<x<3"), ("2<x<3", r"x \in (2,3)"),
        (r"(-\infty,3)\cup(3,\infty)", r"\mathbb{R}\setminus\{3\}"), (r"(2,3]\cup[0,1)", r"[0,1)\cup(2,3]"),
    ],
    "matrices": [
        (r"\begin{bmatrix}1/2\\ 2\end{bmatrix}", r"\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}"),
        (r"x=\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ],
    "equations": [
        ("x=5", "5"), ("5", "x=5"), ("2x=10", "x=5"), ("y=3+2x", "y = 2x + 3"), ("x^2+1=x^2", "x^2+1=x^2"),
        ("2+2=4", "4"), (r"x \approx 3.14", "3.14"),
        (r"\frac{dy}{dx}=2x", "2x"), ("P(A)=0.5", "0.5"), (r"m\angle ABC = 30", r"30^\circ"), ("f(x)=2x", "2x"),
        ("(x,y)=(1,2)", "(1,2)"), ("z=5-2x", "2x + z - 5 = 0"),
        (r"f^{-1}(x) = \frac{x}{2}", r"\frac{x}{2}"), ("x = 4/2 = 2", "2"), ("AB=9, CD=4", "AB=9, CD=4"),
        (r"\sin\theta=\frac12", r"\frac12"),
    ],
    "letters and words": [
        ("A", r"(\text{A})"), (r"\textbf{(B)}\ 42", "B"), (r"\textbf{(B)}\ 42", "42"), ("(B)", "B"), ("b", "B"),
        ("Option C", "C"), ("C) 5", "C"),
        ("evelyn", r"\text{Evelyn}"), ("No", "no"), ("No Solution", "no solution"),
        (r"\text{Yes}", "yes"), ("CD", r"\text{CD}"), ("E_1, E_2", "E_{1},E_{2}"),
    ],
}  # fmt: skip
WRONG = {
    "numbers": [
        ("43", "42"), ("-42", "42"), ("42!", "42"), ("", "42"), (r"\frac{}", "42"), ("10^{20}+1", "10^{20}"),
        ("1000000007", "1000000008"),
        ("2^{4950}+1", "2^{4950}"), ("1/0", r"\infty"), ("12", "1,2"), ("5 6", "56"), ("5-6", "5"),
        ("10,00", "1000"), ("x", "0"), ("-", "0"), (",", "0"),
        (r"\infty", r"-\infty"), ("e", "2"), ("i", "1"), ("2i", "2"),
    ],
    "decimals": [
        (r"9.1\times10^{-31}", r"1.6\times10^{-19}"), ("0.0000001", r"1.6\times10^{-19}"), ("0.0000001", "0"),
        ("0", "1e-10"), ("1e-400", "0"),
        ("6.62e-34", "6.63e-34"), ("0.33", r"\frac13"), ("3.1416", r"\pi"), ("306956.62", r"\$306,\!956.63"),
        ("299792458.0", "299792459"), ("1234567.5", "1234568"),
        (r"1.6\times10^{-19}x", r"9.1\times10^{-31}x"), ("11e", "1e11"), ("10⁻³", "1000"),
    ],
    "units": [
        (r"10\text{ cm}", r"10\text{ inches}"), ("60 min", "60 h"), ("5 cm^2", "5 cm^3"), ("25°C", "25°F"),
        ("8:34 a.m.", r"8\!:\!34 \text{ p.m.}"), ("€18", r"\$18"),
        ("6", "6m"), (r"\frac{1}{m}", r"\frac{1}{m}t"), ("5x", "5"), ("5 x", "5"), ("5 apples minus 2", "5"),
        ("50%", "5"), ("5 kJ", "5 J"), ("5 N", "5 J"), ("5 MHz", "5 Hz"), ("5 K", "5°C"), ("5 half", "5"),
        ("5 below zero", "5"), ("5 m/s^2", "5 m/s"), (r"5\text{ ms}", "5 s"), ("5 kWh", "5 kW"),
        ("5 squared", "5"), (r"\sin 30", "0.5"), (r"\sin 30", r"\sin 30^\circ"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", "0.3"), (r"0.\overline{3}", "3"), (r"1.\overline{3}", "13"), ("0.(3)", "0"),
        (r"0.1\overline{6}", r"0.\overline{16}"),
    ],
    "words of number": [
        ("5 million", "5"), ("5 thousand", "5"), ("2 dozen", "2"), ("5 million", r"5\text{ billion}"),
        ("5", r"5\text{ million}"),
    ],
    "capitals": [
        ("R-r", "r-R"), (r"2\pi(R^2-r^2)", r"\pi(R^2-r^2)"), ("A+a", "2a"), ("2R", "2r"),
        ("PV=nRT", "PV=NRT"), ("nRT", "NRT"), (r"\Delta-\delta", "0"),
    ],
    "hedges and negations": [
        ("42 or 41", "42"), ("42?", "42"), (r"\text{not }42", "42"), (r"\neq 42", "42"), (">42", "42"),
        ("at least 42", "42"), ("about 42 or 43", "42"), ("42 is wrong", "42"),
        ("1,2", "1"), ("1", "1,2"), ("3", "3,3"), ("1,2,3", "1,2"), (r"\pm 2", "2"), ("2", r"\pm 2"),
        ("x=1 or x=2", "1"), ("x=5,y=6", "5"),
    ],
    "brackets": [
        (r"\{1,2\}", "(1,2)"), ("(1,2)", r"\{1,2\}"), ("[1,2]", "(1,2)"), ("(1,2]", "(1,2)"), ("(2,1)", "(1,2)"),
        ("(1,2),(3,4)", "(1,2)"), ("100,101", "(100,101)"),
        (r"x<2 or x\ge 3", r"(-\infty,2)\cup(3,\infty)"), (r"x\in[2,3)", "2<x<3"), ("(1,2),(3,4)", r"(1,2)\cup(3,4)"),
        ("x>=5", "x>5"), (r"[5,\infty)", "x>5"), ("1<x<2", "[1,2]"), ("x<5", "x>5"), ("x<5", "5"),
        (r"\mathbb{R}", r"\mathbb{Z}"), (r"\emptyset", "0"), ("{}", "0"),
        (r"(-\infty,3)\cup(3,\infty)", r"(-\infty,\infty)"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "equations": [
        ("5=6", "x^2+1=x^2"), ("1=1", "x=x"), ("0=0", "x^2=x^2"), ("x+y=1", "1"), ("xy=1", "1"), ("2x=4", "4"),
        ("x^2=4", "4"), ("5=6", "6"), ("0=1", "1"), ("42=41", "41"),
        ("x=6=5", "5"), ("x=1", "y=1"), ("5", "x=6"), ("y=2x+3", "y=2x+4"), (r"42 \neq 41", "42"),
        ("x+2=x", "x^2+1=x^2"), ("(x+1)^2=x^2+2x+3", "(x-1)^2=x^2-2x+5"),
    ],
    "letters and words": [
        ("C", "B"), ("E", "2.718281828"), ("A", "A, C"), ("(A) 5", "B"), ("yes", "no"), (r"\text{none}", "0"),
        ("LSQX", "LQSX"), ("10_2", "10_3"), ("n", "n!"), ("1_a", "1"),
        ("f'(x)", "f(x)"), ("f''", "f"), (r"y^{\prime}", "y"), ("C", "CD"),
    ],
}  # fmt: skip


def rows(table: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    return [pair for pairs in table.values() for pair in pairs]


@pytest.mark.parametrize("kind", RIGHT)
def test_an_answer_is_right_however_it_is_written(kind: str) -> None:
    assert [pair for pair in RIGHT[kind] if not math_equals(rf"So \boxed{{{pair[0]}}}.", pair[1])] == []


@pytest.mark.parametrize("kind", WRONG)
def test_what_says_something_else_is_wrong(kind: str) -> None:
    assert [pair for pair in WRONG[kind] if math_equals(rf"So \boxed{{{pair[0]}}}.", pair[1])] == []


def test_an_answer_equals_itself() -> None:
    references = {reference for _, reference in rows(RIGHT) + rows(WRONG)}
    assert [one for one in references if not answers_equal(one, f"$ {one} $.")] == []


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is 42.", "42", True),
        ("<think>it might be 42</think>The answer is 41.", "42", False),
        (r"<think>so \boxed{42}</think>The answer is 41.", "42", False),
        (r"<think>so \boxed{42}</think>The answer is 41.", "41", True),
        (r"\boxed{42} no wait \boxed{41}", "42", False),
        (r"\boxed{1} and \boxed{2}", "1,2", True),
        (r"\boxed{1} or \boxed{2}", "2", False),
        (r"\fbox{42}", "42", True),
        ("I do not know", "42", False),
        ("", "42", False),
    ],
)
def test_the_answer_is_found_and_compared(text: str, answer: str, right: bool) -> None:
    assert math_equals(text, answer) is right


def test_the_strict_rule_compares_text_only() -> None:
    assert boxed_equals(r"\boxed{ 42 }", "42\n")
    assert boxed_equals(r"\fbox{42}", "42")
    assert not boxed_equals(r"\boxed{42.0}", "42")
    assert not boxed_equals(r"\boxed{42} or \boxed{43}", "42")
    assert not boxed_equals(r"<think>\boxed{42}</think>\boxed{43}", "42")
    assert not boxed_equals(r"<think>\boxed{42}</think>The answer is 41.", "42")
    assert boxed_equals(r"<think>\boxed{42}</think>As above.", "42")
    assert not boxed_equals("The answer is 42", "42")


@pytest.mark.parametrize("tower", ["9^{9^{9^{9}}}", "0.5^{0.5^{99999}}", "100000!", "(x+1)^{100000}", "e^{e^{e^{99}}}"])
def test_numbers_that_nobody_can_compute_equal_themselves_only(tower: str) -> None:
    assert answers_equal(tower, tower.replace("^", " ^ "))
    assert not answers_equal(tower, f"{tower}+1")
    assert not answers_equal("42", tower)
