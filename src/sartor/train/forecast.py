"""What a run will cost: its passes counted from the data itself, timed or looked up by ``sartor.plan``."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Protocol, runtime_checkable

from sartor.config import AnsweringConfig, DpoConfig, PlanConfig, PpoConfig, TrainingConfig
from sartor.console import say
from sartor.data.trees import TokenIds, TokenTree, split_by_budget
from sartor.errors import UserError
from sartor.machine import available_memory, resident_memory, set_up_memory
from sartor.model.checkpointing import checkpoint_layers, layers_of
from sartor.model.load import LanguageModel, load_shape, pick_device
from sartor.model.tree_attention import scores_kept
from sartor.objectives.objective import Objective
from sartor.objectives.specs import parse_objective
from sartor.plan.devices import device_named
from sartor.plan.forecast import Forecast, Load, Place, Sampled, Smaller, Workload, forecast
from sartor.plan.shape import GIB, Group, Shape
from sartor.plan.words import one_line, warning
from sartor.rollout.local import Sampling
from sartor.train.loop import Plan, steps_of
from sartor.train.preferences import Preferences, encode, read_preferences
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch
from sartor.types import Text

PROCESS = 0.6 * GIB  # Python, torch and transformers, before any weights
GROWTH = (
    0.3 * GIB
)  # what a process on a CPU comes to hold besides: kernels for the shapes it met, the allocator's slack


Work = Callable[[int], Workload]  # what is left to do once so many steps are done


@runtime_checkable
class Data(Protocol):
    """Encoded examples: one tree each, what it answers, and the labels to spread evenly over an epoch, if any."""

    @property
    def trees(self) -> Sequence[TokenTree]: ...  # noqa: D102

    @property
    def prompts(self) -> Sequence[Text]: ...  # noqa: D102

    @property
    def labels(self) -> Sequence[Hashable]: ...  # noqa: D102


def announce(
    run: RunFolder,
    watch: Stopwatch,
    config: TrainingConfig,
    model: LanguageModel,
    work: Work,
    objective: Objective | None = None,
) -> None:
    """Say what the run will take, keep it for the end, and checkpoint as many layers as memory asks for."""
    done = next((step for step, _ in run.checkpoints()), 0)
    found = forecast_run(config, model, work, objective, done=done, elapsed=watch.total if done == 0 else 0.0)
    if isinstance(found, str):
        say(f"note    no forecast: {found}")
        checkpoint_layers(model, len(layers_of(model)) if config.checkpointing == "always" else 0)
        return
    checkpoint_layers(model, found.checkpointed)
    say(f"plan    {'what is left, ' * (done > 0)}{one_line(found)}")
    if wanting := warning(found):
        say(f"note    {wanting}")
    if run.read_json("forecast.json") is None and done == 0:
        run.write_json("forecast.json", found.record())


def workload(
    config: TrainingConfig,
    objective: Objective | None,
    training: Data,
    held_out: Data,
    fresh: Sequence[TokenTree],
    context: int | None = None,
    done: int = 0,
) -> Workload:
    """The passes of a run, but for the ``done`` steps. ``fresh`` are the trees whose reference is to be computed.

    Without an objective there is no reference either, and so no KL to measure.
    """
    budget = config.token_budget
    steps = steps_of(config.epochs, config.max_steps, len(training.trees), config.batch_size)
    plan = Plan(len(training.trees), config.batch_size, steps, config.seed, training.labels)
    every = config.eval_every or -(-steps // 4)
    evaluations = max(1, -(-steps // every) - done // every)  # the last one is made again on resuming
    groups = [g for step in range(done, steps) for g in _groups([training.trees[i] for i in plan.batch(step)], budget)]
    groups = groups or [training.trees[:1]]
    trained = _load(groups) if done < steps else Load()
    evaluated = _load(_groups(held_out.trees, budget)) * evaluations
    if objective and objective.needs_kl:
        evaluated += trained  # the rival's own pass
    if objective and objective.mixes and len(groups) > steps - done:
        evaluated += trained  # the first of two passes
    sampled = None
    if isinstance(config, AnsweringConfig) and (prompts := min(config.eval_prompts, len(set(held_out.prompts)))):
        room = max(1, min(config.max_length, (context or 2**31) - config.max_new_tokens))
        lengths = [min(room, len(tree.prompt)) for tree in held_out.trees]
        # Answers at every evaluation and at the start, which policy and reference then score; others, at the
        # temperature that people will see, before and after.
        measured = (evaluations + (done == 0)) * (objective is not None)
        shown = 0 if measured and config.temperature == 1 else 1 + (done == 0)
        answers = (shown + measured) * config.eval_samples * prompts
        rows = min(prompts * config.eval_samples, Sampling().batch_size)
        usual = sum(lengths) // len(lengths)
        sampled = Sampled(answers, rows, config.max_new_tokens, usual, max(lengths))
        answered = TokenTree((0,) * usual, ((0,) * config.max_new_tokens,) * config.eval_samples)
        evaluated += _load(_groups([answered] * prompts, budget)) * 2 * measured
        evaluated += _load(_groups([TokenTree((0,) * usual, ())] * prompts, budget)) * (shown + measured)
    return Workload(
        reference=_load(_groups(fresh, budget)),
        training=trained,
        evaluation=evaluated,
        steps=steps - done,
        largest=_neediest(groups),
        usual=_usual(groups),
        sampled=sampled,
        checkpoints=-(-steps // config.save_every) - done // config.save_every,
    )


def rollouts(
    config: PpoConfig | DpoConfig,
    prompts: Sequence[TokenIds],
    held_out: Sequence[TokenIds],
    looks: int,
    passes: int,
    updates: int,
    done: int = 0,
) -> Workload:
    """The passes of a run that learns from its own answers, but for the ``done`` rollouts.

    Answers are taken to be as long as they may be, so this is the most that it can take.

    Args:
        config: of the run.
        prompts: to train on.
        held_out: to measure on.
        looks: passes without a gradient over each rollout: of policy, reference, values, rewards.
        passes: passes with a gradient over it.
        updates: optimizer steps on it.
    """
    steps = steps_of(config.epochs, config.max_steps, len(prompts), config.batch_size)
    plan = Plan(len(prompts), config.batch_size, steps, config.seed, ())
    every = config.eval_every or -(-steps // 4)
    measured = max(1, -(-steps // every) - done // every) + (done == 0)

    def answered(ids: Sequence[TokenIds], n: int) -> list[TokenTree]:
        return [TokenTree(prompt, ((0,) * config.max_new_tokens,) * n) for prompt in ids]

    trees, budget = answered(prompts, config.samples), config.token_budget
    groups = [g for step in range(done, steps) for g in _groups([trees[i] for i in plan.batch(step)], budget)]
    measuring = _load(_groups(answered(held_out, config.eval_samples), budget)) * 2 * measured
    rolled = _load(groups) if done < steps else Load()
    groups = groups or [trees[:1]]
    lengths = [len(ids) for ids in (*prompts, *held_out)]
    answers = (steps - done) * config.batch_size * config.samples + measured * len(held_out) * config.eval_samples
    rows = min(config.batch_size * config.samples, Sampling().batch_size)
    return Workload(
        reference=Load(),
        training=rolled * passes,
        evaluation=rolled * looks + measuring,
        steps=(steps - done) * updates,
        largest=_neediest(groups),
        usual=_usual(groups),
        sampled=Sampled(answers, rows, config.max_new_tokens, sum(lengths) // len(lengths), max(lengths)),
        checkpoints=-(-steps // config.save_every) - done // config.save_every,
    )


def forecast_run(
    config: TrainingConfig,
    model: LanguageModel,
    work: Work,
    objective: Objective | None = None,
    *,
    done: int = 0,
    elapsed: float = 0.0,
) -> Forecast | str:
    """The forecast of a run whose model is loaded and whose data are encoded.

    Or why there is none: a model that cannot share prompts, or a shape that does not run without its weights. That is
    never a reason not to train.

    Args:
        config: of the run.
        model: as loaded.
        work: what it does after so many steps.
        objective: of preferences, where there is one.
        done: steps already taken.
        elapsed: seconds already spent.
    """
    if not model.shares_prompts:
        return "this model repeats prompts"
    weights = sum(p.nbytes for p in model.network.parameters())
    # On a GPU what counts is the device's memory, and only weights are in it.
    own = 0 if model.device.type == "cuda" else max(PROCESS, resident_memory() - weights) + GROWTH
    try:
        left = work(done)
        return forecast(
            cache(lambda rank: Shape(model.core.config, model.core.dtype, rank, model.device.type == "cuda")),
            config.lora_r,
            left,
            Place(None, own + rival(config, objective, weights), available_memory()),
            checkpointing=config.checkpointing,
            smaller=smaller(config, [tree for group in left.largest for tree in group]),
            tokenizer=model.tokenizer,
            elapsed=elapsed,
        )
    except Exception as error:  # whatever an unusual architecture raises on the way
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def plan_dpo(config: PlanConfig) -> Forecast:
    """``sartor plan dpo``: a forecast from the model's shape and the data, or from lengths alone.

    Raises:
        UserError: a shape, data or device that the user can mend.
    """
    if config.online:
        raise UserError(
            "plan dpo: what --online takes hangs on answers that are yet to be written: not foreseen so far"
        )
    set_up_memory(config.token_budget)  # as a run does
    device = None if config.device == "here" else device_named(config.device)
    if device and config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    objective = parse_objective(config.loss, config.beta, config.wpo, config.ld_alpha)
    model = load_shape(config.model, config.dtype)
    if config.data:
        if model.tokenizer is None:
            raise UserError(
                f"--model {config.model} has no tokenizer to measure --data with; leave --data out, and name "
                "--rows, --prompt-tokens and --answer-tokens"
            )
        training, held_out = (encode(model, part, config, objective) for part in read_preferences(config, objective))
    else:
        training, held_out = made_up(config, model.context)
    fresh = [*training.trees, *held_out.trees] if objective.needs_reference else held_out.trees
    weights = sum(p.nbytes for p in model.network.parameters())
    on_gpu = device is not None or pick_device().type == "cuda"
    own = 0.5 * GIB if device else 0 if on_gpu else max(PROCESS, resident_memory()) + GROWTH  # 0.5: a CUDA context
    try:
        return forecast(
            cache(lambda rank: Shape(model.core.config, model.core.dtype, rank, on_gpu)),
            config.lora_r,
            workload(config, objective, training, held_out, fresh, context=model.context),
            Place(device, own + rival(config, objective, weights), device.memory if device else available_memory()),
            checkpointing=config.checkpointing,
            smaller=smaller(config, training.trees),
            tokenizer=model.tokenizer,
        )
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--model {config.model}: this architecture cannot be planned: {reason}") from error


def rival(config: TrainingConfig, objective: Objective | None, weights: int) -> int:
    """Bytes of a second model, where the objective compares whole distributions and no adapter shares the weights."""
    return weights if objective and objective.needs_kl and not config.lora_r else 0


def made_up(config: PlanConfig, context: int | None = None) -> list[Preferences]:
    """Pairs of the lengths that the options name, for training and held out, cut as data would be.

    Raises:
        UserError: the answers alone do not fit.
    """
    longest = min(config.max_length, context or config.max_length)
    if config.answer_tokens >= longest:
        raise UserError(f"--answer-tokens {config.answer_tokens}: wanted fewer than the {longest} of --max-length")
    answers = ((0,) * config.answer_tokens,) * 2
    tree = TokenTree((0,) * min(config.prompt_tokens, longest - config.answer_tokens), answers, (1.0, 2.0))
    held_out = max(1, min(round(config.eval_fraction * config.rows), config.eval_limit or config.rows))
    counts = (max(1, min(config.rows - held_out, config.limit or config.rows)), held_out)
    return [Preferences([tree] * count, [str(i) for i in range(count)], []) for count in counts]


def smaller(config: TrainingConfig, trees: Sequence[TokenTree]) -> Callable[[], Iterator[Smaller]]:
    """Settings that need less memory, nearest first: smaller micro-batches, an adapter, both."""

    def settings() -> Iterator[Smaller]:
        longest = max(tree.size for tree in trees)
        budgets = [config.token_budget]
        while budgets[-1] // 2 >= longest:
            budgets.append(budgets[-1] // 2)
        for rank in dict.fromkeys((config.lora_r, config.lora_r or 16)):
            for size in budgets:
                adapter = [f"--lora-r {rank}"] if rank != config.lora_r else []
                cut = [f"--token-budget {size}"] if size != config.token_budget else []
                if adapter or cut:
                    yield " ".join(adapter + cut), rank, _neediest(_groups(trees, size))

    return settings


def _usual(groups: Sequence[Group]) -> list[Group]:
    """Micro-batches to time, the middle one by tokens first. Those at even places are timed forward, at odd places with
    the backward pass."""
    by_size = sorted(groups, key=lambda group: sum(tree.size for tree in group))
    places = dict.fromkeys(round(q * (len(by_size) - 1)) for q in (0.5, 0.4, 0.8, 0.9, 0.2, 0.1))
    found = [by_size[place] for place in places]
    return found if len(found) > 1 else found * 2


def _neediest(groups: Sequence[Group]) -> list[Group]:
    """The micro-batches that may need most memory: by tokens, by scores that attention keeps, by the longest tree."""
    by_tokens = max(groups, key=lambda group: sum(tree.size for tree in group))
    by_scores = max(groups, key=lambda group: sum(map(scores_kept, group)))
    by_longest = max(groups, key=lambda group: max(tree.size for tree in group))
    return list({id(group): group for group in (by_tokens, by_scores, by_longest)}.values())


def _groups(trees: Sequence[TokenTree], budget: int) -> list[Group]:
    return [[trees[i] for i in group] for group in split_by_budget([tree.size for tree in trees], budget)]


def _load(groups: Iterable[Group]) -> Load:
    return sum((Load.of(group) for group in groups), Load())
