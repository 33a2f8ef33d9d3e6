"""What the language of objectives reads, and how it says no: where, what was wanted, and the way out."""

import re

import pytest

from sartor.discover.language.expression import MOST_NODES, LanguageError, constant, given
from sartor.discover.language.operators import apply
from sartor.discover.language.parse import DEEPEST, LONGEST, parse
from sartor.discover.language.printing import to_python

MARGIN, BETA = given("margin"), given("beta")
DPO = apply("neg", apply("log_sigmoid", apply("mul", BETA, MARGIN)))

READ = {
    "margin": "margin",
    "((margin))": "margin",
    "+margin": "margin",
    "--margin": "--margin",
    "-(-2)": "2",
    "-2 * margin": "(-2) * margin",
    "margin - -2": "margin - (-2)",
    "1_000 * margin": "1000 * margin",
    "0x10 * margin": "16 * margin",
    "1e-3 * margin": "0.001 * margin",
    "1 - margin - beta": "1 - margin - beta",
    "1 - (margin - beta)": "1 - (margin - beta)",
    "margin / beta / 2": "margin / beta / 2",
    "margin / (beta / 2)": "margin / (beta / 2)",
    "-margin ** 2": "-square(margin)",
    "(-margin) ** 2.0": "square(-margin)",
    "margin ** 3": "margin * square(margin)",
    "margin ** 0.5": "sqrt(margin)",
    "F.softplus(margin)": "softplus(margin)",
    "torch.nn.functional.logsigmoid(margin)": "log_sigmoid(margin)",
    "functional.relu(margin)": "relu(margin)",
    "torch.exp(torch.tanh(margin))": "exp(tanh(margin))",
    "np.maximum(pair.margin, math.sqrt(2))": "maximum(margin, sqrt(2))",
    "max(margin, 0) - min(margin, 0)": "maximum(margin, 0) - minimum(margin, 0)",
    "mean(margin) + torch.var(margin) - std(margin)": "batch_mean(margin) + batch_var(margin) - batch_std(margin)",
    "1 if margin > 0 else beta": "where(margin > 0, 1, beta)",
    "0 if margin < 0 else 1 if margin < 2 else 3": "where(margin < 0, 0, where(margin < 2, 1, 3))",
    "where(margin >= 0, 1, 2)": "where(margin >= 0, 1, 2)",
    "torch.where(pair.margin <= 0, 1, 2)": "where(margin <= 0, 1, 2)",
    "detach(margin) * log1mexp(policy_chosen)": "detach(margin) * log1mexp(policy_chosen)",
    "return margin": "margin",
    "return margin;": "margin",
    "z = beta * margin; return z": "beta * margin",
    "z = margin\nz = z - 1\nz": "margin - 1",
    "# why\nz = margin  # what\n\nz": "margin",
    "'What it is.'\nmargin": "margin",
    "exp = margin\nexp(exp)": "exp(margin)",
    "ｅｘｐ(ｍａｒｇｉｎ)": "exp(margin)",  # Python reads names in NFKC
    "def loss(): return margin": "margin",
    "def loss(pair, *, beta=0.1, **options):\n    return pair.margin": "margin",
    "def loss(beta, margin):\n    '''Doc.'''\n    z = beta * margin\n    return z": "beta * margin",
}


def test_is_read() -> None:
    assert {text: to_python(parse(text)) for text in READ} == READ


@pytest.mark.parametrize(
    "text",
    [
        "-log_sigmoid(beta * margin)",
        "-F.logsigmoid(beta * pair.margin)",
        "z = beta * margin\nreturn -torch.nn.functional.logsigmoid(z)",
        "def dpo(pair, *, beta):\n    return -F.logsigmoid(beta * pair.margin)",
        'def dpo(pair, beta=0.1):\n\t"""DPO."""\n\tz = beta * pair.margin\n\n\treturn -logsigmoid(z)\n',
    ],
)
def test_dpo_however_it_is_written(text: str) -> None:
    assert parse(text) == DPO


UNKNOWN = "known: policy_chosen, policy_rejected, reference_chosen"
REFUSED = {
    # names
    "foo": rf"line 1: unknown name 'foo'; {UNKNOWN}",
    "z = margin\n\ny = foo\nz": rf"line 3: unknown name 'foo'; {UNKNOWN}.*, margin, z$",
    "def loss(pair):\n    z = 1\n    return zz": "line 3: unknown name 'zz'",
    "def loss(tau):\n    return tau": "line 2: unknown name 'tau'",
    "z = z + 1\nz": "line 1: unknown name 'z'",
    "z = margin\npair.z": r"line 2: unknown name 'pair\.z'",
    "beta.margin": r"unknown name 'beta\.margin'",
    "margin.grad": r"unknown name 'margin\.grad'",
    "torch.pi * margin": r"unknown name 'torch\.pi'",
    # functions
    "foo(margin)": "line 1: unknown function foo; known: square, sqrt, abs, exp",
    "1 +\\\nfoo(margin)": "line 2: unknown function foo",
    "margin.exp()": r"unknown function margin\.exp",
    "(margin + 1).exp()": r"unknown function \?",
    "F.torch.exp(margin)": r"unknown function F\.torch\.exp",
    "add(margin, 1)": "unknown function add",
    "exp(margin, dim=0)": "line 1: calls take no keywords here",
    "exp(**margin)": "calls take no keywords here",
    "exp(*margin)": "line 1: Starred is not part of the language",
    "exp()": "line 1: exp: wanted 1 argument, got 0",
    "exp(margin, 2)": "line 1: exp: wanted 1 argument, got 2",
    "max(margin)": "line 1: maximum: wanted 2 arguments, got 1",
    "max(margin, 1, 2)": "line 1: maximum: wanted 2 arguments, got 3",
    # kinds
    "margin > 0": r"wanted a number for each pair, got a truth: where\(truth, a, b\) makes one of it",
    "exp(margin > 0)": "line 1: exp: argument 1 wanted a number, got a truth",
    "where(margin, 1, 2)": "line 1: where: argument 1 wanted a truth, got a number",
    "1 if margin else 2": "where: argument 1 wanted a truth, got a number",
    "where(margin > 0, margin > 1, 2)": "where: argument 2 wanted a number, got a truth",
    "(margin > 0) * margin": "mul: argument 1 wanted a number, got a truth",
    "(margin > 0) ** 2": "line 1: square: argument 1 wanted a number, got a truth",
    # numbers
    "margin ** 4": r"line 1: powers are 2, 3 and 0\.5; exp\(p \* log\(x\)\) says any other",
    "margin ** -1": "powers are 2, 3",
    "margin ** beta": "powers are 2, 3",
    "10 ** 10 ** 10": "powers are 2, 3",
    "10000.1": r"line 1: constant 10000\.1: wanted between -10,000 and 10,000",
    "-10001": "constant 10001: wanted between",
    "1e999": "constant inf: wanted between",
    "1e308 * 10": "constant 1e\\+308: wanted between|constant inf: wanted between",
    "9" * 3999: "constant inf: wanted between",
    "inf": "unknown name 'inf'",
    "nan": "unknown name 'nan'",
    "math.inf": r"unknown name 'math\.inf'",
    "float('nan')": "unknown function float",
    "True": "line 1: True is no number of the language",
    "margin * False": "False is no number of the language",
    "1j * margin": "1j is no number of the language",
    "'margin'": "line 1: Constant is not part of the language",
    "b'margin'": "Constant is not part of the language",
    "None": "Constant is not part of the language",
    "...": "Constant is not part of the language",
    # operators that are not there
    "margin % 2": "line 1: BinOp is not part of the language",
    "margin // 2": "BinOp is not part of the language",
    "margin @ margin": "BinOp is not part of the language",
    "~margin": "UnaryOp is not part of the language",
    "not margin": "UnaryOp is not part of the language",
    "margin == 0": "Compare is not part of the language",
    "0 < margin < 1": "Compare is not part of the language",
    "where(margin > 0 and margin < 1, 1, 2)": "BoolOp is not part of the language",
    "margin[0]": "Subscript is not part of the language",
    "margin, beta": "Tuple is not part of the language",
    # statements
    "margin = 1\nmargin": "line 1: margin is an input: take another name",
    "a = b = margin\na": "line 1: wanted name = expression",
    "a, b = margin, 1\na": "line 1: wanted name = expression",
    "a: float = margin\na": "line 1: wanted name = expression",
    "a = margin\na += 1\na": "line 2: wanted name = expression",
    "margin\nmargin": "line 1: wanted name = expression",
    "return margin\nreturn margin": "line 1: wanted name = expression",
    "a = margin": "line 1: wanted an expression, or return and one, as the last line",
    "a = margin\nif beta > 1:\n    return a": "line 2: wanted an expression, or return and one, as the last line",
    "return": "wanted an expression, or return and one",
    "def loss():\n    pass": "line 2: wanted an expression, or return and one",
    "": "wanted an expression, got nothing",
    'open("x").beta': "line 1: Attribute is not part of the language",
    '-log_sigmoid(beta * __import__("os").system("id").margin)': "Attribute is not part of the language",
    "(lambda: 1).margin": "Attribute is not part of the language",
    "[1, 2][0].beta": "Attribute is not part of the language",
    "# nothing": "line 1: expected an indented block",
    # around the function
    "import torch\ndef loss():\n    return margin": "wanted one function without decorators, or an expression, and",
    "def loss():\n    return margin\nloss()": "wanted one function without decorators",
    "@torch.compile\ndef loss():\n    return margin": "wanted one function without decorators",
    "def loss(tau=f()):\n    return margin": "the function's defaults: wanted numbers",
    "def loss(*, tau=f()):\n    return margin": "the function's defaults: wanted numbers",
    # not Python
    "margin +": "line 1: invalid syntax",
    "z = margin\nz +": "line 2: invalid syntax",
    "def loss()\n    return margin": "line 1: expected ':'",
    "```python\nmargin\n```": "line 1: invalid syntax",
    "((margin)": "line 1: '\\(' was never closed",
    "margin)": "line 1: unmatched '\\)'",
    "mar\0gin": "null bytes",
    "\ud800": "not readable: .*surrogates not allowed",
}


def refusal(text: str) -> str:
    """What is said of a text; nothing if it is read."""
    try:
        parse(text)
    except LanguageError as error:
        return str(error)
    return ""


def test_is_refused_in_one_line() -> None:
    said = {text: refusal(text) for text in REFUSED}
    wrong = [text for text in REFUSED if not re.search(REFUSED[text], said[text]) or "\n" in said[text]]
    assert {text: said[text] for text in wrong} == {}


@pytest.mark.parametrize(
    "wrong",
    [
        "exp()",
        "max(margin)",
        "where(margin, 1, 2)",
        "exp(margin > 0)",
        "1e5",
        "(z > 0) ** 2",
        "(z > 0) ** 3",
        "(z > 0) ** 0.5",
        " + ".join(["z"] * 81),
    ],
)
def test_the_line_is_said_of_wrong_arguments_too(wrong: str) -> None:
    assert refusal(f"z = margin\nz * ({wrong})").startswith("line 2: ")


@pytest.mark.parametrize(
    "text",
    [
        "    z = beta * margin\n    return -log_sigmoid(z)\n",
        "\n\tz = beta * margin\n\n\treturn -log_sigmoid(z)",
        "    def loss(pair, *, beta):\n        return -F.logsigmoid(beta * pair.margin)\n    ",
    ],
)
def test_an_indented_text_is_read(text: str) -> None:
    assert parse(text) == DPO


def test_a_default_is_a_number() -> None:
    defaults = {"-1": True, "0.5": True, "'text'": False, "-'text'": False, "None": False, "-f()": False, "[1]": False}
    for head in ("def loss(pair, tau={}):", "def loss(pair, *, tau={}):"):
        read = {text: refusal(f"{head.format(text)}\n    return pair.margin") == "" for text in defaults}
        assert read == defaults


def test_a_text_has_a_longest_length() -> None:
    text = "margin" + " " * (LONGEST - 6)
    assert parse(text) == MARGIN
    with pytest.raises(LanguageError, match=f"wanted at most {LONGEST:,} characters, got {LONGEST + 1:,}"):
        parse(text + " ")


@pytest.mark.parametrize(("left", "right"), ["()", ("exp(", ")"), ("-(", ")")])
def test_brackets_have_a_deepest_depth(left: str, right: str) -> None:
    assert parse(left * DEEPEST + "margin" + right * DEEPEST).inputs == {"margin"}
    for text in (left * (DEEPEST + 1) + "margin" + right * (DEEPEST + 1), left * 1000):
        with pytest.raises(LanguageError, match=f"more than {DEEPEST} brackets within brackets"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("-" * 3900 + "margin", "not readable: maximum recursion depth|too many nested", id="signs"),
        pytest.param("not " * 900 + "margin", None, id="nots"),
        pytest.param(" + ".join(["margin"] * 400), "nested too deeply", id="terms"),
        pytest.param("+".join(["beta"] * 799), "nested too deeply", id="more terms"),
        pytest.param("2**" * 1000 + "2", "nested too deeply", id="powers"),
        pytest.param("margin" + ".a" * 1900, "nested too deeply", id="attributes"),
        pytest.param("margin" + "()" * 1900, None, id="calls"),
        pytest.param("1 if margin > 0 else " * 190 + "1", None, id="conditions"),
        pytest.param("lambda:" * 560 + "1", None, id="lambdas"),
    ],
)
def test_depth_without_brackets_is_refused_too(text: str, said: str | None) -> None:
    with pytest.raises(LanguageError, match=said) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("steps", [58, 61])
def test_what_is_read_can_be_read_again(steps: int) -> None:
    text = "\n".join(["z = margin", *["z = relu(z)"] * steps, "softplus(-z)"])
    if steps > DEEPEST:  # locals hide brackets that the archive would have to write
        with pytest.raises(LanguageError, match=f"more than {DEEPEST} brackets within brackets"):
            parse(text)
    else:
        assert parse(to_python(parse(text))) == parse(text)


def test_a_tree_has_a_largest_size() -> None:
    terms = ["margin"] * (MOST_NODES // 2)  # n terms make 2n - 1 nodes
    assert parse("-(" + " + ".join(terms) + ")").size == MOST_NODES
    with pytest.raises(LanguageError, match=f"more than {MOST_NODES} nodes: wanted a smaller one"):
        parse(" + ".join([*terms, "margin"]))


def test_locals_cannot_grow_a_tree_beyond_it() -> None:
    doubled = [f"a{i + 1} = a{i} * a{i}" for i in range(200)]
    assert parse("\n".join(["a0 = margin", *doubled[:6], "a6"])).size == 127
    for steps in (7, 200):  # 2^200 nodes would be more than memory holds
        with pytest.raises(LanguageError, match=f"more than {MOST_NODES} nodes"):
            parse("\n".join(["a0 = margin", *doubled[:steps], "margin"]))


def test_a_cube_counts_its_base_twice() -> None:
    with pytest.raises(LanguageError, match=f"more than {MOST_NODES} nodes"):
        parse("(((((((margin ** 3) ** 3) ** 3) ** 3) ** 3) ** 3) ** 3)")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10_000.5, -1e300])
def test_a_constant_is_finite_and_no_larger_than_ten_thousand(value: float) -> None:
    with pytest.raises(LanguageError, match="wanted between -10,000 and 10,000"):
        constant(value)


def test_a_constant_keeps_six_digits_and_one_zero() -> None:
    assert constant(1 / 3).value == 0.333333
    assert constant(-9999.99951).value == -10_000
    assert constant(1.23456789e-7).value == 1.23457e-7
    assert str(constant(-0.0).value) == "0.0"
    assert parse("-0.0 * margin") == parse("0 * margin")


def test_the_function_around_a_text_has_no_say() -> None:
    """Annotations, defaults and parameters are for people: they are not read, so they cannot change what is meant."""
    for head in ("def loss(pair: PairLogps, *, beta: float = 0.7) -> Tensor:", "def anything(a, /, *b):"):
        assert parse(f"{head}\n    return -log_sigmoid(beta * margin)") == DPO
