"""Grammar, mutation, crossover and the bandit: proposals of the language, the same ones for the same seed."""

import numpy as np
import pytest

from sartor.discover.language.expression import Expression
from sartor.discover.language.known import KNOWN, known
from sartor.discover.language.parse import parse
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import Program, sides_of
from sartor.discover.language.simplify import simplify
from sartor.discover.propose.bandit import Record, choose
from sartor.discover.propose.grammar import MOST, WAYS, Grammar, random_tree
from sartor.discover.propose.parents import best_by_behaviour, pick
from sartor.discover.propose.proposal import Member, Population, Proposer
from sartor.discover.screens import screen
from sartor.evaluate.statistics import Estimate
from sartor.objectives.contract import moderate


def member(number: int, tree: Expression, fitness: float, behaviour: str = "") -> Member:
    score = Estimate(fitness, fitness - 0.1, fitness + 0.1, 20)
    return Member(number, f"#{number}", tree, fitness, score, "linear", number % 4, behaviour)


POPULATION = Population([member(i, known(name), 1 - i / 100) for i, name in enumerate(KNOWN, start=1)])


@pytest.mark.parametrize("way", WAYS)
def test_proposals_are_of_the_language_and_follow_from_the_seed(way: str) -> None:
    grammar = Grammar(way)
    assert isinstance(grammar, Proposer)
    once, again, other = (grammar.propose(POPULATION, 12, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert once == again
    assert once != other
    assert len(once) == 12
    numbers = {one.number: one.tree for one in POPULATION.members}
    for one in once:
        assert one.tree is not None
        assert 2 < one.tree.size <= MOST
        assert parse(to_python(one.tree)) == one.tree
        assert one.origin == way
        assert len(one.parents) == {"random": 0, "mutate": 1, "cross": 2, "tune": 1, "prune": 1}[way]
        assert all(one.tree != numbers[parent] for parent in one.parents)


def test_without_members_only_the_random_grammar_speaks() -> None:
    found = {way: len(Grammar(way).propose(Population([]), 4, np.random.default_rng(0))) for way in WAYS}
    assert found == {"random": 4, "mutate": 0, "cross": 0, "tune": 0, "prune": 0}


def test_the_random_grammar_says_something_worth_training_often_enough() -> None:
    draw = np.random.default_rng(0)
    fit = sum(not screen(simplify(random_tree(draw)), 0.1).refusal for _ in range(150))
    assert fit > 30


def test_simplifying_changes_no_value() -> None:
    draw, sides = np.random.default_rng(1), sides_of(moderate("pairs", 12))
    for _ in range(100):
        tree = random_tree(draw)
        short = simplify(tree)
        assert short.size <= tree.size
        ours, theirs = Program(short).losses(sides, 0.1), Program(tree).losses(sides, 0.1)
        assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-3), to_python(tree)


def test_better_members_have_more_children_and_every_behaviour_has_some() -> None:
    members = [member(i, known("dpo"), -i, "usual" if i < 20 else "odd") for i in range(1, 21)]
    draw = np.random.default_rng(0)
    picked = [pick(Population(members), draw) for _ in range(400)]
    numbers = [one.number for one in picked if one is not None]
    assert sum(n <= 5 for n in numbers) > 2 * sum(6 <= n <= 19 for n in numbers) / 14 * 5
    assert numbers.count(20) > 40
    assert [one.number for one in best_by_behaviour(members)] == [1, 20]


def test_the_bandit_learns_who_succeeds_and_what_it_costs() -> None:
    def share(records: dict[str, Record], common: float) -> float:
        draw = np.random.default_rng(0)
        return sum(choose(records, common, draw) == "a" for _ in range(500)) / 500

    good, bad = Record(60, 100, 0.0), Record(10, 100, 0.0)
    assert share({"a": good, "b": bad}, 0.1) > 0.95
    assert 0.35 < share({"a": good, "b": good}, 0.1) < 0.65
    dear = Record(60, 100, 1.0)
    assert share({"a": dear, "b": Record(30, 100, 0.0)}, 0.1) < 0.05
    assert share({"a": dear, "b": Record(30, 100, 0.0)}, 100.0) > 0.95
