"""The command line: verbs, thin. Results go to standard output, everything else to standard error."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from sartor import __version__
from sartor.config import (
    CompareConfig,
    DemoConfig,
    DiscoverConfig,
    DpoConfig,
    LossesConfig,
    PlanConfig,
    PpoConfig,
    RewardConfig,
    RlhfConfig,
    SampleConfig,
    SftConfig,
    from_yaml,
)
from sartor.errors import UserError, unknown

HELP = f"""sartor {__version__}: alignment of language models, made to measure

  sartor demo      the whole road in ten minutes: a real model before and after it was fitted to preferences
  sartor dpo       fit a model to your comparisons or rankings, with evidence
  sartor sft       fit a model to demonstrations, corrections or plain text
  sartor reward    train a reward model on comparisons or rankings, or measure one
  sartor ppo       maximise a reward under a KL leash: PPO, RLOO, GRPO
  sartor rlhf      the three steps in one: demonstrations, reward model, reinforcement, in rounds
  sartor compare   DPO or RLHF? both on the same feedback: reward, distance, variety and cost
  sartor discover  search for a better objective: invented, raced on cheap rungs, tried again where it never was
  sartor plan      what a run would take: time, memory, FLOPs, without weights or device
  sartor losses    the catalogue of objectives: formulas, needs, shapes, and what yours is like
  sartor sample    answer prompts with a model

Each verb has its own --help, takes --config FILE.yaml with the same names, and --debug for a traceback.
"""

PLAN_HELP = """sartor plan VERB OPTIONS: what a run would take, before it runs

  sartor plan dpo --model M --data D [any option of dpo]     on this machine, timed for a few seconds
  sartor plan dpo --model FOLDER --device h100               from a config.json alone, for a device that is not here

The verb's own options mean what they mean there; `sartor plan dpo --help` shows them all.
"""

# What these options are called in TRL and transformers.
KNOWN_ELSEWHERE = {
    "lr": "learning-rate",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "token-budget",
    "gradient-checkpointing": "checkpointing always",
    "model-name-or-path": "model",
    "dataset-name": "data",
    "output-dir": "output",
    "loss-type": "loss",
    "loss-weights": "loss dpo:1.0 sft:0.1",
    "label-smoothing": "loss cdpo,label_smoothing=0.1",
    "simpo-gamma": "loss simpo,gamma=1.0",
    "cpo-alpha": "loss cpo,nll_weight=1.0",
    "desirable-weight": "loss kto,desirable_weight=1.0",
    "undesirable-weight": "loss kto,undesirable_weight=1.0",
    "f-divergence-type": "loss dpo_js",
    "use-weighting": "wpo",
    "lr-scheduler-type": "schedule",
    "save-steps": "save-every",
    "eval-steps": "eval-every",
    "warmup-steps": "warmup-ratio",
    "num-generations": "n, or --samples of ppo",
    "num-ppo-epochs": "ppo-epochs",
    "num-mini-batches": "minibatches",
    "cliprange": "clip",
    "cliprange-value": "value-clip",
    "missing-eos-penalty": "missing-end-penalty",
    "response-length": "max-new-tokens",
    "reward-model": "reward",
    "reward-model-path": "reward",
    "reward-funcs": "reward",
    "center-rewards-coefficient": "center",
}
KINDS = {"FLOAT": "a number", "INT": "a whole number"}
SHOW_HELP = """sartor discover show ID --output RUN

Explains a candidate of the search in RUN, by its number (12), the name of a known loss (dpo), or the name of its loss
file (found_12): its formula, where it comes from, why it was refused or what it is most like, its score on each rung
with its interval, and what it does to the gradients. Reads beside a search that runs."""
RESUMES = "; --resume goes on from the last checkpoint"
GOES_ON = {
    "dpo": RESUMES,
    "sft": RESUMES,
    "reward": RESUMES,
    "ppo": RESUMES,
    "rlhf": RESUMES,
    "compare": RESUMES,
    "discover": RESUMES,
    "demo": "; the same command goes on from there",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command ``sartor``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        sys.exit(_run(arguments))
    except BrokenPipeError:  # the reader of our output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"sartor: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"sartor: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        output, _ = _take(arguments, "--output")
        begun = arguments[0] == "demo" or (output is not None and (Path(output) / "config.yaml").is_file())
        how = GOES_ON.get(arguments[0], "") if begun else " before anything was written"
        print(f"sartor: stopped{how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"sartor: a fault of Sartor's own, please report it with the output of --debug: {text}", file=sys.stderr)
        sys.exit(1)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("--version", "version"):
        print(f"sartor {__version__}")
        return 0
    verbs: dict[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "dpo": _dpo,
        "sft": _sft,
        "reward": _reward,
        "ppo": _ppo,
        "rlhf": _rlhf,
        "compare": _compare,
        "discover": _discover,
        "plan": _plan,
        "losses": _losses,
        "sample": _sample,
    }
    if arguments[0] not in verbs:
        raise unknown("verb", arguments[0], verbs)
    verbs[arguments[0]](arguments[1:])
    return 0


# Options are parsed before torch is imported: a slip of the pen should be told at once.


def _demo(arguments: list[str]) -> None:
    config = parse("demo", DemoConfig, arguments)
    from sartor.demo import run_demo

    print(run_demo(config, _command("demo", arguments)).closing_lines())


def _dpo(arguments: list[str]) -> None:
    config = parse("dpo", DpoConfig, arguments)
    from sartor.train.dpo import train_dpo

    print(train_dpo(config, command=_command("dpo", arguments)).closing_lines())


def _sft(arguments: list[str]) -> None:
    config = parse("sft", SftConfig, arguments)
    from sartor.train.sft import train_sft

    print(train_sft(config, command=_command("sft", arguments)).closing_lines())


def _reward(arguments: list[str]) -> None:
    config = parse("reward", RewardConfig, arguments)
    from sartor.train.reward import train_reward

    print(train_reward(config, command=_command("reward", arguments)).closing_lines())


def _ppo(arguments: list[str]) -> None:
    config = parse("ppo", PpoConfig, arguments)
    from sartor.train.ppo import train_ppo

    print(train_ppo(config, command=_command("ppo", arguments)).closing_lines())


def _rlhf(arguments: list[str]) -> None:
    config = parse("rlhf", RlhfConfig, arguments)
    from sartor.train.rlhf import run_rlhf

    print(run_rlhf(config, command=_command("rlhf", arguments)))


def _compare(arguments: list[str]) -> None:
    config = parse("compare", CompareConfig, arguments)
    from sartor.compare.experiment import run_compare

    print(run_compare(config, command=_command("compare", arguments)))


def _discover(arguments: list[str]) -> None:
    if arguments[:1] == ["show"]:
        return _show(arguments[1:])
    config = parse("discover", DiscoverConfig, arguments)
    from sartor.discover.command import run_discover

    print(run_discover(config, command=_command("discover", arguments)))
    return None


def _show(arguments: list[str]) -> None:
    output, rest = _take(arguments, "--output")
    if {"-h", "--help"} & {*rest}:
        return print(SHOW_HELP)
    if len(rest) != 1 or output is None or rest[0].startswith("-"):
        raise UserError("discover show: wanted sartor discover show ID --output RUN")
    from sartor.discover.command import show

    return show(rest[0], Path(output))


def _plan(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(PLAN_HELP, end="")
        return
    if arguments[0] != "dpo":
        raise unknown("verb to plan", arguments[0], ["dpo"])
    config = parse("plan dpo", PlanConfig, arguments[1:])
    from sartor.plan.words import table, warning
    from sartor.train.forecast import plan_dpo

    found = plan_dpo(config)
    print(table(found))
    if found_wanting := warning(found):
        print(f"\n{found_wanting}")


def _losses(arguments: list[str]) -> None:
    config = parse("losses", LossesConfig, arguments)
    from sartor.objectives.command import run_losses

    run_losses(config)


def _sample(arguments: list[str]) -> None:
    config = parse("sample", SampleConfig, arguments)
    from sartor.rollout.command import run_sample

    run_sample(config)


def _command(verb: str, arguments: list[str]) -> str:
    return shlex.join(["sartor", verb, *(a for a in arguments if a != "--resume")])


def parse(verb: str, config: type, arguments: Sequence[str]) -> Any:
    """Fill a verb's dataclass: from the run to resume, then ``--config``, then the command line, the last one winning.

    Raises:
        UserError: an option that is unknown, missing or of the wrong type, in one line.
    """
    file, rest = _take(list(arguments), "--config")
    output, _ = _take(rest, "--output")
    known: dict[str, Any] = {}
    if "--resume" in rest and output:
        if not (Path(output) / "config.yaml").is_file():
            raise UserError(f"--resume: {output} holds no run (no config.yaml); leave --resume out to start one")
        known |= from_yaml(Path(output) / "config.yaml", config)
    if file:
        known |= from_yaml(Path(file), config)
    _refuse_unknown(config, rest)
    needed = [f.name for f in dataclasses.fields(config) if f.default is f.default_factory is dataclasses.MISSING]
    asks_help = "-h" in rest or "--help" in rest
    missing = [name for name in needed if name not in known and not _given(rest, name)]
    if missing and not asks_help:
        wanted = " ".join(f"--{name} {name.upper()}" for name in needed)
        raise UserError(f"{verb}: missing {', '.join('--' + name for name in missing)}; wanted: sartor {verb} {wanted}")
    defaults = dict.fromkeys(needed, tyro.MISSING) | known
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                prog=f"sartor {verb}",
                args=rest,
                default=_unchecked(config, defaults),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{verb}: {_one_line(said.getvalue())}") from None


def _unchecked(config: type, values: dict[str, Any]) -> Any:
    """An instance whose required fields may still be missing, so that its checks must wait for the real one."""
    instance: Any = object.__new__(config)
    for f in dataclasses.fields(config):
        setattr(instance, f.name, values.get(f.name, f.default))
    return instance


def _take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument == option:
            if i + 1 == len(arguments):
                raise UserError(f"{option}: wanted a path after it")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _given(arguments: Sequence[str], name: str) -> bool:
    option = "--" + name.replace("_", "-")
    return any(a.split("=")[0].replace("_", "-") == option for a in arguments)


def _refuse_unknown(config: type, arguments: Sequence[str]) -> None:
    fields = {f.name.replace("_", "-"): str(f.type) for f in dataclasses.fields(config)}
    known = {"help", *fields, *(f"no-{name}" for name, kind in fields.items() if "bool" in kind)}
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").replace("_", "-")
        if argument.startswith("--") and name not in known:
            near = [KNOWN_ELSEWHERE[name]] if name in KNOWN_ELSEWHERE else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}? " if near else ""
            raise UserError(f"unknown option --{name}: {hint}see --help for all")


def _one_line(box: str) -> str:
    """tyro's framed message as one line: of several readings that failed, the last one says what was wanted."""
    text = " ".join(re.sub(r"[─│╭╮╰╯]|-{5,}", " ", box).split())
    text = re.sub(r"^(Parsing error|Value error|Missing argument)\s*", "", text)
    text = text.split(" Argument helptext:")[0].split(" For full ")[0]
    if found := re.match(r"Error parsing (--\S+): .* (int\(\)|float).*: ('.*')", text):
        return f"{found[1]} {found[3]}: wanted {KINDS['INT' if found[2] == 'int()' else 'FLOAT']}"
    if found := re.match(r"Error parsing (--\S+): no type matching (\S+) could be instantiated from \[(.*?)\]", text):
        return f"{found[1]} {found[3]}: wanted {KINDS.get(found[2].split('|')[-1], found[2])}"
    return text
