"""What the screens say of a candidate before any training: unfit, the wrong way round, or an old acquaintance."""

import inspect
import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from sartor import plugins
from sartor.discover import screens
from sartor.discover.language.expression import Expression
from sartor.discover.language.known import CANARIES, KNOWN, known
from sartor.discover.language.parse import parse
from sartor.discover.language.printing import to_python
from sartor.discover.language.program import Program, as_term
from sartor.discover.screens import BETAS, FINE, SAME, Seen, curve_of, fingerprints, in_words, screen, stress_batches
from sartor.objectives import catalogue
from sartor.objectives.contract import STRESS
from sartor.objectives.objective import Term
from sartor.objectives.shape import MARGINS, Candidate, fingerprint, nearest, shape

BETA = 0.05  # of DiscoPOP's search
LINE = np.geomspace(0.005, 1, 300)  # β at which a loss is compared with DPO
# A part of the catalogue: to examine all of it takes as long as all of these tests.
PART = ("dpo", "cdpo", "robust", "dpo_davidson", "hinge", "ipo_sum", "simpo", "orpo", "padll", "aql", "cell", "lrml")


resolve = cache(partial(plugins.resolve, "losses"))


@cache
def hand_written(name: str, beta: float | None) -> Candidate:
    """A loss at one β, or at its own default; of a twin's tree, the traits are the twin's."""
    loss, traits = resolve(name), as_term(known(name if name in KNOWN else "dpo")).traits
    own = signature(name).get("beta")
    if own is not None:
        beta = own.default if beta is None else beta
        loss = partial(loss, beta=beta)
    term = Term(name, loss, 1.0, traits, None if own is None else beta)
    return Candidate(term, fingerprint(term))


@cache
def part_of_the_catalogue() -> tuple[Candidate, ...]:
    """As ``candidates()``, which has β up to 10."""
    betas = {name: (None, *catalogue.BETAS[:17]) if "beta" in signature(name) else (None,) for name in PART}
    return tuple(hand_written(name, beta) for name in PART for beta in betas[name])


def signature(name: str) -> Any:
    return inspect.signature(resolve(name)).parameters


@pytest.fixture(autouse=True, scope="module")
def _part_of_the_catalogue() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(screens, "candidates", part_of_the_catalogue)
        screens._catalogue.cache_clear()
        yield
    screens._catalogue.cache_clear()


@cache
def screened(text: str, beta: float = BETA) -> screens.Screened:
    return screen(tree_of(text), beta)


def tree_of(text: str) -> Expression:
    return known(text) if text in KNOWN or text in CANARIES else parse(text)


# -- refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zero", "its gradient is zero everywhere, so nothing would be learnt"),
        ("constant", "its gradient is zero everywhere, so nothing would be learnt"),
        ("detach(margin)", "its gradient is zero everywhere"),
        ("margin - mean(margin)", "its gradient is zero everywhere"),
        ("where(margin > 0, 1, 2)", "its gradient is zero everywhere"),
        ("inverted", r"its sign is wrong: within 10 nats it lowers 100 % of margins"),
        ("margin", "its sign is wrong"),
        ("log_sigmoid(beta * margin)", "its sign is wrong"),
        ("policy_chosen", "its sign is wrong"),
        ("-policy_rejected", "its sign is wrong"),
        ("beta", "it does not read what the policy says, so nothing would be learnt"),
        ("reference_chosen / chosen_length", "it does not read what the policy says"),
    ],
)
def test_what_teaches_nothing_or_the_opposite_is_refused(text: str, said: str) -> None:
    found = screened(text)
    assert re.search(said, found.refusal)
    assert found.likeness is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "square(square(square(square(margin))))",
            r"^its value is inf at β 1 in a batch of 64 in fp32, where policy_chosen 0, policy_rejected -10000, "
            r"reference_chosen -10000, reference_rejected -1000, chosen_length \d+, rejected_length \d+$",
        ),
        ("exp(exp(exp(exp(-margin))))", "its value is inf at β 1 in a batch of 64 in fp32, where policy_chosen"),
        ("exp(exp(exp(exp(-policy_chosen))))", "its value is inf .*, where policy_chosen -10000,"),
        # finite itself, but not on the way back: 0 times infinity
        (
            "sigmoid(square(square(square(square(square(margin))))))",
            "its weight is nan at β 1 in a batch of 64 in fp32",
        ),
        # (1 + 0.001) - 1 is 0 in bf16, and a division by it is one by 1e-6
        ("square(square(square(1 / (1 + 0.001 - 1)))) - margin", "its value is inf at β 1 in a batch of 64 in bf16"),
        # no spread in a batch of one, or of two equal margins
        ("square(square(square(1 / var(margin)))) - margin", "its value is inf at β 1 in a batch of [12] in fp32"),
        ("square(square(square(1 / beta))) * exp(1) - margin", None),
        ("square(square(square(square(beta * margin / 0.01)))) - margin", "at β 1 "),
        ("square(square(square(square(3 * beta * margin)))) - margin", "at β 1 "),
        ("square(square(square(square(5 / beta)))) - margin", None),
        ("square(square(square(square(20 / beta)))) - margin", "its value is inf at β 0.05 in a batch of 64 in fp32"),
    ],
)
def test_an_overflow_is_found_and_placed(text: str, said: str | None) -> None:
    refusal = screened(text).refusal
    assert re.search(said, refusal) if said else refusal == ""


@pytest.mark.parametrize("text", ["exp(-margin)", "exp(exp(-margin))", "exp(-policy_chosen)", "1 / margin - margin"])
def test_what_overflows_elsewhere_is_finite_here(text: str) -> None:
    """An exponential goes on as its tangent, and a division is guarded: fit to train, and no luck."""
    assert screened(text).refusal == ""


def test_every_size_and_precision_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    weights = Program.weights

    def noted(self: Program, sides: dict[str, torch.Tensor], beta: Any) -> Any:
        seen.add((sides["policy_chosen"].shape[-1], sides["policy_chosen"].dtype, tuple(beta.flatten().tolist())))
        return weights(self, sides, beta)

    monkeypatch.setattr(Program, "weights", noted)
    precisions = {torch.float32, torch.bfloat16}
    # Where pairs do not depend on each other the largest batch says it all.
    for name, sizes in {"dpo": (64,), "bco_pair": (64, 2, 1)}.items():
        seen.clear()
        assert screen(known(name), BETA).refusal == ""
        stressed = {(size, precision) for size, precision, betas in seen if len(betas) == 2}
        assert stressed == {(size, precision) for size in sizes for precision in precisions}
        assert {max(betas) for _, _, betas in seen} == {1.0}


def test_stress_holds_every_combination_of_the_extremes() -> None:
    sides = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    large, two, one = stress_batches()
    assert [batch["policy_chosen"].shape[-1] for batch in (large, two, one)] == [64, 2, 1]
    combinations = {tuple(row) for row in torch.stack([large[side].flatten() for side in sides], 1).tolist()}
    assert len(combinations) == len(STRESS) ** 4
    assert {float(x) for x in large["chosen_length"].unique()} == {1, 2, 60, 5000}


# -- accepted


def test_every_loss_of_the_catalogue_passes() -> None:
    rows = FINE + len(BETAS)
    for name in KNOWN:
        found = screened(name)
        assert found.refusal == "", name
        assert found.fingerprints.shape[0] == rows
        torch.testing.assert_close(found.fingerprints.norm(dim=1), torch.ones(rows))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("simpo", "without a reference: its unused inputs have no gradient, which failed there"),
        ("orpo", "likewise"),
        ("-log_sigmoid(margin - 0.1 * reference_chosen)", "one reference input unused, as in their log"),
        ("mean(-log_sigmoid(beta * margin))", "a mean instead of one loss a pair, as three in their log"),
        ("relu(beta * (mean(policy_chosen) - policy_chosen)) - beta * margin", "a batch statistic, at size 1"),
    ],
)
def test_what_discopop_had_to_turn_away_is_fit(text: str, why: str) -> None:
    assert screened(text).refusal == "", why


def test_a_mean_over_the_batch_trains_as_the_losses_do() -> None:
    one, other = screened("mean(-log_sigmoid(beta * margin))"), screened("dpo")
    torch.testing.assert_close(one.fingerprint, other.fingerprint)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cell", "lrml", "aqfl"])
def test_a_fingerprint_is_that_of_the_hand_written_loss(name: str) -> None:
    """At the β of the screen, at small steps above it up to the next wide one, and at all wide ones."""
    step = BETAS[1] / BETAS[0]
    betas = (*(BETA * step ** (i / FINE) for i in range(FINE)), *BETAS)
    found = screened(name)
    assert torch.equal(found.fingerprint, found.fingerprints[0])
    for beta, row in zip(betas, found.fingerprints, strict=True):
        meant = torch.from_numpy(hand_written(name, beta).fingerprint)
        torch.testing.assert_close(row.double(), meant, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["dpo", "ipo_sum", "cell", "lrml"])
def test_the_slope_of_a_fingerprint_is_that_of_its_drawing(text: str) -> None:
    slope, rising = curve_of(screened(text))
    drawn = shape(as_term(known(text), beta=BETA))
    assert rising == drawn.convex
    assert np.sign(slope) == np.sign(drawn.slope)
    unit = np.abs(drawn.chosen + drawn.rejected)[np.isin(drawn.margin, MARGINS)].max() / 2
    steepest = float((screened(text).fingerprint.view(2, len(MARGINS), -1).sum(0) / 2)[:, 2].abs().max())
    assert slope / steepest == pytest.approx(drawn.slope / unit, rel=1e-3)


# -- old acquaintances


@cache
def dpo_along_a_line() -> torch.Tensor:
    return fingerprints(Program(known("dpo")), LINE.tolist())


def nearest_dpo(text: str) -> tuple[float, float]:
    """The β at which DPO is most like it, and the cosine."""
    cosines = dpo_along_a_line() @ screened(text).fingerprint
    return float(LINE[int(cosines.argmax())]), float(cosines.max())


@pytest.mark.parametrize(
    ("text", "beta", "cosine"),
    [
        ("-log_sigmoid(beta * margin - 0.1)", 0.0495, 1.0000),
        ("-log_sigmoid(beta * margin / 2)", 0.0247, 1.0000),
        ("dbaql", 0.056, 1.0000),
        ("cell", 0.070, 0.9989),
        ("softplus(-(beta * margin)) ** 2", 0.110, 0.9985),
        ("padll", 0.019, 0.974),
        ("hinge", 0.055, 0.936),
        ("aql", 0.039, 0.932),
        ("lrml", None, 0.75),
    ],
)
def test_near_duplicates_are_those_that_were_found_before(text: str, beta: float | None, cosine: float) -> None:
    """The table of the research notes, 1.5: there over the margin alone, here over common shifts and lengths too."""
    best, likeness = nearest_dpo(text)
    assert likeness == pytest.approx(cosine, abs=2e-4 if cosine > 0.99 else 5e-3)
    if beta is not None:
        assert best == pytest.approx(beta, rel=0.07)


def test_cell_is_nearly_dpo() -> None:
    """By its name it is itself; without itself, DPO at about β 0.07, short of being the same."""
    found = screened("cell")
    assert (found.likeness.name, found.likeness.beta) == ("cell", pytest.approx(BETA, rel=0.02))
    assert found.likeness.cosine >= screens.SAME
    only_dpo = [one for one in part_of_the_catalogue() if one.term.name == "dpo"]
    likeness = nearest(as_term(known("cell"), "cell", BETA), only_dpo)
    assert likeness.beta == pytest.approx(0.07, rel=0.1)
    assert likeness.cosine == pytest.approx(0.9985, abs=2e-4)


@pytest.mark.parametrize(
    ("text", "beta", "at"),
    [
        ("dpo", 0.1, 0.1),
        ("-3 * log_sigmoid(beta * margin)", 0.1, 0.1),
        ("softplus(-(beta * margin)) / 7 + 2", 0.1, 0.1),
        ("-log_sigmoid(2 * beta * margin)", 0.05, 0.1),
        ("-log_sigmoid(margin)", 0.05, 1.0),
        ("-log_sigmoid(0.01 * margin)", 0.3, 0.01),
        ("log(1 + exp(-(beta * margin)))", 1.0, 1.0),
    ],
)
def test_dpo_in_disguise_is_named_with_its_beta(text: str, beta: float, at: float) -> None:
    found = screened(text, beta)
    assert found.likeness.cosine >= screens.SAME
    assert found.likeness.name == "dpo"
    assert found.likeness.beta == pytest.approx(at, rel=0.01)
    assert found.likeness.cosine == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("text", ["dpo", "-3 * log_sigmoid(beta * margin)"])
def test_dpo_is_dpo_between_the_betas_of_the_catalogue(text: str) -> None:
    for beta in (0.02, 0.03, 0.07, 0.2, 0.6):
        found = screened(text, beta)
        assert found.likeness.cosine >= screens.SAME
        assert found.likeness.name == "dpo"
        assert found.likeness.beta == pytest.approx(beta, rel=0.15)


def test_what_a_loss_exactly_is_goes_before_the_plain_one() -> None:
    """Ties in Davidson's model at twice the β: with none in the data the same as DPO, which the catalogue has not."""
    found = screened("dpo", 0.05)
    assert (found.likeness.name, found.likeness.beta) == ("dpo_davidson", pytest.approx(0.1))
    assert found.likeness.cosine == pytest.approx(1.0, abs=1e-6)


def test_a_loss_of_the_catalogue_is_itself_at_the_beta_of_the_screens() -> None:
    """Among them cousins of DPO, which are the same as it at some β."""
    for name in set(PART) & set(KNOWN):
        found = screened(name, 0.1)
        assert found.likeness.cosine >= screens.SAME
        assert found.likeness.name == name
        assert found.likeness.beta in (None, pytest.approx(0.1))
        assert found.likeness.cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("name", "beta"), [("ipo_sum", 0.05), ("cell", 0.2), ("lrml", 0.2), ("padll", 0.2)])
def test_between_the_betas_of_the_catalogue_a_loss_may_fall_short_of_itself(name: str, beta: float) -> None:
    """They are a third apart there: nearest is the loss at the next β, too far to be the same."""
    found = screened(name, beta)
    assert found.likeness.name == name
    assert found.likeness.beta == pytest.approx(beta, rel=0.15)
    assert 0.995 < found.likeness.cosine < SAME
    assert found.likeness.cosine < screens.SAME


def test_another_loss_is_not_known() -> None:
    found = screened("-log_sigmoid(beta * margin) + 0.02 * relu(-chosen_logratio)")
    assert found.refusal == ""
    assert found.likeness.cosine < screens.SAME
    assert found.likeness.cosine < SAME


# -- seen before


def test_a_candidate_that_comes_again_is_recognised_at_another_beta() -> None:
    seen = Seen()
    assert seen.twin(screened("cell")) is None
    seen.add(3, screened("hinge"))
    seen.add(7, screened("cell"))
    seen.add(8, screened("lrml", 0.1))
    for text, beta, number in (
        ("cell", BETA, 7),
        ("cell", 0.2, 7),
        ("5 * exp(-(2 * beta * margin)) + 5 * softplus(-(2 * beta * margin))", 0.1, 7),
        ("hinge", 0.5, 3),
        ("relu(20 - margin)", 0.3, 3),
        ("lrml", 0.1, 8),
        ("lrml", 1.0, 8),
    ):
        found = seen.twin(screened(text, beta))
        assert found is not None, (text, beta)
        assert found[0] == number
        assert SAME <= found[1] < 1 + 1e-5
    for text in ("ipo_sum", "simpo", "aql", f"({KNOWN['dpo']}) - 0.02 * policy_chosen"):
        assert seen.twin(screened(text)) is None


@pytest.mark.parametrize("text", ["dpo", "cell", "simpo", "softplus(-(beta * margin)) ** 2"])
def test_a_candidate_is_recognised_at_any_beta(text: str) -> None:
    """The earlier one is kept at wide steps of β, the new one asked at small ones: every ratio of the two is met."""
    seen = Seen()
    seen.add(7, screened(text))
    for beta in np.geomspace(0.01, 1.0, 12).tolist():
        found = seen.twin(screened(text, beta))
        assert found is not None, beta
        assert found[0] == 7


@pytest.mark.parametrize(
    ("text", "beta"), [("hinge", 0.038), ("hinge", 0.083), ("hinge", 0.261), ("aql", 0.083), ("aqfl", 0.038)]
)
def test_a_candidate_is_recognised_at_its_own_beta(text: str, beta: float) -> None:
    """A kink moves from one point of the grid to the next within a small step, which tells the two apart."""
    seen = Seen()
    seen.add(3, screened("dpo", beta))
    seen.add(7, screened(text, beta))
    assert seen.twin(screened(f"3 * ({to_python(known(text))}) + 1", beta)) == (7, pytest.approx(1.0, abs=1e-5))


def test_of_two_that_are_alike_the_earlier_is_named() -> None:
    seen = Seen()
    seen.add(4, screened("dpo"))
    seen.add(5, screened("softplus(-(beta * margin)) / 7 + 2"))
    assert seen.twin(screened("-3 * log_sigmoid(beta * margin)")) == (4, pytest.approx(1.0, abs=1e-5))


def test_sketches_overlook_nothing() -> None:
    """Of all pairs of the catalogue at all β, those that are alike are near in their sketches too."""
    rows = torch.cat([screened(name).fingerprints for name in KNOWN])
    sketches = rows @ screens._projection()
    alike = rows @ rows.T >= SAME
    assert int(alike.sum()) > 2 * len(rows)
    far = torch.cdist(sketches, sketches).square() >= 4 * 2 * (1 - SAME)
    assert not (alike & far).any()


def test_what_has_no_gradient_is_like_nothing() -> None:
    seen = Seen()
    seen.add(1, screened("zero"))
    for text in ("zero", "constant", "dpo", "inverted"):
        assert seen.twin(screened(text)) is None


def test_what_is_refused_is_like_nothing() -> None:
    seen = Seen()
    seen.add(1, screened("dpo"))
    for number, text in enumerate(("square(square(square(square(margin))))", "beta", "inverted", "zero"), start=2):
        seen.add(number, screened(text))
        assert seen.twin(screened(text)) is None
    assert seen.twin(screened("dpo")) == (1, pytest.approx(1.0, abs=1e-6))


# -- in words


def test_in_words_of_lrml() -> None:
    """Where training lowers the margin, by the paper's own numbers: from z/τ = -2.37 to 1.44, with τ = β."""
    words = in_words(known("lrml"), BETA)
    (lowers,) = [line for line in words if line.startswith("lowers")]
    low, high = map(float, re.fullmatch(r"lowers the margin from (\S+) to (\S+) nats", lowers).groups())
    assert low == pytest.approx(-2.3714, abs=0.1)
    assert high == pytest.approx(1.4402, abs=0.1)
    assert "convex: no" in words
    assert words[0] == "slope at margin 0: +0.0392"  # 0.784 in z
    assert [line for line in words if line.startswith("at margin 0:")] == [
        "at margin 0: pulls chosen up by -0.0392, rejected down by -0.0392"
    ]


def test_in_words_of_dpo() -> None:
    assert in_words(known("dpo"), BETA) == [
        "slope at margin 0: -0.025",
        "convex: yes",
        "never lowers the margin",
        "at margin -20: pulls chosen up by 0.0366, rejected down by 0.0366",
        "at margin 0: pulls chosen up by 0.025, rejected down by 0.025",
        "at margin 20: pulls chosen up by 0.0134, rejected down by 0.0134",
    ]
