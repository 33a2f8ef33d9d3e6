"""The tasks that ship with Sartor: prompts of our own, and scores that say what they should."""

import pytest

from sartor import plugins
from sartor.errors import UserError
from sartor.rewards.scoring import score_texts
from sartor.tasks.summary import ASK, facts_of, prompts, summary
from sartor.tasks.task import task_named


@pytest.mark.parametrize("name", ["sentiment", "summary"])
def test_no_prompt_is_on_both_sides(name: str) -> None:
    task = task_named(name)
    assert len(task.train) >= 100
    assert len(task.held_out) >= 60
    assert not set(task.train) & set(task.held_out)
    scores = score_texts(plugins.resolve("rewards", task.score), task.train[:2], ["Wonderful.", "Millbrook"])
    assert len(scores) == 2


def test_an_unknown_task_is_told() -> None:
    with pytest.raises(UserError, match="unknown task 'sumary': did you mean 'summary'"):
        task_named("sumary")


def test_the_same_seed_writes_the_same_reports() -> None:
    assert prompts(30, seed=1) == prompts(30, seed=1)
    assert len(set(prompts(120, seed=1))) > 110
    assert all(len(facts_of(report.removeprefix(ASK))) >= 4 for report in prompts(120, seed=1))


def test_what_a_summary_earns() -> None:
    report = (
        ASK + "On Friday a bakery in Norwell closed after 40 years. Mei Tanaka ran it to the end, and 12 people wept."
    )
    facts = {"friday", "norwell", "40", "mei", "tanaka", "12"}
    assert facts_of(report) == facts
    own = "Mei Tanaka shut her Norwell bakery on Friday; 40 years, and 12 people crying."
    score = lambda text: summary([report], [text])[0]  # noqa: E731
    assert score(own) == 1.0
    assert score(own + " word" * 20) == pytest.approx((60 - 34) / (60 - 25))  # 34 words
    assert score(report.removeprefix(ASK)) == 0.0  # all copied
    assert score("Mei ran it to the end, and 12 people wept. Norwell.") == pytest.approx(3 / 6 * (16 - 9) / (16 - 6))
    assert score("") == 0.0
