"""What follows from the archive of a search."""

from pathlib import Path

import numpy as np
import pytest

from sartor.discover.archive import Archive, Candidate
from sartor.discover.language.known import CANARIES
from sartor.discover.language.parse import parse
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.discover.state import CANARY, NAMED, State

PROMPTS, CANDIDATES = 16, 60


@pytest.fixture
def judged(tmp_path: Path):
    """A state with candidates on both rungs, by their fitness on the linear one, their true one and the noise of it."""

    def make(linear: np.ndarray, true: np.ndarray, noise: float) -> State:
        state = State(Archive(tmp_path / "archive.sqlite"), 0.1)
        draw, easy = np.random.default_rng(0), np.random.default_rng(1).normal(size=PROMPTS)
        tree = parse("softplus(-(beta * margin))")
        with state.archive.writing():
            state.add(Candidate(i + 1, 1, "random", "", (), tree, "text") for i in range(len(true)))
            for i, (below, above) in enumerate(zip(linear, true, strict=True), start=1):
                seen = above + easy + noise * draw.normal(size=PROMPTS)
                state.record("linear", [i], [Outcome(Setting(0.1, 1e-4), (float(below),))])
                state.record("adapter", [i], [Outcome(Setting(0.1, 1e-4), tuple(seen.tolist()))])
        return state

    return make


def test_what_shows_no_noise_is_taken_as_it_stands(judged) -> None:
    draw = np.random.default_rng(2)
    state = judged(draw.normal(size=CANDIDATES), draw.normal(size=CANDIDATES), noise=0.0)
    for number, expected in state.expected().items():
        assert expected == pytest.approx(state.results["adapter", number].fitness, abs=1e-6)


def test_what_is_noise_alone_is_taken_from_the_rung_below(judged) -> None:
    state = judged(np.linspace(0, 1, CANDIDATES), np.zeros(CANDIDATES), noise=3.0)
    expected = np.array(list(state.expected().values()))
    shown = np.array([state.results["adapter", n].fitness for n in state.on("adapter")])
    assert expected.std() < 0.5 * shown.std()


def test_expectation_is_nearer_to_the_truth_than_what_was_shown(judged) -> None:
    draw = np.random.default_rng(3)
    true = 0.3 * draw.normal(size=CANDIDATES)
    state = judged(true + 0.3 * draw.normal(size=CANDIDATES), true, noise=1.6)  # noise of the means: 0.4
    easy = np.random.default_rng(1).normal(size=PROMPTS).mean()
    expected = np.array([state.expected()[n] for n in state.on("adapter")]) - easy
    shown = np.array([state.results["adapter", n].fitness for n in state.on("adapter")]) - easy
    assert np.square(expected - true).mean() < 0.6 * np.square(shown - true).mean()


def test_of_those_that_train_alike_the_shortest_is_shown(tmp_path: Path) -> None:
    state = State(Archive(tmp_path / "archive.sqlite"), 0.1)
    long, short = parse("softplus(-(beta * margin)) + 0 * beta"), parse("softplus(-(beta * margin))")
    values = {1: (0.5, 0.1), 2: (0.504, 0.096), 3: (0.5, 0.2), 4: (-np.inf, -np.inf)}
    trees = {1: long, 2: short, 3: long, 4: short}
    with state.archive.writing():
        state.add(Candidate(n, 1, "random", "", (), tree, "text") for n, tree in trees.items())
        for n, scores in values.items():
            state.record("linear", [n], [Outcome(Setting(0.1, 1e-4), scores)])
    assert state.kinds() == {1: 1, 2: 1, 3: 3, 4: 4}
    assert state.shortest() == {1: 2, 2: 2, 3: 3, 4: 4}
    assert [member.number for member in state.population().members] == [3, 2, 4]


@pytest.mark.parametrize(("zero", "believed"), [(0.15, True), (0.2, False), (0.5, False)])
def test_a_canary_as_good_as_half_of_the_known_losses_is_a_fault(tmp_path: Path, zero: float, believed: bool) -> None:
    state = State(Archive(tmp_path / "archive.sqlite"), 0.1)
    tree = parse("softplus(-(beta * margin))")
    scores = {"dpo": 0.4, "ipo": 0.3, "hinge": 0.2, "sft": 0.1, "zero": zero, "inverted": -0.2}
    with state.archive.writing():
        for n, (name, score) in enumerate(scores.items(), start=1):
            origin = CANARY if name in CANARIES else NAMED
            state.add([Candidate(n, 0, origin, name, (), tree, "text")])
            state.record("linear", [n], [Outcome(Setting(0.1, 1e-4), (score, score))])
    words = {0.2: "no worse than 2 of 4", 0.5: "no worse than 4 of 4"}
    expected = [] if believed else [f"on the linear rung the canary zero is {words[zero]} known losses"]
    assert state.faults() == expected
