"""Tiny random models made on the spot, and the one real model."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3NextConfig,
)

from sartor.data.trees import TokenTree
from sartor.discover import screens
from sartor.model.load import LanguageModel
from sartor.objectives import catalogue
from sartor.objectives.shape import Candidate, fingerprint

# Several tests run at once, each in a worker: they and what they start share the cores instead of fighting for them.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

VOCABULARY = 261  # bytes, and five special tokens
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Rewards that an untrained model can learn to earn: even letters, and many of them.
SCORER = """
def even(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(letter) % 2 == 0 for letter in text) / max(1, len(text)) for text in texts]

def length(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(text)) for text in texts]

def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)
"""
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def _shape() -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_shape()),
    "qwen3": lambda: Qwen3Config(**_shape(), head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **_shape(),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(**_shape(), head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=256, eos_token_id=257
    ),
    "mixtral": lambda: MixtralConfig(**_shape(), num_local_experts=4),
    "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, eos_token_id=257),
    "qwen3_next": lambda: Qwen3NextConfig(
        **{**_shape(), "num_hidden_layers": 4},
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    ),
}
PACKED = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral"]
RECURRENT = ["mamba", "qwen3_next"]


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte; <|end|> closes a turn and is EOS."""
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(name: str = "llama", seed: int = 0) -> LanguageModel:
    """A random fp32 model whose weights are large enough that its log-probs differ visibly from token to token."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return LanguageModel(network, byte_tokenizer(), name)


def random_tree(rng: random.Random, prompt: int, branches: int, longest: int = 12) -> TokenTree:
    tokens = lambda n: tuple(rng.randrange(256) for _ in range(n))  # noqa: E731
    ranks = tuple(range(1, branches + 1))
    return TokenTree(tokens(prompt), tuple(tokens(rng.randint(1, longest)) for _ in range(branches)), ranks)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, as a user's own would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is sure of its next word: adapters cannot move one whose words are all alike to it."""
    folder = tmp_path_factory.mktemp("models") / "sharp"
    model = tiny_model()
    with torch.no_grad():
        model.network.lm_head.weight *= 8
    model.save(folder)
    return folder


@pytest.fixture
def rollouts(sharp_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Options under which a tiny model learns from its own answers in some rollouts; ``scorer.py`` is beside them."""
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(24)))
    return {
        "model": str(sharp_folder),
        "data": str(tmp_path / "prompts.txt"),
        "output": tmp_path / "run",
        "eval_fraction": 0.25,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "dtype": "float32",
        "lora_r": 4,
        "batch_size": 6,
        "samples": 4,
        "max_new_tokens": 6,
        "eval_samples": 4,
    }


def metrics(run: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a run's training or of its evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="session")
def few_known_losses() -> Iterator[None]:
    """Searches look for likeness to two losses only: under the type checker the whole catalogue takes a minute."""
    terms = [term for name in ("dpo", "hinge") for term in catalogue._at_many_betas(catalogue.entry(name).term)]
    some = tuple(Candidate(term, fingerprint(term)) for term in terms)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(screens, "candidates", lambda: some)
        screens._catalogue.cache_clear()
        yield
    screens._catalogue.cache_clear()


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or fills the user's cache, but for the real model, which is fetched once."""
    if "real" not in request.keywords:
        monkeypatch.setenv("SARTOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is not here: these tests run in the project's own workplace only")
    return SHARED_DATA
