"""Where candidates are tried: the model, the data and the features of one search, made once and shared by all.

A workbench is opened from a run folder alone, so a worker elsewhere opens the same one. What is dear is kept in the
folder: answers, reference log-probs, the linearised model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file

from sartor.config import DiscoverConfig, from_yaml
from sartor.console import progress
from sartor.discover.language.parse import parse
from sartor.discover.material import Material, Recipe, Truth
from sartor.discover.parts import read_part, scorer_of
from sartor.discover.rungs.adapter import Adapters
from sartor.discover.rungs.linear import Kernel, kernel_of, run_linear
from sartor.discover.rungs.outcome import Outcome, Setting
from sartor.errors import UserError
from sartor.model.forward import check
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.train.loop import default_learning_rate, steps_of
from sartor.train.run import RunFolder

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # every candidate chooses for itself from these ...
ANSWERS = 4  # to each held-out prompt, by which a candidate is judged; of fewer most of what is seen is noise
RATES = (1.0, 2.5, 6.0)  # ... and from these multiples of the default learning rate of an adapter


@dataclass(frozen=True)
class Job:
    """Some candidates to try on a rung. ``settings`` are those to train at, one for each; empty where the rung chooses.

    Candidates are texts of the language and not trees, so that a job is as easily sent elsewhere as kept.
    """

    rung: str
    candidates: tuple[int, ...]
    texts: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """A frozen model with a fresh adapter, and a fingerprint of what it computes."""

    model: LanguageModel
    weights: str

    @classmethod
    def load(cls, config: DiscoverConfig, name: str) -> "Base":
        """By its name or folder."""
        model = load(name, config.dtype, config.lora_r, None, config.seed)
        return cls(model, fingerprint(model))

    @property
    def rate(self) -> float:
        """The default learning rate of its adapter."""
        return default_learning_rate(self.model.parameters, lora=True)


class Workbench:
    """Opened from the run folder of a search; ``base`` and ``proxy`` are its own, where they are loaded already."""

    def __init__(self, folder: Path, base: Base | None = None, proxy: Base | None = None) -> None:
        self.run = RunFolder(folder)
        self._base, self._proxy = base, proxy
        self.config = DiscoverConfig(**{**from_yaml(folder / "config.yaml", DiscoverConfig), "output": folder})

    @cached_property
    def base(self) -> Base:
        """What winners are for: --model."""
        return self._base or Base.load(self.config, self.config.model)

    @cached_property
    def proxy(self) -> Base:
        """What is searched on: --proxy, and without one --model itself."""
        return self._proxy or (Base.load(self.config, self.config.proxy) if self.config.proxy else self.base)

    @cached_property
    def search(self) -> Material:
        """What candidates train on and are judged by."""
        return self._material("search", "search-held-out", self.proxy)

    @cached_property
    def retrial(self) -> Material:
        """The same for winners, and on the same model at the price of the search."""
        found = self._material("retrial", "retrial-held-out", self.base)
        if self.config.proxy or found.truth is None or self.search.truth is None:
            return found
        return replace(found, truth=replace(found.truth, price=self.search.truth.price))

    @cached_property
    def adapters(self) -> Adapters:
        """The one adapter that all candidates train."""
        return Adapters.fresh(self.search)

    @cached_property
    def adapters_of_retrial(self) -> Adapters:
        """The same on the retrial's data; without a proxy it is on the same network."""
        return Adapters.fresh(self.retrial) if self.config.proxy else replace(self.adapters, material=self.retrial)

    @cached_property
    def settings(self) -> list[Setting]:
        """What a candidate may choose from."""
        return [Setting(beta, rate * self.proxy.rate) for rate in RATES for beta in BETAS]

    def carried(self, setting: Setting) -> Setting:
        """What was chosen on the proxy as --model is trained: at the same β, with a rate that goes by size."""
        return replace(setting, learning_rate=setting.learning_rate * self.base.rate / self.proxy.rate)

    def execute(self, job: Job) -> list[Outcome]:
        """Try the candidates of a job, in their order."""
        trees = [parse(text) for text in job.texts]
        if job.rung == "linear":
            return run_linear(self.search, self.kernel, trees, self.settings)
        last = job.rung == "retrial"
        adapters = self.adapters_of_retrial if last else self.adapters
        settings = map(self.carried, job.settings) if last else job.settings
        return [adapters.run(tree, at, job.seed) for tree, at in zip(trees, settings, strict=True)]

    @cached_property
    def kernel(self) -> Kernel:
        """The linearised model on the search's two parts: from the folder, or computed and kept there."""
        path = self.run.path / "kernel.safetensors"
        if not path.is_file():
            self.adapters.reset(0)
            train, held_out = self.search.train, self.search.held_out
            with progress("linearising", train.first[-1] + held_out.first[-1]) as advance:
                found = kernel_of(
                    self.proxy.model, train.data.trees, held_out.data.trees, self.config.token_budget, advance
                )
            scratch = path.with_suffix(".partial")
            save_file({name: value.contiguous() for name, value in vars(found).items()}, scratch)
            scratch.rename(path)
        return Kernel(**load_file(path))

    def _material(self, train: str, held_out: str, base: Base) -> Material:
        config, model = self.config, base.model
        parts = [read_part(config, self.run, model, base.weights, name) for name in (train, held_out)]
        if model.shares_prompts is None:
            check(model, max((t for part in parts for t in part.data.trees), key=lambda tree: tree.size))
        items = len(parts[0].data.trees)
        recipe = Recipe(
            steps=steps_of(config.epochs, None, items, config.batch_size),
            batch_size=config.batch_size,
            warmup_ratio=0.1,
            schedule="cosine",
            max_grad_norm=1.0,
            token_budget=config.token_budget,
        )
        scorer, scored = scorer_of(config), parts[1].scored
        truth = None
        if scorer is not None and scored is not None:
            if not scored.price > 0:
                raise UserError(
                    f"--score {scorer}: it scores all held-out answers alike, so nothing could be told apart"
                )
            truth = Truth(scorer, scored.price, config.task != "preferences", ANSWERS, config.max_new_tokens)
        return Material(model, parts[0], parts[1], recipe, truth)


def job_of(
    rung: str, numbers: Sequence[int], texts: Sequence[str], settings: Sequence[Setting] = (), seed: int = 0
) -> Job:
    """A job of candidates by their numbers and texts."""
    return Job(rung, tuple(numbers), tuple(texts), tuple(settings), seed)
