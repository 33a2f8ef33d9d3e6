"""What a language model answered, read as text and never run: names, thoughts and codes of objectives.

Models forget brackets, escape badly, wrap JSON in prose or in fences, and are cut off. So the three fields are looked
for wherever they stand, in one pass from left to right, and the JSON around them is not relied on: no depth of nesting
and no length can make reading slow.
"""

import json
import keyword
import re
import unicodedata
from dataclasses import dataclass

LONGEST_REPLY = 100_000  # characters that are read: some hundred times a usual objective
LONGEST_THOUGHT, LONGEST_NAME = 500, 40  # characters
THINKING_ENDS = "</think>"  # what stands before it in the answers of reasoning models are drafts
UNNAMED = "objective"

FIELD = re.compile(
    r'"(?P<key>name|thought|code)"\s*:\s*(?:"""(?P<long>.*?)"""|"(?P<text>(?:[^"\\]|\\.)*+)")'
    r'|"code"\s*:\s*"(?P<cut>(?:[^"\\]|\\.)*+)\\?\Z'
    r"|[{}]",
    re.DOTALL,
)
ESCAPE = re.compile(r'\\(?P<valid>u[0-9a-fA-F]{4}|["\\/bfnrt])?')
FENCE = re.compile(r"```[ \t]*(?P<tag>\w*+)[^\n`]*\n(?P<body>.*?)(?:```|\Z)", re.DOTALL)
PYTHON_TAGS = ("", "python", "python3", "py")
IDLE_LINE = re.compile(r"\s*(?:(?:import|from) [\w.,* ]+|#.*)?")


@dataclass(frozen=True)
class Answer:
    """One objective as a model wrote it. ``cut`` where the answer ended within it."""

    name: str
    thought: str
    code: str
    cut: bool = False


def read_answers(reply: str) -> list[Answer]:
    """The objectives of a reply, in order, each code once.

    >>> read_answers('Sure! {"name": "Soft hinge", "thought": "smooth", "code": "softplus(1 - beta * margin)"}')
    [Answer(name='soft_hinge', thought='smooth', code='softplus(1 - beta * margin)', cut=False)]
    """
    text = plain(reply[:LONGEST_REPLY]).rpartition(THINKING_ENDS)[2]
    found: dict[str, Answer] = {}
    for answer in _of_fields(text) or _of_fences(text):
        found.setdefault(answer.code, answer)
    return list(found.values())


def plain(text: str) -> str:
    """The text without what cannot be stored or would mislead who reads it: half characters, controls, hidden marks."""
    return "".join(
        letter
        for letter in text.encode("utf-8", "replace").decode()
        if letter in "\n\t" or not unicodedata.category(letter).startswith("C")
    )


def safe_name(text: str) -> str:
    """A short identifier that is safe as the name of a file and of a function.

    >>> safe_name("Adaptive-Margin DPO (v2)"), safe_name("../../etc/passwd"), safe_name("lambda"), safe_name("β²")
    ('adaptive_margin_dpo_v2', 'etc_passwd', 'lambda_objective', 'objective')
    """
    name = re.sub(r"[^a-z0-9]+", "_", text[:1000].lower()).strip("_")[:LONGEST_NAME].rstrip("_")
    if not name:
        return UNNAMED
    if keyword.iskeyword(name):
        return f"{name}_{UNNAMED}"
    return f"{UNNAMED}_{name}" if name[0].isdigit() else name


def _of_fields(text: str) -> list[Answer]:
    """Answers told in JSON, or in nearly that."""
    records: list[dict[str, str]] = [{}]
    for match in FIELD.finditer(text):
        key = "cut" if match["cut"] is not None else match["key"]
        # A bracket, or a field that is there already, begins another objective.
        if records[-1] and (key is None or key in records[-1]):
            records.append({})
        if key is not None:
            records[-1][key] = match["long"] or _unescaped(match["text"] or match["cut"] or "")
    answers = []
    for record in records:
        name, thought = record.get("name", ""), record.get("thought", "")
        if "code" in record:
            answers += [_answer(name, thought, code) for code in _functions(_unfenced(record["code"]))]
        elif "cut" in record:
            answers.append(_answer(name, thought, record["cut"], cut=True))
    return answers


def _of_fences(text: str) -> list[Answer]:
    """Answers told in blocks of Python."""
    blocks = [match["body"] for match in FENCE.finditer(text) if match["tag"].lower() in PYTHON_TAGS]
    return [_answer("", "", code) for block in blocks for code in _functions(block)]


def _answer(name: str, thought: str, code: str, cut: bool = False) -> Answer:
    defined = re.match(r"def (\w+)", code)
    name = name or (defined[1] if defined else "")
    return Answer(safe_name(name), " ".join(plain(thought).split())[:LONGEST_THOUGHT], plain(code).strip(), cut)


def _unescaped(text: str) -> str:
    r"""What stands between the quotes of a JSON string; a backslash that it may not hold, as in ``\sigma``, stays."""
    repaired = ESCAPE.sub(lambda match: match[0] if match["valid"] else "\\" + match[0], text)
    return json.loads(f'"{repaired}"', strict=False)


def _unfenced(code: str) -> str:
    fence = FENCE.search(code)
    return fence["body"] if fence else code


def _functions(code: str) -> list[str]:
    """Each function of a block on its own; imports before the first, which models write by habit, say nothing here."""
    before, *functions = re.split(r"^(?=def )", code, flags=re.MULTILINE)
    if not functions:
        return [code]
    if not all(IDLE_LINE.fullmatch(line) for line in before.splitlines()):
        functions[0] = before + functions[0]  # to be refused by the parser, which says why
    return functions
