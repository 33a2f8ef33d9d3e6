import math

import torch
from conftest import tiny_model

from sartor.data.trees import TokenTree, pack
from sartor.evaluate.answers import Answers, answers_of, compare, win_rate
from sartor.evaluate.diversity import distinct_n, self_bleu
from sartor.evaluate.on_policy import OnPolicy, look_at
from sartor.model.forward import token_logps
from sartor.rollout.local import Sampling, sample
from sartor.types import Message


def test_win_rate_counts_ties_half_and_prompts_once() -> None:
    found = win_rate([[0.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]])
    assert found.value == (0.75 + 0.0) / 2
    assert found.n == 2
    assert 0.0 <= found.low <= found.high <= 1.0


def test_kl_of_a_model_to_itself_is_zero_and_to_another_the_exact_sum(rng) -> None:
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    prompts = [tuple(rng.randrange(256) for _ in range(6)) for _ in range(300)]
    sampling = Sampling(max_new_tokens=1, seed=0)
    drawn = sample(policy, prompts, 1, sampling)
    assert look_at(policy, policy, prompts[:5], drawn[:5], token_budget=4096)[0] == [[0.0]] * 5

    kl, surprise = look_at(policy, reference, prompts, drawn, token_budget=4096)
    found = OnPolicy(answers_of(["p"] * 300, drawn), kl, surprise, {}).estimates()
    # Completions of one token: the KL is a sum over the vocabulary.
    trees = pack([TokenTree(prompt, tuple((w,) for w in range(261))) for prompt in prompts[:60]])
    with torch.no_grad():
        ours, theirs = (token_logps(model, trees).view(60, 261) for model in (policy, reference))
    exact = float((ours.exp() * (ours - theirs)).sum(1).mean())
    entropy = -float((ours.exp() * ours).sum(1).mean())
    assert found["objective/kl"].low - 0.05 < exact < found["objective/kl"].high + 0.05
    assert found["objective/kl"].low > 0
    assert found["completions/entropy"].low - 0.05 < entropy < found["completions/entropy"].high + 0.05


def test_comparison_without_scores_has_no_win_rate() -> None:
    before = Answers(["p"], [["a b", "a c"]], [[2, 2]])
    after = Answers(["p"], [["a b", "a b"]], [[2, 4]])
    found = compare(before, after)
    assert found["win_rate"] is None
    assert (found["distinct_2_before"].value, found["distinct_2_after"].value) == (1.0, 0.5)
    assert (found["length_before"].value, found["length_after"].value) == (2.0, 3.0)


def test_answers_survive_their_file() -> None:
    answers = Answers([(Message("user", "Hi"),), "plain"], [["a"], ["b"]], [[1], [1]], [[0.5], [0.1]])
    assert Answers.from_rows(answers.rows()) == answers


def test_distinct_n() -> None:
    assert distinct_n(["the cat", "The cat"], 2) == 0.5
    assert distinct_n([""], 2) == 0.0


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["a b c d e", "a b c d e"]) == 1.0
    # "a b c d" against "a b x d": precisions 3/4, 1/3, (1/2)/2, (1/4)/1 and no brevity penalty, both ways round.
    assert abs(self_bleu(["a b c d", "a b x d"]) - (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25) < 1e-12
    # One word against two: precision 1, brevity penalty exp(1 - 2); two against one: 1/2 and then (1/2)/1.
    assert abs(self_bleu(["a", "a b"]) - (math.exp(-1) + (1 / 2 * 1 / 2) ** 0.5) / 2) < 1e-12
    assert self_bleu(["", ""]) == 1.0
