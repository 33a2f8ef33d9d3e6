"""Training steps of Sartor beside TRL 1.16, as shipped and tuned: same rows, same order, speed, memory and agreement.

usage: python benchmarks/preference_step.py [--peer PYTHON] [--cases full,lora] [--contenders sartor,trl] [--quick]

Every contender is a fresh process, and they take turns, so that a machine that drifts drifts for all. TRL runs in an
environment of its own (benchmarks/.peers/trl, made on first use, or the interpreter that --peer names); what each of
its contenders sets stands in peers/trl_steps.py. Loss and gradient norm of every step are compared with tuned TRL's:
where they differ by more than rounding the exit code is 1. Raw numbers and the plot go to benchmarks/results/.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from safetensors.torch import save_file

from sartor.config import DpoConfig
from sartor.data.chat import encode_preferences
from sartor.data.formats import load_examples
from sartor.data.trees import TokenTree
from sartor.errors import UserError, unknown
from sartor.machine import machine
from sartor.model.heads import new_reward_model
from sartor.model.load import LanguageModel, load
from sartor.train.loop import Plan
from sartor.types import Comparison, Message, Ranking

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
CONTENDERS = ("sartor", "trl-tuned", "trl-small", "trl", "trl-pure")
LORA = {"lora_r": 16, "lora_alpha": 32}
LONG_PROMPT, SHORT_ANSWER, RANKED = 400, 60, 4
# Largest relative difference of any step from tuned TRL. In bf16 the first step agrees to 0.3 %. The next ones depend
# on which updates are too small for the bf16 copy of a weight, and there TRL's own precisions differ by 3 % from
# each other. That it is rounding and nothing else shows in fp32 (--dtype float32).
TOLERANCE = {
    "bfloat16": {"first_norm": 0.02, "loss": 0.1, "grad_norm": 0.1},
    "float32": {"first_norm": 1e-3, "loss": 1e-3, "grad_norm": 1e-3},
}
# A reward's gradient comes from one number an answer, which bf16 knows to some 0.05: on three batches of two rankings
# its norm was off by up to 6 % from fp32's down the packed road, 0.4 % down the plain one (in fp32 both agree).
REWARD_NORM = 0.08


@dataclass
class Options:
    """What to measure."""

    peer: str | None = None
    """Python of an environment with TRL 1.16 and peft in it."""
    model: str = "smollm2"
    data: str = str(DATA / "hh-rlhf/harmless-base-2000.jsonl.gz")
    """Comparisons, in any form that sartor reads."""
    rankings: str = str(DATA / "oasst/en_100_tree.jsonl.gz")
    """Open-Assistant trees."""
    cases: str = "full,lora,long,reward,ranking,sft"
    contenders: str = "sartor,trl-tuned,trl-small,trl"
    """Also trl-pure: see peers/trl_steps.py."""
    rounds: int = 1
    """How often each contender has its turn."""
    warm_up: int = 1
    """Steps that are compared but not timed."""
    steps: int = 2
    batch_size: int = 8
    ranking_batch_size: int = 2
    """Prompts per step where each has four ranked answers, and so six pairs."""
    max_length: int = 512
    by_length: bool = False
    """Batches of rows of like length, for all contenders: the least padding that TRL can have."""
    dtype: str = "bfloat16"
    """float32 shows that both take the same steps, and times nothing that anyone would do."""
    token_budget: int = DpoConfig.token_budget
    memory_gib: float = 22.0
    """TRL takes a batch in parts only where it does not fit into this."""
    parts: int = 4
    """Of a batch, for trl-small."""
    output: str = str(HERE / "results")
    quick: bool = False
    """One round of two steps: does everything run?"""


@dataclass(frozen=True)
class Case:
    """One kind of training, and what the project wants of it: times tuned TRL's speed, share of its memory."""

    name: str
    title: str
    kind: str = "dpo"
    rows: str = "pairs"
    lora: bool = False
    speed: float | None = None
    memory: float | None = None


CASES = [
    Case("full", "DPO, all weights, HH", speed=10, memory=0.35),
    Case("lora", "DPO, LoRA r=16, HH", lora=True, speed=12, memory=0.3),
    Case("long", "DPO, HH prompts of 400 tokens and more, answers cut at 60", rows="long", speed=10, memory=0.3),
    Case("reward", "reward model, 4 ranked answers, OASST", "reward", "rankings", speed=8, memory=0.35),
    Case("ranking", "DPO, 4 ranked answers, OASST", rows="rankings"),
    Case("sft", "SFT, HH", "sft", "chosen"),
]
MATRIX_SHARE = 0.6
GAPS = ("first_norm", "loss", "grad_norm")


def main(options: Options) -> int:
    """Measure, print, write; 1 where sartor and tuned TRL do not take the same steps."""
    if options.quick:
        options.rounds, options.warm_up, options.steps = 1, 1, 2
    cases = chosen("case", options.cases, {case.name: case for case in CASES})
    contenders = chosen("contender", options.contenders, {name: name for name in CONTENDERS})
    if options.dtype not in TOLERANCE:
        raise unknown("dtype", options.dtype, TOLERANCE)
    for name in ("rounds", "warm_up", "steps", "parts", "batch_size", "ranking_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    python = peer(options.peer) if any(name != "sartor" for name in contenders) else ""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = prepare(work, options, cases)
        folder = Path(options.output)
        runs, known = earlier(folder, {case.name for case in cases}, set(contenders), options)
        peak = known.get("tflops_matrix_peak", 0.0) * 1e12
        for case in cases:
            for number in range(options.rounds):
                peak = max(peak, start(work, sys.executable, {"kind": "peak", "model": model})["flops"])
                for contender in contenders:
                    job = job_of(work, options, model, case, contender, profile=number == 0)
                    found = measure(work, sys.executable if contender == "sartor" else python, job)
                    runs.append({"case": case.name, "contender": contender, "round": number, **found})
                    print(f"{case.name} {contender} {number + 1}: {progress(found, options)}", file=sys.stderr)
            record = {
                "options": asked(options),
                "machine": machine(),
                "date": date.today().isoformat(),
                "tolerance": TOLERANCE[options.dtype],
                "tflops_matrix_peak": peak / 1e12,
                "cases": {**known.get("cases", {}), **{case.name: described(work, case) for case in cases}},
            }
            rows = summary(record["cases"], runs, options.warm_up, peak)
            write(folder, {**record, "summary": rows, "runs": runs})
    print(table(rows), *verdicts(rows), *agreement(rows, record["tolerance"]), sep="\n")
    return int(any(differs(row, record["tolerance"]) for row in rows))


def chosen(kind: str, names: str, known: dict[str, Any]) -> list[Any]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--{kind}s names no {kind}; known: {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise unknown(kind, name, known)
    return [known[name] for name in dict.fromkeys(wanted)]


def peer(named: str | None) -> str:
    """Python of an environment with TRL and peft; made where none is named."""
    from trl_losses import TORCH, environment

    python = named or str(environment())
    probe = "from importlib.metadata import version as v; print(v('trl'), v('peft'))"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--peer {python}: {error.strerror}; wanted a Python with trl 1.16 and peft in it") from None
    if done.returncode and not named:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "peft", TORCH], check=True)
    elif done.returncode or not done.stdout.startswith("1.16."):
        got = done.stdout.split()[0] if done.stdout else done.stderr.strip().splitlines()[-1]
        raise UserError(f"--peer {python}: wanted trl 1.16 and peft, got {got}; pip install trl==1.16.0 peft")
    return python


# What both sides read


def prepare(work: Path, options: Options, cases: Sequence[Case]) -> str:
    """The cases' token trees in the order of their steps, and random starts; returns the model's folder."""
    model = load(options.model)
    made = {rows: trees_of(model, options, rows) for rows in {case.rows for case in cases}}
    for case in cases:
        size = options.ranking_batch_size if case.rows == "rankings" else options.batch_size
        (work / f"{case.name}.json").write_text(json.dumps(in_steps(case, made[case.rows], size, options)))
    path = str(model.path)
    if any(case.lora for case in cases):
        adapted = load(options.model, options.dtype, **LORA).network
        save_start(work / "lora.safetensors", adapted, "lora_")
    if any(case.kind == "reward" for case in cases):
        save_start(work / "reward.safetensors", new_reward_model(options.model, options.dtype).network, "score.")
    return path


def save_start(path: Path, network: torch.nn.Module, part: str) -> None:
    """The part of the network that starts at random, for TRL to start from the same."""
    save_file({n: p.detach().float() for n, p in network.named_parameters() if part in n}, path)


def trees_of(model: LanguageModel, options: Options, rows: str) -> list[TokenTree]:
    if rows == "rankings":
        examples = list(rankings(Path(options.rankings)))
        trees = encode_preferences(model.tokenizer, examples, options.max_length, as_chat=True).trees
        return [tree for tree in trees if len(tree.pairs) == RANKED * (RANKED - 1) // 2]
    examples = load_examples(options.data, wanted=(Comparison,)).examples
    if rows == "long":
        trees = encode_preferences(model.tokenizer, examples, 10**6).trees
        long = [tree for tree in trees if len(tree.prompt) >= LONG_PROMPT]
        room = options.max_length - SHORT_ANSWER
        cut = [tuple(branch[:SHORT_ANSWER] for branch in tree.branches) for tree in long]
        return [TokenTree(t.prompt[-room:], b, t.ranks) for t, b in zip(long, cut, strict=True) if b[0] != b[1]]
    trees = encode_preferences(model.tokenizer, examples, options.max_length).trees
    return [TokenTree(t.prompt, t.branches[:1], (1.0,)) for t in trees] if rows == "chosen" else trees


def rankings(path: Path) -> Iterator[Ranking]:
    """The first four ranked answers to each prompt of the Open-Assistant trees that has so many, without ties."""
    if not path.is_file():
        raise UserError(f"--rankings {path}: no such file")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            yield from ranked_below(json.loads(line)["prompt"], ())


def ranked_below(node: dict[str, Any], before: tuple[Message, ...]) -> Iterator[Ranking]:
    path = (*before, Message({"prompter": "user"}.get(node["role"], node["role"]), node["text"]))
    ranked = [reply for reply in node["replies"] if reply.get("rank") is not None][:RANKED]
    if node["role"] == "prompter" and len({reply["rank"] for reply in ranked}) == RANKED:
        answers = tuple((Message("assistant", reply["text"]),) for reply in ranked)
        yield Ranking(path, answers, tuple(float(reply["rank"]) for reply in ranked))
    for reply in node["replies"]:
        yield from ranked_below(reply, path)


def in_steps(case: Case, trees: Sequence[TokenTree], size: int, options: Options, seed: int = 0) -> dict[str, Any]:
    """As many trees as the steps need, each once, and which of them make up each step.

    Raises:
        UserError: there are too few.
    """
    steps = min(options.warm_up + options.steps, len(trees) // size)
    if steps <= options.warm_up:
        source = options.rankings if case.rows == "rankings" else options.data
        wanted = (options.warm_up + 1) * size
        raise UserError(f"{source}: case {case.name} needs {wanted} rows that fit it, got {len(trees)}")
    trees = list(trees[: steps * size])
    plan = Plan(len(trees), size, steps, seed)
    order = [plan.batch(step) for step in range(steps)]
    if options.by_length:  # trees change places, and the plan stays
        ranked = sorted(trees, key=lambda tree: -tree.repeated_size)
        for place, item in zip((i for step in order for i in step), ranked, strict=True):
            trees[place] = item
    rows = [{"prompt": tree.prompt, "branches": tree.branches, "ranks": tree.ranks} for tree in trees]
    return {"trees": rows, "steps": order, "batch_size": size, "seed": seed}


def described(work: Path, case: Case) -> dict[str, Any]:
    """What a case is, in numbers."""
    data = json.loads((work / f"{case.name}.json").read_text())
    trees = [data["trees"][i] for step in data["steps"] for i in step]
    scored = [sum(sum(map(len, data["trees"][i]["branches"])) for i in step) for step in data["steps"]]
    return {
        **asdict(case),
        "batch_size": data["batch_size"],
        "prompt_tokens": sum(len(tree["prompt"]) for tree in trees) / len(trees),
        "answer_tokens": sum(sum(map(len, tree["branches"])) / len(tree["branches"]) for tree in trees) / len(trees),
        "scored_tokens": [0] * len(scored) if case.kind == "reward" else scored,
    }


# One turn


def job_of(work: Path, options: Options, model: str, case: Case, contender: str, profile: bool) -> dict[str, Any]:
    random_start = "lora" if case.lora else "reward" if case.kind == "reward" else ""
    return {
        "case": str(work / f"{case.name}.json"),
        "kind": case.kind,
        "dtype": options.dtype,
        "contender": contender,
        "model": model,
        **(LORA if case.lora else dict.fromkeys(LORA, 0)),
        "start": str(work / f"{random_start}.safetensors") if random_start else "",
        "learning_rate": 5e-5 if case.lora else 5e-6,
        "beta": 0.1,
        "max_grad_norm": 1.0,
        "token_budget": options.token_budget,
        "memory_gib": options.memory_gib,
        "accumulate": 1,
        "parts": options.parts,
        "profile": profile,
    }


def measure(work: Path, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """One turn; TRL gets its batch in more parts as long as it does not fit into memory."""
    found = start(work, python, job)
    while found.get("error") == "memory" and job["contender"] != "sartor" and job["accumulate"] < 8:
        job["accumulate"] *= 2
        found = start(work, python, job)
    if "error" in found:
        raise UserError(f"{job['contender']} does not fit into --memory-gib {job['memory_gib']:g}")
    return found


def start(work: Path, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker in a fresh process and read what it wrote."""
    script = HERE / "peers" / "trl_steps.py" if job.get("contender", "").startswith("trl") else HERE / "steps.py"
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        result, path = Path(scratch) / "result.json", Path(scratch) / "job.json"
        path.write_text(json.dumps({**job, "scratch": scratch, "result": str(result), "started": time.time()}))
        there = {**os.environ, "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        done = subprocess.run([python, script, path], capture_output=True, text=True, env=there)
        if done.returncode:
            sys.exit(f"{script.name} failed ({done.returncode}) on {job}:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def progress(found: dict[str, Any], options: Options) -> str:
    return f"{pairs_per_second(found, options.warm_up):.3f} pairs/s, {found['peak_gib']:.2f} GiB"


# What it comes to


def pairs_per_second(run: dict[str, Any], warm_up: int) -> float:
    timed = run["steps"][warm_up:]
    return sum(step["pairs"] for step in timed) / sum(step["seconds"] for step in timed)


def summary(cases: dict[str, Any], runs: Sequence[dict[str, Any]], warm_up: int, peak: float) -> list[dict[str, Any]]:
    """One row per case and contender, over all rounds."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(run["case"] for run in runs):
        here = [run for run in runs if run["case"] == name]
        tuned = [run for run in here if run["contender"] == "trl-tuned"]
        for contender in dict.fromkeys(run["contender"] for run in here):
            own = [run for run in here if run["contender"] == contender]
            speeds = [pairs_per_second(run, warm_up) for run in own]
            memory = median(run["peak_gib"] for run in own)
            row = {
                "case": name,
                "contender": contender,
                "pairs_per_second": median(speeds),
                "range": [min(speeds), max(speeds)],
                "peak_gib": memory,
                "first_step_seconds": median(run["first_step_seconds"] for run in own),
                "reference_seconds": median(run["reference_seconds"] for run in own),
                "accumulate": own[0].get("accumulate", 1),
            }
            if tuned:
                row["speed_ratio"] = row["pairs_per_second"] / median(pairs_per_second(r, warm_up) for r in tuned)
                row["memory_ratio"] = memory / median(run["peak_gib"] for run in tuned)
                row["gaps"] = {what: largest_gap(own, tuned, what) for what in GAPS}
            if contender == "sartor":
                shares = [useful_flops(cases[name], run, warm_up) / peak for run in own]
                row["share_of_peak"] = median(shares)
                row["matrix_share"] = next(run["matrix_share"] for run in own if "matrix_share" in run)
            rows.append(row)
    return rows


def useful_flops(case: dict[str, Any], run: dict[str, Any], warm_up: int) -> float:
    """FLOP/s that training cannot do without: 2 a parameter forward and 4 back, of which frozen weights need 2; the
    prompt once, the head on completion tokens, attention left out."""
    each = 4 if case["lora"] else 6
    timed, scored = run["steps"][warm_up:], case["scored_tokens"][warm_up:]
    body = run["body_parameters"] * sum(step["tokens"] for step in timed)
    return each * (body + run["head_parameters"] * sum(scored)) / sum(step["seconds"] for step in timed)


def largest_gap(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], what: str) -> float:
    """Largest relative difference of any step of any round; ``first_norm``: of the first step's gradient norm.

    Before the first update both compute the same thing, and its loss is ln 2 whatever they do: only the norm tells.
    """
    steps, name = (slice(0, 1), "grad_norm") if what == "first_norm" else (slice(None), what)
    pairs = [
        (a[name], b[name])
        for one in own
        for two in other
        for a, b in zip(one["steps"][steps], two["steps"][steps], strict=True)
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def differs(row: dict[str, Any], limits: dict[str, float]) -> bool:
    """Whether sartor's steps are others than tuned TRL's; a NaN is a difference."""
    gaps = row.get("gaps", {}) if row["contender"] == "sartor" else {}
    if row["case"] == "reward" and limits["first_norm"] > 1e-3:
        limits = {**limits, "first_norm": REWARD_NORM}
    return any(not gaps[what] <= limits[what] for what in gaps)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The one table; × and the gaps are against tuned TRL."""
    head = (
        f"{'case':<8} {'contender':<10} {'pairs/s':>8} {'range':>15} {'×':>6} {'GiB':>6} {'×':>5} {'of peak':>8}"
        f" {'first step':>11} {'reference':>10} {'loss gap':>9} {'norm gap':>9}"
    )
    lines = [head, "-" * len(head)]
    before = ""
    for row in rows:
        gaps, low_high = row.get("gaps", {}), "{:.3f}-{:.3f}".format(*row["range"])
        parts = f"  in {row['accumulate']} parts" if row["accumulate"] > 1 else ""
        lines.append(
            f"{row['case'] if row['case'] != before else '':<8} {row['contender']:<10}"
            f" {row['pairs_per_second']:8.3f} {low_high:>15} {shown(row, 'speed_ratio', '.2f'):>6}"
            f" {row['peak_gib']:6.2f} {shown(row, 'memory_ratio', '.2f'):>5} {shown(row, 'share_of_peak', '.1%'):>8}"
            f" {row['first_step_seconds']:9.1f} s {row['reference_seconds']:8.1f} s"
            f" {shown(gaps, 'loss', '.2%'):>9} {shown(gaps, 'grad_norm', '.2%'):>9}{parts}"
        )
        before = row["case"]
    return "\n".join(lines)


def shown(row: dict[str, Any], name: str, how: str) -> str:
    return format(row[name], how) if name in row else ""


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The project's targets, met or missed."""
    lines = ["", "targets"]
    for case in CASES:
        row = next((r for r in rows if r["case"] == case.name and r["contender"] == "sartor"), None)
        if row is None:
            continue
        if case.speed and case.memory and "speed_ratio" in row:
            for what, got, met, wanted in (
                ("speed", row["speed_ratio"], row["speed_ratio"] >= case.speed, f"at least {case.speed:g}"),
                ("memory", row["memory_ratio"], row["memory_ratio"] <= case.memory, f"at most {case.memory:g}"),
            ):
                lines.append(f"  {case.name} {what} × tuned TRL: {got:.2f}, {wanted}: {'met' if met else 'MISSED'}")
        met = row["matrix_share"] >= MATRIX_SHARE
        verdict = "met" if met else "MISSED"
        lines.append(
            f"  {case.name} matrix products' share of the step: {row['matrix_share']:.0%}, at least 60%: {verdict}"
        )
        lines += fastest(row, [r for r in rows if r["case"] == case.name and r["contender"] != "sartor"])
    return lines


def fastest(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[str]:
    """What remains beside another of TRL's contenders, where it is faster than tuned TRL as a whole batch."""
    best = max(others, key=lambda other: other["pairs_per_second"], default=None)
    if best is None or best["contender"] == "trl-tuned":
        return []
    speed = row["pairs_per_second"] / best["pairs_per_second"]
    memory = row["peak_gib"] / best["peak_gib"]
    return [f"  {row['case']} beside {best['contender']}, TRL's fastest: speed × {speed:.2f}, memory × {memory:.2f}"]


def agreement(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """Whether sartor and tuned TRL took the same steps."""
    compared = [row for row in rows if row["contender"] == "sartor" and "gaps" in row]
    worst = {what: max((row["gaps"][what] for row in compared), default=0.0) for what in GAPS}
    bad = ", ".join(row["case"] for row in compared if differs(row, limits))
    numbers = ", ".join(f"{what} {worst[what]:.3%} (limit {limits[what]:.3g})" for what in GAPS)
    numbers += f"; first_norm of a reward model in bf16: limit {REWARD_NORM:.3g}"
    verdict = f"DIFFERS in {bad}" if bad else "agree" if compared else "not compared"
    return ["", f"every step of sartor beside tuned TRL, largest relative gap: {numbers}: {verdict}"]


def asked(options: Options) -> dict[str, Any]:
    """The options as they are kept: files by name, and nothing of where things are on this machine."""
    known = {name: value for name, value in asdict(options).items() if name not in ("peer", "output")}
    return known | {name: Path(known[name]).name for name in ("data", "rankings")}


def earlier(
    folder: Path, cases: set[str], contenders: set[str], options: Options
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What was measured today on this machine with the same options, but for what is measured now; and its record."""
    path = folder / f"preference_step-{date.today().isoformat()}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    of_steps = ("warm_up", "steps", "batch_size", "ranking_batch_size", "max_length", "by_length", "token_budget")
    same = (*of_steps, "model", "dtype", "data", "rankings")
    told = known.get("options", {})
    if known.get("machine") != machine() or any(told.get(name) != asked(options)[name] for name in same):
        return [], {}
    return [run for run in known["runs"] if run["case"] not in cases or run["contender"] not in contenders], known


def write(folder: Path, record: dict[str, Any]) -> None:
    from draw import draw

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (folder / f"preference_step-{record['date']}.json").write_text(text)
    draw(record["cases"], record["summary"], folder / "preference_step.svg")


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Options)))
    except UserError as error:
        sys.exit(f"error: {error}")
