"""``sartor reward --evaluate``: is a reward right about comparisons that it never saw?

The reward is a reward model's, or with ``--implicit`` that of a policy: β·(log π - log π_ref) is the reward that DPO
optimises without naming it (Rafailov et al. 2023, arXiv 2305.18290, equation 5 without Z(x)).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from peft import PeftConfig

from sartor.config import RewardConfig
from sartor.console import progress, say
from sartor.data.rows import limited
from sartor.data.trees import TokenTree, split_by_budget
from sartor.errors import UserError
from sartor.evaluate.rewards import ScoredTrees
from sartor.machine import machine, peak_memory_gib, set_up_memory
from sartor.model.forward import check
from sartor.model.heads import check_rewards, load_reward_model, score_rewards
from sartor.model.load import LanguageModel, fingerprint, load
from sartor.model.reference import score_trees
from sartor.model.resolve import resolve
from sartor.report.page import write_report
from sartor.train.preferences import Preferences, digest, encode, read_source
from sartor.train.reward import reward_headline, reward_objective
from sartor.train.run import RunFolder
from sartor.train.stopwatch import Stopwatch


def evaluate_reward(config: RewardConfig, command: str) -> RunFolder:
    """Measure a reward on all of ``--data`` and write the report.

    Raises:
        UserError: input that the user can mend.
    """
    run, watch = RunFolder(config.output), Stopwatch()
    run.check(config)
    set_up_memory(config.token_budget)
    objective = reward_objective(("bradley_terry",))
    with watch.stage("load"):
        rows = limited(read_source(config.data, config.split, config, objective), config.limit, config.seed)
        model = load(config.model, config.dtype) if config.implicit else load_reward_model(config.model, config.dtype)
        reference = load(_reference(config), config.dtype) if config.implicit else None
        data = encode(model, rows, config, objective)
        for note in data.notes:
            say(f"note    {note}")
        run.open(config, {"model": fingerprint(model), "data": digest(data)}, command)
    with watch.stage("score"), progress("rewards", len(data.trees)) as advance:
        if reference is None:
            check_rewards(model, max(data.trees, key=lambda tree: tree.size))
            found = score_rewards(model, data.trees, config.token_budget, advance)
        else:
            found = implicit_rewards(model, reference, data.trees, config.beta, config.token_budget, advance)
    _write(run, watch, config, model, data, ScoredTrees(data.trees, found, data.prompt_numbers), command)
    return run


def _reference(config: RewardConfig) -> str:
    """The model that a policy started from.

    Raises:
        UserError: nobody says which, or the tokens of the two are not the same.
    """
    if config.reference is not None:
        return config.reference
    path = resolve(config.model, lambda gguf, folder: None)
    if (path / "adapter_config.json").is_file():
        return str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    raise UserError(f"--implicit: {config.model} does not say what it started from; name it with --reference MODEL")


def implicit_rewards(
    policy: LanguageModel,
    reference: LanguageModel,
    trees: Sequence[TokenTree],
    beta: float,
    token_budget: int,
    progress: Callable[[int], None] = lambda trees: None,
) -> list[list[float]]:
    """β·(log π(y|x) - log π_ref(y|x)) of each branch of each tree.

    Raises:
        UserError: the two models do not share a vocabulary.
    """
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserError(f"--reference {reference.name}: its vocabulary is not that of {policy.name}")
    longest = max(trees, key=lambda tree: tree.size)
    for model in (policy, reference):
        check(model, longest)
    found: list[list[float]] = [[] for _ in trees]
    for group in split_by_budget([tree.size for tree in trees], token_budget):
        batch = [trees[i] for i in group]
        ours, theirs = score_trees(policy, batch), score_trees(reference, batch)
        for i, tree, log_p, log_q in zip(group, batch, ours, theirs, strict=True):
            found[i] = [beta * float(ratio.sum()) for ratio in (log_p - log_q).split(tree.counts)]
        progress(len(group))
    return found


def _write(
    run: RunFolder,
    watch: Stopwatch,
    config: RewardConfig,
    model: LanguageModel,
    data: Preferences,
    scored: ScoredTrees,
    command: str,
) -> None:
    evaluation = scored.evaluation()
    run.write_json("evaluation.json", evaluation)
    run.write_json("margins.json", {"step": 0, "margins": [pair.margin for pair in scored.pairs]})
    what = f"the implicit reward of {config.model}, β {config.beta:g}" if config.implicit else config.model
    summary = {
        "verb": "reward --evaluate",
        "title": f"{what[0].upper()}{what[1:]} on {Path(config.data).name}",
        "headline": reward_headline(evaluation["accuracy"], f"{data.size} of {Path(config.data).name}", held_out=False),
        "evaluation": evaluation,
        "data": {"eval": f"{data.size} in {len(data.trees)} rows of {config.data}", "notes": data.notes},
        "cost": {
            "seconds": sum(watch.seconds.values()),
            "stages": [{"name": name, "seconds": round(value, 1)} for name, value in watch.seconds.items()],
            "peak_memory_gib": round(peak_memory_gib(), 2),
        },
        "machine": {**machine(), "dtype": str(model.core.dtype).removeprefix("torch.")},
        "command": command,
    }
    run.write_json("summary.json", summary)
    write_report(run.path)
