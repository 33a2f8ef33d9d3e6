"""The linear rung against finite differences, against the sum that it abbreviates, and against really training."""

import random

import pytest
import torch
from conftest import random_tree, tiny_model

from sartor.data.trees import TokenTree
from sartor.discover.language.known import known
from sartor.discover.language.program import Program
from sartor.discover.material import Material, Part, Recipe
from sartor.discover.rungs.adapter import Adapters, branch_logps
from sartor.discover.rungs.linear import ADAM, Kernel, gradients, kernel_of, run_linear, train
from sartor.discover.rungs.many import pulls
from sartor.discover.rungs.outcome import Scored, Setting
from sartor.model.load import LanguageModel, adapt
from sartor.model.reference import score_trees
from sartor.train.preferences import Preferences


def adapted(name: str = "llama") -> LanguageModel:
    plain = tiny_model(name)
    return LanguageModel(adapt(plain.network, 4, 8, 0).eval(), plain.tokenizer, name)


def trees(count: int, seed: int = 0) -> list[TokenTree]:
    rng = random.Random(seed)
    return [random_tree(rng, prompt=6, branches=rng.choice([2, 3])) for _ in range(count)]


def part(model: LanguageModel, some: list[TokenTree]) -> Part:
    prompts = [f"prompt {i}" for i in range(len(some))]
    with model.without_adapter():
        reference = [logps.clone() for logps in score_trees(model, some)]
    return Part(Preferences(some, prompts, [], reference))


@pytest.fixture(scope="module")
def material() -> Material:
    model = adapted()
    recipe = Recipe(steps=6, batch_size=3, warmup_ratio=0.1, schedule="cosine", max_grad_norm=1.0, token_budget=256)
    return Material(model, part(model, trees(9)), part(model, trees(8, seed=1)), recipe)


@pytest.fixture(scope="module")
def adapters(material: Material) -> Adapters:
    return Adapters.fresh(material)


@pytest.fixture
def kernel(material: Material, adapters: Adapters) -> Kernel:
    adapters.reset(0)
    train_on, held_out = material.train.data.trees, material.held_out.data.trees
    return kernel_of(material.model, train_on, held_out, material.recipe.token_budget)


@pytest.mark.parametrize("road", ["llama", "gemma2", "llama, plain"])
def test_gradients_are_what_a_small_step_does(road: str) -> None:
    model, some = adapted(road.split(",")[0]), trees(3)
    if "plain" in road:
        model.shares_prompts = False
    features = gradients(model, some, token_budget=40)[0].float()
    assert model.shares_prompts is ("plain" not in road)
    named = [(name, p) for name, p in model.network.named_parameters() if "lora_B" in name]
    draw = torch.Generator().manual_seed(0)
    steps = [0.01 * torch.randn(p.shape, generator=draw) for _, p in named]

    def logps(scale: float) -> torch.Tensor:
        with torch.no_grad():
            for (_, parameter), step in zip(named, steps, strict=True):
                parameter.copy_(scale * step)
        flat = torch.cat(score_trees(model, some))
        return torch.stack([tokens.sum() for tokens in flat.split([n for tree in some for n in tree.counts])])

    slope = (logps(0.1) - logps(-0.1)) / 0.2
    # Layers by layers, each with its rank first.
    ours = features @ torch.cat([step.t().flatten() for step in steps])
    assert torch.allclose(ours, slope, rtol=0.02, atol=0.003)


def test_fewer_coordinates_stand_for_all() -> None:
    model, some, others = adapted(), trees(6), trees(4, seed=1)
    features, step = gradients(model, [*some, *others], token_budget=256)
    whole = kernel_of(model, some, others, 256)
    part = kernel_of(model, some, others, 256, room=features.numel())  # for half of the coordinates, in bf16
    assert (step, gradients(model, [*some, *others], 256, room=features.numel())[1]) == (1, 2)
    for name in ("moves", "norms", "squares"):
        ours, theirs = getattr(part, name).flatten(), getattr(whole, name).flatten()
        assert float(ours @ theirs / (theirs @ theirs)) == pytest.approx(1.0, abs=0.15), name
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.9, name


@pytest.mark.parametrize("normalised", [False, True])
def test_inner_products_train_as_the_sum_that_they_abbreviate(
    material: Material, kernel: Kernel, normalised: bool
) -> None:
    """θ itself, moved by Adam with a preconditioner of its own: φ's root mean square and one running number."""
    model, data, recipe = material.model, material.train, material.recipe
    both = [*data.data.trees, *material.held_out.data.trees]
    features = gradients(model, both, recipe.token_budget)[0].float()
    count = data.first[-1]
    scale = features[:count].square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    prompt = torch.tensor([i for i, tree in enumerate(material.held_out.data.trees) for _ in tree.branches])
    by_prompt = [features[count:][prompt == i] for i in range(int(prompt.max()) + 1)] if normalised else []
    setting, program = Setting(0.2, 1e-3), Program(known("lrml"))
    theta, momentum, square = torch.zeros(features.shape[1]), torch.zeros(features.shape[1]), 0.0
    for step, batch in enumerate(data.batches(recipe, seed=0), start=1):
        # F·θ: the covariance of φ among the answers to a prompt, averaged over prompts.
        spreads = [phi - phi.mean(0) for phi in by_prompt]
        moved = sum((x.t() @ (x @ theta) / (len(x) - 1) / len(spreads) for x in spreads), torch.zeros_like(theta))
        rows = features[batch.branches] - moved
        logratios = features[batch.branches] @ theta - theta @ moved / 2
        pulled = pulls([program], batch, logratios[None, None], torch.tensor([setting.beta]))[0, 0]
        gradient = pulled @ rows
        gradient = gradient * min(1.0, recipe.max_grad_norm / (float(gradient.norm()) + 1e-6))
        momentum = ADAM[0] * momentum + (1 - ADAM[0]) * gradient / scale
        square = ADAM[1] * square + (1 - ADAM[1]) * float((gradient / scale).square().mean())
        rate = setting.learning_rate * recipe.rates(1.0).at(step - 1)
        theta -= rate * momentum / (1 - ADAM[0] ** step) / (square / (1 - ADAM[1] ** step)) ** 0.5
    drawn = Scored(torch.zeros(len(prompt)), prompt) if normalised else None
    shares = train(material, kernel, [program], [setting], drawn)[0, 0]
    assert torch.allclose(kernel.moves @ shares, features @ theta, rtol=1e-3, atol=1e-4)


def test_it_foretells_what_training_does(material: Material, kernel: Kernel, adapters: Adapters) -> None:
    settings, held_out = [Setting(0.5, 5e-4)], material.held_out
    for name in ("dpo", "sft", "lrml"):
        shares = train(material, kernel, [Program(known(name))], settings)[0, 0]
        foretold = kernel.moves[material.train.first[-1] :] @ shares
        adapters.train(known(name), settings[0], seed=0)
        moved = branch_logps(material.model, held_out, material.recipe.token_budget) - held_out.reference
        assert float(torch.corrcoef(torch.stack([foretold, moved]))[0, 1]) > 0.9, name
        assert 0.5 < float(foretold.norm() / moved.norm()) < 2, name


def test_many_at_once_are_as_one_by_one(material: Material, kernel: Kernel) -> None:
    settings = [Setting(beta, rate) for beta in (0.1, 1.0) for rate in (1e-4, 1e-3)]
    some = [known(name) for name in ("dpo", "hinge", "bco_pair", "simpo")]
    together = run_linear(material, kernel, some, settings)
    for tree, outcome in zip(some, together, strict=True):
        (alone,) = run_linear(material, kernel, [tree], settings)
        assert alone.setting == outcome.setting
        assert alone.values == pytest.approx(outcome.values, abs=1e-5)
        assert alone.measures == pytest.approx(outcome.measures, abs=1e-4)


def test_an_adapter_starts_anew_and_a_seed_is_another_start(adapters: Adapters) -> None:
    setting = Setting(0.1, 1e-3)
    first, again, other = (adapters.run(known("dpo"), setting, seed) for seed in (0, 0, 1))
    assert first.values == again.values
    assert first.measures == again.measures
    assert first.measures["margin"] != other.measures["margin"]
    assert adapters.run(known("zero"), setting).measures["margin"] == pytest.approx(0.0, abs=1e-4)
