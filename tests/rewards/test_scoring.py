import pytest

from sartor.errors import UserError
from sartor.plugins import resolve
from sartor.rewards.scoring import score_texts
from sartor.types import Message

CHAT = (Message("user", "How was it?"),)


def test_trls_calling_convention() -> None:
    seen = {}

    def scorer(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions)
        return [1, 2]

    assert score_texts(scorer, [CHAT, "plain"], ["a", "b"]) == [1.0, 2.0]
    assert seen["prompts"] == [[{"role": "user", "content": "How was it?"}], "plain"]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], "b"]


@pytest.mark.parametrize("scores", [[1.0], None, [1.0, float("nan")]])
def test_wrong_scores_are_refused_in_one_line(scores) -> None:
    def careless(prompts, completions, **columns):
        return scores

    with pytest.raises(UserError, match="scorer careless: wanted"):
        score_texts(careless, ["p", "q"], ["a", "b"])


@pytest.mark.parametrize("prompt", ["p", CHAT])
def test_vader_knows_good_from_bad_in_both_forms(prompt) -> None:
    good, bad = score_texts(resolve("rewards", "vader"), [prompt] * 2, ["I love it.", "I hate it."])
    assert good > 0.5
    assert bad < -0.5
