"""``sartor discover``: a search from its data to its verdict, and ``show``, which explains any candidate of one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sartor import plugins
from sartor.config import DiscoverConfig, from_yaml, to_yaml
from sartor.config.discover import seconds_of
from sartor.console import duration, progress, say
from sartor.discover.archive import Archive
from sartor.discover.budget import BASELINES, Budget, Clock, kept_budget, make_budget
from sartor.discover.cluster import Cluster, import_ray
from sartor.discover.language.known import CANARIES, KNOWN
from sartor.discover.language.program import BETA
from sartor.discover.parts import PARTS, in_words, rows_given, scorer_of, write_parts
from sartor.discover.propose.grammar import WAYS, Grammar
from sartor.discover.propose.proposal import Proposer
from sartor.discover.race import Race
from sartor.discover.results import best_so_far, describe, linear_unit, results, score_of, spent_in_words
from sartor.discover.runner import Local, Runner
from sartor.discover.source import loss_name, loss_source
from sartor.discover.state import State
from sartor.discover.workbench import Base, Workbench
from sartor.errors import UserError, unknown
from sartor.machine import machine, set_up_memory
from sartor.report.discovery import write_discovery
from sartor.rewards.scoring import score_texts
from sartor.train.run import RunFolder

if TYPE_CHECKING:
    from sartor.discover.propose.endpoint import Endpoint, Exchange

FREE = ("budget", "workers", "ray_address", "endpoint", "endpoint_key", "max_tokens", "max_cost")
MODEL = "model"
FULL = 0.98  # bits per pair, of at most 1: where known losses are beyond it, nothing can be shown to be better


def run_discover(config: DiscoverConfig, command: str = "") -> str:
    """Run a search, or go on with one; returns what the user reads last.

    Raises:
        UserError: input that the user can mend; nothing that was found is lost.
    """
    run = RunFolder(config.output)
    run.check(config, may_change=FREE)
    if config.resume and run.finished and not _is_longer(config, run):
        return _told(run)
    endpoint = _checked(config)
    set_up_memory(config.token_budget)
    base = Base.load(config, config.model)
    proxy = Base.load(config, config.proxy) if config.proxy else base
    with run.alone():
        weights = {"model": base.weights} | ({"proxy": proxy.weights} if config.proxy else {})
        run.open(config, weights, command)
        run.write_text("config.yaml", to_yaml(config))  # with what a resumed search was given anew
        return _search(config, run, endpoint, base, proxy)


def _is_longer(config: DiscoverConfig, run: RunFolder) -> bool:
    """Whether a finished search is to go on, since its budget ended before its plan did.

    Raises:
        UserError: its winners were judged already, so that nothing is left that could judge others.
    """
    if seconds_of(config.budget) <= seconds_of(run.read_json("discovery.json")["budget"]):
        return False
    archive = Archive(run.path / "archive.sqlite", reads_only=True)
    budget, arms = kept_budget(archive), len(archive.read_meta("finalists") or []) + len(BASELINES)
    if budget is not None and 0 < budget.seeds * arms <= archive.count("retrial"):
        raise UserError(
            f"--resume: the search in {run.path} is finished and its winner judged; a longer one would choose by what "
            "judged it, so start a new one in another --output"
        )
    return True


def _search(config: DiscoverConfig, run: RunFolder, endpoint: "Endpoint | None", base: Base, proxy: Base) -> str:
    archive = Archive(run.path / "archive.sqlite", shared=config.ray_address is not None)
    proposers: list[Proposer] = [Grammar(name) for name in config.proposer if name != MODEL]
    if endpoint is not None:
        proposers.append(_language_model(endpoint, archive))
    clock = Clock(config, archive)
    say(f"search  {_searched(config)}")
    bench = Workbench(config.output, base, proxy)
    loaded = {config.model: base.model, config.proxy: proxy.model}
    _charged(archive, "answers", lambda: write_parts(config, run, loaded))
    began = time.perf_counter()
    _charged(archive, "reference and kernel", lambda: bench.kernel)
    if config.seeds:
        _charged(archive, "reference of the retrial", lambda: bench.retrial)
    parts = [bench.search.train, bench.search.held_out]
    say(f"shared  {in_words(dict(zip(PARTS, parts, strict=False)), time.perf_counter() - began)}")
    unit = score_of(config)["unit"]
    if unit != linear_unit(config):
        unit += f" where it was really trained, elsewhere {linear_unit(config)}"
    state = State(archive, BETA, unit)
    if clock.left < 0 and not state.on("adapter"):
        raise UserError(
            f"--budget {config.budget}: answers, reference and kernel took {duration(clock.total - clock.left)}; "
            "--resume goes on with a longer --budget; fewer --prompts or shorter answers take less"
        )
    runner = _runner(config, bench)
    try:
        _race(config, state, runner, proposers, clock, bench)
    finally:
        runner.close()
    about = {"machine": machine(), "command": run.read_json("identity.json")["command"]}
    found = results(config, state)
    _write_losses(run, state, found, bench)
    run.write_json("discovery.json", {**found, **about})
    write_discovery(run.path)
    return _told(run)


def _race(
    config: DiscoverConfig, state: State, runner: Runner, proposers: Sequence[Proposer], clock: Clock, bench: Workbench
) -> None:
    """The start, the plan, the race and the retrial."""
    race = Race(config, state, runner, proposers)
    known = len({*config.start, *(BASELINES if config.seeds else ())}) + len(CANARIES)
    with progress("known losses", known) as advance:
        advance(len(set(state.started()) & set(state.on("adapter"))))
        race.told = lambda rung: advance(rung == "adapter", best_so_far(state))
        race.begin(clock)
    for fault in state.faults():
        say(f"note    {fault}: unless that changes, nothing that is found can be believed")
    best = max(state.results["adapter", n].fitness for n in state.started())
    if bench.search.truth is None and best > FULL:
        say(f"note    known losses are at {best:.3g} of at most 1 bit: these data leave nothing to be better by")
    budget = _planned(race, bench)
    say(f"plan    {budget}{'' if config.candidates else f' of {config.budget}'}")
    if state.archive.read_meta("finalists") is None:
        _new_candidates(race, budget, clock)
    finalists = race.finalists()
    if budget.seeds and finalists:
        say(f"retrial {', '.join(state.candidates[n].title for n in finalists)} with {budget.seeds} fresh seeds")
        arms = len(finalists) + len(BASELINES)
        with progress("retrial", budget.seeds * arms) as advance:
            advance(state.archive.count("retrial"))
            race.told = lambda rung: advance(1)
            race.retry(budget, clock)


def _planned(race: Race, bench: Workbench) -> Budget:
    """The plan: made once, and anew where a search goes on with another budget and no winner was judged yet."""
    config, state, archive = race.config, race.state, race.state.archive
    spent = sum(archive.spent().values())
    budget = kept_budget(archive)
    if budget is None:
        budget = make_budget(config, _unit_costs(state, bench), spent)
    elif budget.given != config.budget and not archive.count("retrial"):
        done = (len(set(state.on(rung)) - set(state.started())) for rung in ("linear", "adapter"))
        budget = make_budget(config, race.unit(budget), spent, *done)
    else:
        return budget
    with archive.writing():
        archive.forget_meta("finalists")
        archive.write_meta("budget", budget.record())
    return budget


def _new_candidates(race: Race, budget: Budget, clock: Clock) -> None:
    """The race itself.

    Raises:
        UserError: nobody had anything to propose.
    """
    state = race.state
    with progress("search", budget.linear) as advance:
        done = [0]

        def told(rung: str) -> None:
            new = sum(state.candidates[n].generation > 0 for n in state.on("linear"))
            left = "" if clock.left == float("inf") else f", {duration(max(0.0, clock.left))} left"
            advance(new - done[0], f"{best_so_far(state)}{left}")
            done[0] = new

        race.told = told
        race.run(budget, clock)
    if race.fruitless:
        say("note    nothing new came in five generations, so no more was asked for")
    given_up = [f"{name}: {proposer.exhausted}" for name, proposer in race.proposers.items() if proposer.exhausted]
    for why in given_up:
        say(f"note    {why}")
    if given_up and set(state.on("linear")) == set(state.started()):
        raise UserError(f"nothing new was tried, since --proposer {'; '.join(given_up)}; --resume goes on")


def _unit_costs(state: State, bench: Workbench) -> dict[str, float]:
    """Seconds of one candidate by rung, from the known losses; not from canaries, of which some need no training."""
    unit, canaries = {}, set(state.canaries())
    for rung in ("tabular", "linear", "adapter"):
        # The first one on a rung pays for memory and kernels, so the middle one is the usual one.
        unit[rung] = median(state.results[rung, n].seconds for n in set(state.on(rung)) - canaries)
    if not bench.config.seeds:
        return unit | {"retrial": 0.0}
    there, here = bench.retrial, bench.search
    sides = ((there.train, here.train), (there.held_out, here.held_out))
    more = max(1.0, *(len(new.data.trees) / len(old.data.trees) for new, old in sides))
    larger = bench.base.model.parameters / bench.proxy.model.parameters
    return unit | {"retrial": unit["adapter"] * more * larger}


def _charged(archive: Archive, what: str, work: Callable[[], Any]) -> None:
    began = time.perf_counter()
    work()
    with archive.writing():
        archive.spend(what, time.perf_counter() - began)


def _checked(config: DiscoverConfig) -> "Endpoint | None":
    """What can be found wrong before anything is written or slow; the endpoint, where one is asked for.

    Raises:
        UserError: a name that is not known, a scorer that fails, Ray missing, or an endpoint that does not answer.
    """
    for name in config.proposer:
        if name not in (*WAYS, MODEL):
            raise unknown("proposer", name, (*WAYS, MODEL))
    for name in config.start:
        if name not in KNOWN:
            raise unknown("loss to start with", name, KNOWN)
    if scorer := scorer_of(config):
        score_texts(plugins.resolve("rewards", scorer), ["Is it well?"], ["It is."])
    if config.workers:
        import_ray()
    if config.task == "preferences" and not config.resume:
        rows_given(config)  # read again once there is a folder to keep them in
    if config.endpoint is None or config.endpoint_model is None:
        return None
    from sartor.discover.propose.endpoint import Endpoint  # the client takes a while to import

    endpoint = Endpoint(
        base_url=config.endpoint,
        model=config.endpoint_model,
        key_variable=config.endpoint_key,
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
        price_in=config.price_in,
        price_out=config.price_out,
    )
    endpoint.check()
    return endpoint


def _language_model(endpoint: "Endpoint", archive: Archive) -> Proposer:
    """The proposer that asks an endpoint, with what was spent on it before."""
    from sartor.discover.propose.model import ModelProposer

    def keep(exchange: "Exchange") -> int:
        with archive.writing():
            return archive.keep_exchange(asdict(exchange))

    before = archive.exchanges()
    tokens = sum(exchange["tokens_in"] + exchange["tokens_out"] for exchange in before)
    return ModelProposer(endpoint, keep, tokens, sum(exchange["cost"] for exchange in before))


def _runner(config: DiscoverConfig, bench: Workbench) -> Runner:
    return Cluster(config) if config.workers else Local(bench)


def _searched(config: DiscoverConfig) -> str:
    about = f"--data {config.data}" if config.data else f"task {config.task}"
    model = f"{config.proxy} for {config.model}" if config.proxy else config.model
    time = f"budget {duration(seconds_of(config.budget))} of device time"
    much = f"{config.candidates:,} candidates, whatever they take" if config.candidates else time
    return f"{about}, on {model}, by {', '.join(config.proposer)}; {much}"


def _write_losses(run: RunFolder, state: State, found: dict[str, Any], bench: Workbench) -> None:
    """``losses/NAME.py`` of every finalist, with or without a retrial."""
    folder = run.path / "losses"
    folder.mkdir(exist_ok=True)
    for number in state.archive.read_meta("finalists") or []:
        candidate, outcome = state.candidates[number], state.results["adapter", number]
        name = loss_name(candidate)
        source = loss_source(candidate, bench.carried(outcome.setting), found["said"][candidate.title])
        RunFolder(folder).write_text(f"{name}.py", source)


def _told(run: RunFolder) -> str:
    found = run.read_json("discovery.json")
    losses = sorted((run.path / "losses").glob("*.py"))
    lines = ["", *found["headline"], "", f"time    {spent_in_words(found['spent'])}"]
    lines += [f"loss    --loss {path}:{path.stem}" for path in losses]
    return "\n".join([*lines, f"report  {run.path / 'report.html'}"])


def show(number: str, output: Path) -> None:
    """Explain one candidate of a search.

    Raises:
        UserError: no search there, or no such candidate.
    """
    archive = Archive(output / "archive.sqlite", reads_only=True)
    config = DiscoverConfig(**{**from_yaml(output / "config.yaml", DiscoverConfig), "output": output})
    state = State(archive, BETA)
    wanted = number.lstrip("#")
    known = {str(n): n for n in state.candidates} | {loss_name(c): n for n, c in state.candidates.items()}
    known |= {c.name: n for n, c in state.candidates.items() if c.name}
    if not known:
        raise UserError(f"{output}: no candidate yet, the search is still at its answers and features")
    if wanted not in known:
        raise UserError(f"{output}: no candidate {number!r}; wanted 1 to {max(state.candidates, default=0)}, or a name")
    for line in _explained(config, state, describe(state, known[wanted])):
        print(line)


def _explained(config: DiscoverConfig, state: State, one: dict[str, Any]) -> list[str]:
    def called(number: int) -> str:
        return f"#{number} {state.candidates[number].name}".rstrip()

    units = {"tabular": "of the optimum's gain", "linear": linear_unit(config), "adapter": score_of(config)["unit"]}
    lines = [called(one["number"]), "", f"  {one['formula']}", ""]
    parents = ", ".join(map(called, one["parents"]))
    lines.append(f"origin      {one['origin']}{f' of {parents}' if parents else ''}, generation {one['generation']}")
    if one["thought"]:
        lines.append(f"thought     {one['thought']}")
    if one["refusal"]:
        lines.append(f"refused     {one['refusal']}")
    if one["twin"]:
        lines.append(f"same as     {called(one['twin'])}, cosine {one['cosine']:.4f}")
    if one["likeness"]:
        lines.append(f"most like   {one['likeness']}")
    for rung in ("tabular", "linear", "adapter"):
        if one[rung] is not None:
            lines.append(f"{rung:11} {one[rung]} {units[rung]}")
    if one["setting"]:
        lines.append(f"trained at  {one['setting']}")
    lines += [f"            {words}" for words in one.get("words", [])]
    return lines
