import csv
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sartor.data.files import Where
from sartor.data.formats import Loaded, Skipped, load_examples, recognise
from sartor.errors import UserError
from sartor.types import Comparison, Demonstration, Document, Judged, Message, Prompt, Ranking

ALL = (Comparison, Ranking, Judged, Demonstration, Document, Prompt)
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Sources are named as a user would, in the current folder, so that messages can be compared whole."""
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def load(*rows, wanted=ALL, **options):
    return load_examples(write("a.jsonl", rows), wanted=wanted, **options)


def refusal(*rows, **options):
    with pytest.raises(UserError) as caught:
        load(*rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turn(role, content):
    return {"role": role, "content": content}


def said(who, value):
    return {"from": who, "value": value}


def talk(*contents, first="user"):
    """Dicts of alternating turns, as rows hold them."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [turn(roles[i % 2], content) for i, content in enumerate(contents)]


def turns(*contents, first="user"):
    return tuple(Message(**one) for one in talk(*contents, first=first))


def answer(content):
    return turns(content, first="assistant")


SYSTEM, POLITE = turn("system", "Be polite."), (Message("system", "Be polite."),)

FORMATS = {
    "text comparison": (
        {"prompt": "Sky?", "chosen": " blue", "rejected": " red", "id": 7},
        Comparison("Sky?", " blue", " red"),
        "comparisons: prompt, chosen, rejected (text)",
    ),
    "comparison with strength and tie": (
        {"prompt": "Sky?", "chosen": "blue", "rejected": "red", "strength": 2, "tie": True},
        Comparison("Sky?", "blue", "red", tie=True, strength=2.0),
        "comparisons: prompt, chosen, rejected (text)",
    ),
    "comparison with margin": (
        {"prompt": "Sky?", "chosen": "blue", "rejected": "red", "margin": "0.5", "tie": None},
        Comparison("Sky?", "blue", "red", strength=0.5),
        "comparisons: prompt, chosen, rejected (text)",
    ),
    "comparison without a word on strength": (
        {"prompt": "Sky?", "chosen": "blue", "rejected": "red", "margin": None, "tie": 0},
        Comparison("Sky?", "blue", "red"),
        "comparisons: prompt, chosen, rejected (text)",
    ),
    "conversation comparison": (
        {"prompt": talk("Sky?"), "chosen": [turn("assistant", "blue")], "rejected": [turn("assistant", "red")]},
        Comparison(turns("Sky?"), answer("blue"), answer("red")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "conversation prompt, text answers": (
        {"prompt": talk("Sky?"), "chosen": "blue", "rejected": "red"},
        Comparison(turns("Sky?"), answer("blue"), answer("red")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "conversation prompt repeated in the answers": (
        {
            "prompt": [SYSTEM, *talk("Sky?")],
            "chosen": [SYSTEM, *talk("Sky?", "a")],
            "rejected": [SYSTEM, *talk("Sky?", "b")],
        },
        Comparison(POLITE + turns("Sky?"), answer("a"), answer("b")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "UltraFeedback": (
        {"prompt": "Sky?", "chosen": talk("Sky?", "a"), "rejected": talk("Sky?", "b"), "messages": talk("Sky?", "a")},
        Comparison(turns("Sky?"), answer("a"), answer("b")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "UltraFeedback with a system turn": (
        {"prompt": "Sky?", "chosen": [SYSTEM, *talk("Sky?", "a")], "rejected": [SYSTEM, *talk("Sky?", "b")]},
        Comparison(POLITE + turns("Sky?"), answer("a"), answer("b")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "text prompt, assistant turns": (
        {"prompt": "Sky?", "chosen": talk("a", first="assistant"), "rejected": talk("b", first="assistant")},
        Comparison(turns("Sky?"), answer("a"), answer("b")),
        "comparisons: prompt, chosen, rejected (conversations)",
    ),
    "implicit prompt, conversations": (
        {"chosen": talk("Hi", "Yes?", "Sky?", "a"), "rejected": talk("Hi", "Yes?", "Sky?", "b")},
        Comparison(turns("Hi", "Yes?", "Sky?"), answer("a"), answer("b")),
        "comparisons: chosen, rejected (conversations)",
    ),
    "implicit prompt, several turns apart": (
        {"chosen": talk("Hi", "a", "more", "b"), "rejected": talk("Hi", "c")},
        Comparison(turns("Hi"), turns("a", "more", "b", first="assistant"), answer("c")),
        "comparisons: chosen, rejected (conversations)",
    ),
    "implicit prompt, one conversation opens the other": (
        {"chosen": talk("Hi", "a"), "rejected": talk("Hi", "a", "more", "b")},
        Comparison(turns("Hi"), answer("a"), turns("a", "more", "b", first="assistant")),
        "comparisons: chosen, rejected (conversations)",
    ),
    "implicit prompt, text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        Comparison("The sky is", " blue.", " black."),
        "comparisons: chosen, rejected (text)",
    ),
    "implicit prompt, text, line break": (
        {"chosen": "Sky?\n\nblue", "rejected": "Sky?\n\nblue, I think"},
        Comparison("Sky?\n\n", "blue", "blue, I think"),
        "comparisons: chosen, rejected (text)",
    ),
    "HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: blue\n\nor so ",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant: red",
        },
        Comparison(turns("Hi", "Yes?", "Sky?"), answer("blue\n\nor so"), answer("red")),
        "comparisons: chosen, rejected (HH transcripts)",
    ),
    "HH without line breaks before the first mark": (
        {"chosen": "Human: Sky?\n\nAssistant: blue", "rejected": "\nHuman: Sky?\n\nAssistant: red"},
        Comparison(turns("Sky?"), answer("blue"), answer("red")),
        "comparisons: chosen, rejected (HH transcripts)",
    ),
    "HH without the first mark": (
        {"chosen": "Sky?\n\nAssistant: blue", "rejected": "Sky?\n\nAssistant: red"},
        Comparison(turns("Sky?"), answer("blue"), answer("red")),
        "comparisons: chosen, rejected (HH transcripts)",
    ),
    "HH with a preamble": (
        {
            "chosen": "Be polite.\n\nHuman: Sky?\n\nAssistant: blue",
            "rejected": "Be polite.\n\nHuman: Sky?\n\nAssistant: red",
        },
        Comparison(POLITE + turns("Sky?"), answer("blue"), answer("red")),
        "comparisons: chosen, rejected (HH transcripts)",
    ),
    "ranking": (
        {"prompt": "Sky?", "completions": ["blue", "red", "azure"], "ranks": [1, 2, 1]},
        Ranking("Sky?", ("blue", "red", "azure"), (1.0, 2.0, 1.0)),
        "rankings: prompt, completions, ranks (text)",
    ),
    "conversation ranking": (
        {"prompt": talk("Sky?"), "completions": [talk("a", first="assistant"), "b"], "ranks": [2, 1]},
        Ranking(turns("Sky?"), (answer("a"), answer("b")), (2.0, 1.0)),
        "rankings: prompt, completions, ranks (conversations)",
    ),
    "judged": (
        {"prompt": "Sky?", "completion": "red", "label": False},
        Judged("Sky?", "red", False),
        "judged answers: prompt, completion, label (text)",
    ),
    "judged in numbers": (
        {"prompt": talk("Sky?"), "completion": talk("blue", first="assistant"), "label": 1},
        Judged(turns("Sky?"), answer("blue"), True),
        "judged answers: prompt, completion, label (conversations)",
    ),
    "judged in words": (
        {"prompt": "Sky?", "completion": "[1, 2]", "label": "True"},
        Judged("Sky?", "[1, 2]", True),
        "judged answers: prompt, completion, label (text)",
    ),
    "demonstration": (
        {"prompt": "Sky?", "completion": " blue"},
        Demonstration("Sky?", " blue"),
        "demonstrations: prompt, completion (text)",
    ),
    "messages": (
        {"messages": [SYSTEM, *talk("Hi", "Yes?", "Sky?", "blue")]},
        Demonstration(POLITE + turns("Hi", "Yes?", "Sky?"), answer("blue")),
        "demonstrations: messages (conversations)",
    ),
    "ShareGPT": (
        {"conversations": [said("system", "Be polite."), said("human", "Sky?"), said("gpt", "blue")]},
        Demonstration(POLITE + turns("Sky?"), answer("blue")),
        "demonstrations: conversations (ShareGPT)",
    ),
    "ShareGPT, the roles by their other names": (
        {"conversations": [said("user", "Sky?"), said("assistant", "blue")]},
        Demonstration(turns("Sky?"), answer("blue")),
        "demonstrations: conversations (ShareGPT)",
    ),
    "document": ({"text": "Once.", "label": 1}, Document("Once."), "documents: text (text)"),
    "prompt": ({"prompt": "Sky?", "id": 1}, Prompt("Sky?"), "prompts: prompt (text)"),
    "conversation prompt": ({"prompt": talk("Sky?")}, Prompt(turns("Sky?")), "prompts: prompt (conversations)"),
}


def table(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@table(FORMATS)
def test_formats(case):
    row, example, phrase = case
    assert load(row) == Loaded("a.jsonl", [example], [Where("a.jsonl", 1)], phrase, {})
    assert str(recognise(row, row)) == phrase


@table(FORMATS)
def test_csv_cells_spell_lists_in_json(case):
    row, example, phrase = case
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [row, [json.dumps(value) if isinstance(value, list) else value for value in row.values()]]
        )
    loaded = load_examples("a.csv", wanted=ALL)
    assert (loaded.examples, loaded.where, loaded.format) == ([example], [Where("a.csv", 2)], phrase)


@table({name: case for name, case in FORMATS.items() if name != "conversation ranking"})  # mixes text and lists
def test_parquet(case):
    row, example, phrase = case
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "a.parquet")
    loaded = load_examples("a.parquet", wanted=ALL)
    assert (loaded.examples, loaded.format) == ([example], phrase)


PAIR = {"prompt": "Sky?", "chosen": "blue", "rejected": "red"}
RANKED = {"prompt": "Sky?", "completions": ["a", "b"], "ranks": [1, 2]}
JUDGED = {"prompt": "Sky?", "completion": "blue", "label": True}
NOT_ANSWERED = "conversation that does not end in an assistant turn"
NO_MESSAGE = "a message without role and content as text"

BAD_ROWS = {
    "identical": (PAIR | {"rejected": "blue"}, "identical chosen and rejected: 'blue'"),
    "identical, implicit": ({"chosen": "x", "rejected": "x"}, "identical chosen and rejected: 'x'"),
    "identical conversations": (
        {"prompt": "Sky?", "chosen": talk("Sky?", "a"), "rejected": talk("Sky?", "a")},
        "identical chosen and rejected: 'a'",
    ),
    "identical but for white space in HH": (
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: a", "rejected": "\n\nHuman: Sky?\n\nAssistant: a "},
        "identical chosen and rejected: 'a'",
    ),
    "empty chosen": (PAIR | {"chosen": ""}, "empty completion: ''"),
    "white rejected": (PAIR | {"rejected": " \n"}, r"empty completion: ' \n'"),
    "empty assistant turn": (
        {"chosen": talk("Sky?", "blue"), "rejected": talk("Sky?", " ")},
        "empty completion: ' '",
    ),
    "empty answer in HH": (
        {"chosen": "\n\nHuman: Sky?\n\nAssistant:", "rejected": "\n\nHuman: Sky?\n\nAssistant: a"},
        "empty completion: ''",
    ),
    "nothing after the prompt": (
        {"prompt": talk("a", "b"), "chosen": talk("a", "b"), "rejected": talk("a", "b", "c", "d")},
        "empty completion: ()",
    ),
    "empty completion": ({"prompt": "Sky?", "completion": ""}, "empty completion: ''"),
    "empty judged completion": (JUDGED | {"completion": "\t"}, r"empty completion: '\t'"),
    "empty ranked completion": (RANKED | {"completions": ["a", ""]}, "empty completion: ''"),
    "empty conversation": ({"messages": []}, "empty conversation: []"),
    "empty conversation prompt": (PAIR | {"prompt": []}, "empty conversation: []"),
    "empty prompt": (PAIR | {"prompt": " "}, "empty prompt: ' '"),
    "empty text": ({"text": "\n"}, r"empty text: '\n'"),
    "prompts differ in HH": (
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: a", "rejected": "\n\nHuman: Sea?\n\nAssistant: b"},
        r"prompts that differ within the row: '\n\nHuman: Sky?\n\nAssistant: a'",
    ),
    "prompts differ after a common turn": (
        {"chosen": [SYSTEM, *talk("Sky?", "a")], "rejected": [SYSTEM, *talk("Sea?", "a")]},
        "prompts that differ within the row: 'a'",
    ),
    "no common message": ({"chosen": talk("Sky?", "a"), "rejected": talk("Sea?", "a")}, "no common prompt: 'a'"),
    "no common word": ({"chosen": "black", "rejected": "blue"}, "no common prompt: 'black'"),
    "prompt is not the conversation's": (
        {"prompt": "Sea?", "chosen": talk("Sky?", "a"), "rejected": talk("Sky?", "b")},
        "prompt column and conversation differ: 'Sea?'",
    ),
    "prompt conversation is not the answers'": (
        {"prompt": talk("Sea?"), "chosen": talk("Sky?", "a"), "rejected": talk("Sky?", "b")},
        "prompt column and conversation differ: 'Sea?'",
    ),
    "text against conversation": (
        {"chosen": "Sky? a", "rejected": talk("Sky?", "b")},
        "one of chosen and rejected is text, the other a conversation: 'Sky? a'",
    ),
    "null": (PAIR | {"chosen": None}, "chosen is not text: None"),
    "number": (PAIR | {"rejected": 3}, "rejected is not text: 3"),
    "object": (PAIR | {"prompt": {"text": "Sky?"}}, "prompt is not text: {'text': 'Sky?'}"),
    "text is a number": ({"text": 1.5}, "the text column is not text: 1.5"),
    "half an emoji": (PAIR | {"chosen": "\ud83d"}, r"chosen is not valid Unicode: '\ud83d'"),
    "null completion": (RANKED | {"completions": ["a", None]}, "a completion is not text: None"),
    "message without content": ({"messages": [{"role": "user"}]}, f"{NO_MESSAGE}: {{'role': 'user'}}"),
    "message with null content": (
        {"messages": [turn("user", None)]},
        f"{NO_MESSAGE}: {{'role': 'user', 'content': None}}",
    ),
    "message is text": ({"messages": ["Sky?"]}, f"{NO_MESSAGE}: 'Sky?'"),
    "messages are text": ({"messages": "Sky?"}, "messages is not a list: 'Sky?'"),
    "unknown speaker": (
        {"conversations": [said("bing", "Sky?")]},
        "unknown speaker, not one of human, user, gpt, assistant, system: 'bing'",
    ),
    "user speaks last": ({"messages": talk("Sky?", "blue", "ok")}, f"{NOT_ANSWERED}: 'ok'"),
    "user speaks last in an answer": (
        {"prompt": talk("Sky?"), "completion": talk("blue", "ok", first="assistant")},
        f"{NOT_ANSWERED}: 'ok'",
    ),
    "user speaks last in a pair": (
        {"chosen": talk("Sky?", "a"), "rejected": talk("Sky?")},
        f"{NOT_ANSWERED}: 'Sky?'",
    ),
    "user speaks last in HH": (
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: a", "rejected": "\n\nHuman: Sky?"},
        f"{NOT_ANSWERED}: 'Sky?'",
    ),
    "no question": ({"messages": talk("blue", first="assistant")}, "no turn before the answer: 'blue'"),
    "fewer ranks": (RANKED | {"ranks": [1]}, "unequal numbers of completions and ranks: [1]"),
    "one completion": (RANKED | {"completions": ["a"], "ranks": [1]}, "not 2 to 9 completions: 1"),
    "ten completions": (
        RANKED | {"completions": list("abcdefghij"), "ranks": list(range(10))},
        "not 2 to 9 completions: 10",
    ),
    "one distinct completion": (RANKED | {"completions": ["a", "a"]}, "fewer than two distinct completions: 'a'"),
    "ranks in words": (RANKED | {"ranks": [1, "last"]}, "a rank is not a number: 'last'"),
    "ranks not finite": (RANKED | {"ranks": [1, float("nan")]}, "a rank is not a number: nan"),
    "ranks are no list": (RANKED | {"ranks": "[1,"}, "ranks is not a list: '[1,'"),
    "label in words": (JUDGED | {"label": "good"}, "label is not true or false (or 1 or 0): 'good'"),
    "label of a scale": (JUDGED | {"label": 4}, "label is not true or false (or 1 or 0): 4"),
    "no label": (JUDGED | {"label": None}, "label is not true or false (or 1 or 0): None"),
    "tie in words": (PAIR | {"tie": "perhaps"}, "tie is not true or false (or 1 or 0): 'perhaps'"),
    "strength in words": (PAIR | {"strength": "slightly"}, "strength is not a number: 'slightly'"),
    "margin is a truth": (PAIR | {"margin": True}, "margin is not a number: True"),
    "long value": (PAIR | {"tie": "x" * 100}, f"tie is not true or false (or 1 or 0): '{'x' * 56}..."),
}
OUT = "mend it, or leave it out with --on-bad-row skip or drop"


@table(BAD_ROWS)
def test_bad_rows(case):
    row, problem = case
    assert refusal(row, on_bad_row="error") == f"a.jsonl, row 1: {problem} - {OUT}"
    reason, _, value = problem.partition(": ")
    assert refusal(row, on_bad_row="drop") == (
        f"a.jsonl: 1 of 1 rows are bad, none is left: 1 {reason} (first: a.jsonl, row 1: {value}) - mend the file"
    )


def pairs(good, bad):
    return [PAIR | {"chosen": ""}] * bad + [PAIR] * good


def test_up_to_one_per_cent_is_skipped_and_reported():
    loaded = load(*pairs(198, 2))
    assert len(loaded.examples) == len(loaded.where) == 198
    assert loaded.where[0] == Where("a.jsonl", 3)
    assert loaded.skipped == {"empty completion": Skipped(2, Where("a.jsonl", 1), "''")}
    assert str(loaded) == (
        "a.jsonl: 198 rows of comparisons: prompt, chosen, rejected (text); "
        "2 bad rows skipped: 2 empty completion (first: a.jsonl, row 1: '')"
    )
    assert str(load(PAIR)) == "a.jsonl: 1 rows of comparisons: prompt, chosen, rejected (text)"


def test_more_than_one_per_cent_is_refused():
    rows = [PAIR | {"rejected": "blue"}, *pairs(197, 2)]
    assert refusal(*rows) == (
        "a.jsonl: 3 of 200 rows are bad (1.5 %, at most 1 % are skipped): 2 empty completion (first: a.jsonl, row 2: "
        "''), 1 identical chosen and rejected (first: a.jsonl, row 1: 'blue') - "
        "mend the file, or leave out every bad row with --on-bad-row drop"
    )
    assert len(load(*rows, on_bad_row="drop").examples) == 197


def test_in_small_files_one_bad_row_is_too_many():
    assert refusal(*pairs(98, 1)) == (
        "a.jsonl: 1 of 99 rows are bad (1.01 %, at most 1 % are skipped; under 100 rows, a single one is more): "
        "1 empty completion (first: a.jsonl, row 1: '') - "
        "mend the file, or leave out every bad row with --on-bad-row drop"
    )
    assert len(load(*pairs(99, 1)).examples) == 99
    assert len(load(*pairs(98, 1), on_bad_row="drop").examples) == 98


def test_unknown_policy():
    assert (
        refusal(PAIR, on_bad_row="dorp") == "unknown on_bad_row 'dorp': did you mean 'drop'? known: drop, error, skip"
    )


PAIRS = (
    "comparisons (prompt, chosen, rejected) or comparisons (chosen, rejected) or "
    "corrections (prompt, completion, correction)"
)

BAD_COLUMNS = {
    "misspelt": (
        {"prompt": "", "choosen": "", "rejected": ""},
        f"columns prompt, choosen, rejected do not fit, wanted {PAIRS} - did you mean 'chosen' by 'choosen'?",
    ),
    "capitals": (
        {"Chosen": "", "Rejected": ""},
        f"columns Chosen, Rejected do not fit, wanted {PAIRS} - did you mean 'chosen' by 'Chosen'?",
    ),
    "foreign": (
        {"": 0, "instruction": "", "two\nlines": ""},
        f"columns (unnamed), instruction, two lines do not fit, wanted {PAIRS} - rename the columns to these",
    ),
    "none": ({}, f"columns (none) do not fit, wanted {PAIRS} - rename the columns to these"),
    "judged": (
        JUDGED,
        f"holds judged answers (prompt, completion, label), which are for KTO, wanted {PAIRS} - "
        "name a source of that shape, or use this one for KTO",
    ),
    "rankings": (
        RANKED,
        "holds rankings (prompt, completions, ranks), which are for K-wise reward models and listwise DPO, "
        f"wanted {PAIRS} - name a source of that shape, or use this one for K-wise reward models and listwise DPO",
    ),
}


@table(BAD_COLUMNS)
def test_columns_that_do_not_fit(case):
    row, message = case
    assert refusal(row, wanted=(Comparison,)) == f"a.jsonl: {message}"


def test_every_accepted_shape_is_listed():
    with pytest.raises(UserError) as caught:
        recognise(["question"], {"question": "Sky?"})
    assert str(caught.value) == (
        f"columns question do not fit, wanted {PAIRS} or rankings (prompt, completions, ranks) or judged answers "
        "(prompt, completion, label) or demonstrations (prompt, completion) or demonstrations (messages) or "
        "demonstrations (conversations) or documents (text) or prompts (prompt) - rename the columns to these"
    )


def test_many_columns_are_cut_short():
    message = refusal({f"column{i}": 0 for i in range(100)}, wanted=(Document,))
    assert message.startswith("a.jsonl: columns column0, column1, ")
    assert message.endswith("column19, column2... do not fit, wanted documents (text) - rename the columns to these")


def test_later_row_without_a_column():
    assert refusal(PAIR, {"prompt": "Sky?", "chosen": "blue"}, on_bad_row="drop") == (
        "a.jsonl, row 2: no column 'rejected', which a.jsonl, row 1 has: add it, or remove the row"
    )


def test_only_wanted_nouns_the_first_wanted_first():
    both = PAIR | {"messages": talk("Sky?", "blue")}
    assert isinstance(load(both, wanted=(Comparison, Demonstration)).examples[0], Comparison)
    assert isinstance(load(both, wanted=(Demonstration, Comparison)).examples[0], Demonstration)
    assert isinstance(load(both, wanted=(Demonstration,)).examples[0], Demonstration)


def test_bad_answers_are_never_read_as_demonstrations():
    assert refusal(JUDGED, wanted=(Demonstration, Prompt)).startswith("a.jsonl: holds judged answers")


def shared(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    return str(DATA / name)


@pytest.mark.data
def test_hh():
    source = shared("hh-rlhf/harmless-base-2000.jsonl.gz")
    loaded = load_examples(source, wanted=(Comparison,))
    assert loaded.format == "comparisons: chosen, rejected (HH transcripts)"
    assert len(loaded.examples) == 1992
    assert {reason: (one.count, one.where.row) for reason, one in loaded.skipped.items()} == {
        "empty completion": (4, 87),
        "prompts that differ within the row": (4, 1255),
    }
    for pair in loaded.examples:
        assert pair.prompt
        assert [turn.role for turn in pair.chosen + pair.rejected] == ["assistant"] * 2


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oasst/en_100_tree.jsonl.gz", f"holds prompts (prompt), which are for PPO, wanted {PAIRS} - "),
        ("fine-grained-rlhf/dev_feedback.json.gz", "columns question, passages, gold, "),
        ("tldr/posts.csv.gz", "columns (unnamed), instruction, output, dataset, generator do not fit, "),
    ],
)
def test_other_shapes_of_feedback_are_refused(name, message):
    source = shared(name)
    with pytest.raises(UserError, match=re.escape(f"{source}: {message}")):
        load_examples(source, wanted=(Comparison,))
