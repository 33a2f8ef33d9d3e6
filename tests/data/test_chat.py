"""Templates, boundaries and truncation, on a byte tokenizer whose every token can be read."""

import pytest
from conftest import byte_tokenizer

from sartor.data.chat import PLAIN_TEMPLATE, encode_preferences, encode_prompts
from sartor.errors import UserError
from sartor.types import Comparison, Judged, Message, Ranking


def turn(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def read(tokenizer, ids) -> str:
    return tokenizer.decode(ids)


CHAT = Comparison(turn(("user", "Hi")), turn(("assistant", "Hello")), turn(("assistant", "Go away")))


def test_conversation_is_the_templates_own_text_with_one_bos_and_one_end() -> None:
    tokenizer = byte_tokenizer()
    (tree,) = encode_preferences(tokenizer, [CHAT], 100).trees
    assert read(tokenizer, tree.prompt) == "<|bos|><|user|>Hi<|end|>\n<|assistant|>"
    assert [read(tokenizer, branch) for branch in tree.branches] == ["Hello<|end|>\n", "Go away<|end|>\n"]
    assert tree.pairs == ((0, 1),)


def test_plain_text_gets_bos_and_eos_once_whatever_the_tokenizer_adds() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 256), ("<|end|>", 257)]
    )
    row = Comparison("<|bos|>Once", " upon<|end|>", " again")
    (tree,) = encode_preferences(tokenizer, [row], 100).trees
    assert read(tokenizer, tree.prompt) == "<|bos|>Once"
    assert [read(tokenizer, branch) for branch in tree.branches] == [" upon<|end|>", " again<|end|>"]


def test_a_template_without_end_of_turn_gets_eos() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    (tree,) = encode_preferences(tokenizer, [CHAT], 100).trees
    assert read(tokenizer, tree.branches[0]).endswith("Hello\n<|end|>")


def test_models_without_a_template_read_hh_transcripts() -> None:
    tokenizer = byte_tokenizer(PLAIN_TEMPLATE)
    (tree,) = encode_preferences(tokenizer, [CHAT], 100).trees
    assert read(tokenizer, tree.prompt) == "\n\nHuman: Hi\n\nAssistant:"
    assert read(tokenizer, tree.branches[0]) == " Hello<|end|>"


def test_strings_as_chat() -> None:
    tokenizer = byte_tokenizer()
    (tree,) = encode_preferences(tokenizer, [Comparison("Hi", "Hello", "Go")], 100, as_chat=True).trees
    assert read(tokenizer, tree.prompt) == "<|bos|><|user|>Hi<|end|>\n<|assistant|>"
    (plain,) = encode_prompts(tokenizer, ["Hi"], 100)
    assert read(tokenizer, plain) == "Hi"


def test_prompt_that_is_no_prefix_is_split_at_the_common_prefix_and_counted() -> None:
    # A thinking template opens the answer with a tag that the finished conversation does not have.
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    found = encode_preferences(tokenizer, [CHAT], 100)
    assert found.boundary == 1
    assert read(tokenizer, found.trees[0].prompt) == "<|user|>Hi<|end|><|assistant|>"
    assert read(tokenizer, found.trees[0].branches[1]) == "Go away<|end|>"
    assert found.notes(100) == [
        "1 of 1 rows: prompt and completion merge at their boundary, split at the longest common prefix"
    ]


def test_long_prompts_lose_their_start_and_long_completions_their_row() -> None:
    tokenizer = byte_tokenizer()
    rows = [Comparison("0123456789", "ab", "c"), Comparison("x", "a" * 50, "b"), Comparison("yz", "a", "b")]
    found = encode_preferences(tokenizer, rows, 8)
    assert (found.prompt_cut, found.too_long, found.index) == (1, 1, [0, 2])
    assert read(tokenizer, found.trees[0].prompt) == "56789"
    assert read(tokenizer, found.trees[0].branches[0]) == "ab<|end|>"
    assert all(len(t.prompt) + max(map(len, t.branches)) <= 8 for t in found.trees)
    assert "1 of 3 rows: left out, since a completion alone exceeds max_length 8" in found.notes(8)


def test_a_cut_prompt_keeps_its_bos() -> None:
    tokenizer = byte_tokenizer()
    (prompt,) = encode_prompts(tokenizer, [turn(("user", "0123456789"))], 6)
    assert read(tokenizer, prompt) == "<|bos|>89<|end|>\n<|assistant|>"


def test_ranking_is_one_tree_with_all_its_pairs() -> None:
    row = Ranking("p", ("a", "b", "c"), (2.0, 1.0, 2.0))
    (tree,) = encode_preferences(byte_tokenizer(), [row], 100).trees
    assert len(tree.branches) == 3
    assert tree.pairs == ((1, 0), (1, 2))


def test_prompt_that_ends_in_an_answer_is_continued() -> None:
    tokenizer = byte_tokenizer()
    (prompt,) = encode_prompts(tokenizer, [turn(("user", "Hi"), ("assistant", "I am"))], 100)
    assert read(tokenizer, prompt) == "<|bos|><|user|>Hi<|end|>\n<|assistant|>I am"


def test_no_prompt() -> None:
    (tree,) = encode_preferences(byte_tokenizer(), [Judged("", "abc", True)], 100).trees
    assert tree.prompt == ()
    assert tree.good == (True,)


def test_a_mismatched_completion_never_costs_the_row_its_place() -> None:
    row = Comparison("p" * 10, "a" * 5, "b" * 3)
    (tree,) = encode_preferences(byte_tokenizer(), [row], 16, mismatched=["c" * 100]).trees
    assert [len(branch) for branch in tree.branches] == [6, 4, 6]
    assert (len(tree.prompt), tree.mismatched, tree.ranks) == (10, 1, (1.0, 2.0))


def test_a_template_that_refuses_names_the_row() -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"prefs.jsonl, row 3: the model's chat template refuses .* must alternate"):
        encode_preferences(tokenizer, [CHAT], 100, where=["prefs.jsonl, row 3"])


def test_what_a_demonstration_teaches() -> None:
    """The last answer, every answer of the conversation with the other turns as context, or all of it."""
    from sartor.data.chat import encode_demonstrations
    from sartor.types import Demonstration, Message

    tokenizer = byte_tokenizer()
    turns = (Message("user", "one"), Message("assistant", "ONE"), Message("user", "two"))
    example = Demonstration(turns, (Message("assistant", "TWO"),))
    learned, sizes = {}, set()
    for train_on in ("completion", "assistant", "all"):
        (tree,) = encode_demonstrations(tokenizer, [example], 200, train_on=train_on).trees
        (branch,) = tree.branches
        learned[train_on] = tokenizer.decode([branch[i] for i in tree.scored(branch)])
        sizes.add(tree.size)
    assert learned["completion"] == "TWO<|end|>\n"
    assert learned["assistant"] == "ONE<|end|>\nTWO<|end|>\n"
    assert (
        learned["all"] == "<|user|>one<|end|>\n<|assistant|>ONE<|end|>\n<|user|>two<|end|>\n<|assistant|>TWO<|end|>\n"
    )
    assert len(sizes) == 1  # nothing is lost but what is not learned

    # Cut at the start, only what is left of the first answer is learned.
    (tree,) = encode_demonstrations(tokenizer, [example], 24, train_on="assistant").trees
    assert tree.size == 24
    (branch,) = tree.branches
    assert tokenizer.decode([branch[i] for i in tree.scored(branch)]) in "ONE<|end|>\nTWO<|end|>\n"
