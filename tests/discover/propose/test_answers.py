import json
import time

import pytest

from sartor.discover.propose.answers import LONGEST_REPLY, Answer, plain, read_answers, safe_name

DPO, HINGE = "-log_sigmoid(beta * margin)", "relu(1 - beta * margin)"
TWO = [{"name": "a", "thought": "one", "code": DPO}, {"name": "b", "thought": "two", "code": HINGE}]
FORMS = {
    "a list": json.dumps(TWO),
    "in a fence, with prose": f'"My" answer {{as asked}}:\n```json\n{json.dumps(TWO, indent=2)}\n```\nHave fun!',
    "one a line": "\n".join(map(json.dumps, TWO)),
    "within an object": json.dumps({"objectives": TWO, "count": 2}),
    "other order of fields": json.dumps([{"code": one["code"], **one} for one in TWO]),
    "commas too many": json.dumps(TWO).replace("}", ",}"),
    "cut off in the third": json.dumps(TWO)[:-1] + ', {"name": "c", "thou',
    "after thinking": f'<think>{{"code": "margin"}}</think>{json.dumps(TWO)}',
    "twice": json.dumps(TWO + TWO),
    "fences in the code": json.dumps([{**one, "code": f"```python\n{one['code']}\n```"} for one in TWO]),
    "triple quotes": "".join(
        f'{{"name": "{o["name"]}", "thought": "{o["thought"]}", "code": """{o["code"]}"""}}' for o in TWO
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_usual_forms_of_an_answer_are_read_alike(form: str) -> None:
    assert read_answers(FORMS[form]) == [Answer("a", "one", DPO), Answer("b", "two", HINGE)]


def test_blocks_of_python_without_json_are_read_function_by_function() -> None:
    reply = (
        f"First:\n```python\nimport torch\n# smooth\n\ndef Soft_One(pair, beta):\n    return {DPO}\n\n"
        f"def other(pair):\n    return {HINGE}\n```\nand\n```\n{DPO}\n```\n```bash\nrm -rf /\n```\n```py\nz = beta"
    )
    assert [(one.name, one.code.splitlines()[-1].strip()) for one in read_answers(reply)] == [
        ("soft_one", f"return {DPO}"),
        ("other", f"return {HINGE}"),
        ("objective", DPO),
        ("objective", "z = beta"),
    ]


def test_what_runs_before_a_function_stays_with_it_for_the_parser_to_refuse() -> None:
    (answer,) = read_answers("```python\nimport os; os.remove('x')\ndef f(pair):\n    return margin\n```")
    assert "os.remove" in answer.code


def test_an_objective_that_the_end_of_the_answer_cuts_is_told_as_cut() -> None:
    whole, cut = read_answers('[{"name": "a", "thought": "t", "code": "margin"}, {"name": "b", "code": "beta * mar\\')
    assert (whole.cut, cut) == (False, Answer("b", "", "beta * mar", cut=True))


def test_escapes_that_json_does_not_know_do_not_lose_the_answer() -> None:
    (answer,) = read_answers(r'{"name": "x", "thought": "uses \sigma, \u and \"quotes\"", "code": "margin\n* 2"}')
    assert answer == Answer("x", r'uses \sigma, \u and "quotes"', "margin\n* 2")


@pytest.mark.parametrize("reply", ["", "I cannot help with that.", "[]", '{"name": "x"}', "```json\n{}\n```", "{" * 99])
def test_an_answer_without_objectives_holds_none(reply: str) -> None:
    assert read_answers(reply) == []


HOSTILE = {
    "deep objects": '{"a":' * 200_000,
    "deep lists": "[" * 500_000,
    "brackets": "{}" * 300_000,
    "open strings": '{"code": "' * 100_000,
    "open fences": "```" * 300_000,
    "a tag without an end": "```" + "a" * 300_000,
    "backslashes": '"code": "' + "\\" * 500_000,
    "blanks": '"code"' + " " * 500_000,
    "fields": '"name":"' * 100_000,
    "a huge number": '{"code": "' + "9" * 500_000 + '"}',
    "functions": "```\n" + "def f():\n" * 50_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_answer_is_slow_to_read(kind: str) -> None:
    began = time.perf_counter()
    read_answers(HOSTILE[kind])
    assert time.perf_counter() - began < 2
    assert len(HOSTILE[kind]) > LONGEST_REPLY


def test_half_characters_controls_and_hidden_marks_are_left_out() -> None:
    (answer,) = read_answers(r'{"name": "\ud800x", "thought": "a\u0000b\u202ec", "code": "margin\u200b * β"}')
    assert answer == Answer("x", "abc", "margin * β")
    assert plain("a\x1b[31mb\ud800\n\tc") == "a[31mb?\n\tc"


@pytest.mark.parametrize(
    ("text", "name"),
    [("A" * 99, "a" * 40), ("2 fast", "objective_2_fast"), ("__import__('os')", "import_os"), ("损失", "objective")],
)
def test_names_become_short_identifiers(text: str, name: str) -> None:
    assert safe_name(text) == name
    assert name.isidentifier()
