"""Every loss type of TRL 1.16 against ours: same tiny model, same batch, value and gradient of every parameter, fp32.

usage: python benchmarks/trl_losses.py [--peer PYTHON]

TRL takes its own batch through its own trainer, in an environment of its own (benchmarks/.peers/trl, made on first use,
or the interpreter that --peer names). The batch comes back as token ids, and goes through Sartor's trees.
"""

import json
import math
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from sartor.data.trees import TokenTree
from sartor.machine import machine
from sartor.model.load import load
from sartor.model.reference import score_trees
from sartor.objectives.specs import parse_objective
from sartor.train.gradient import batch_gradient
from sartor.train.preferences import Preferences

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".peers" / "trl"
TRL, TORCH = "trl==1.16.0", "torch==2.13.0"
LIMIT = 1e-5


@dataclass
class Options:
    peer: str | None = None
    """Python of an environment with TRL 1.16 in it."""


@dataclass(frozen=True)
class Case:
    """One of TRL's loss types, its spec here, and what is known to differ."""

    trl: str
    ours: Sequence[str]
    trainer: str = "dpo"
    options: tuple[tuple[str, object], ...] = ()
    wpo: bool = False
    ld_alpha: float | None = None
    note: str = ""
    rows: str = "pairs"

    @property
    def name(self) -> str:
        return "-".join([self.trainer, self.trl, *(f"{k}={v}" for k, v in self.options)]).replace("/", "_")

    def peer(self) -> tuple[str, dict]:
        config = dict(self.options)
        if self.trainer == "dpo":
            config = {"loss_type": [self.trl], **config}
        elif self.trainer in ("kto", "cpo"):
            config = {"loss_type": self.trl, **config}
        return self.trainer, config


smoothed = (("label_smoothing", 0.1),)
CASES = [
    Case("sigmoid", ["dpo"]),
    Case("hinge", ["hinge"]),
    Case("ipo", ["ipo"]),
    Case("exo_pair", ["exo,label_smoothing=0.001"], options=(("label_smoothing", 1e-3),)),
    Case("nca_pair", ["nca,beta=0.1"]),
    Case("robust", ["robust,label_smoothing=0.1"], options=smoothed),
    Case(
        "bco_pair", ["bco_pair,shift=false"], note="the paper's reward shift is on by default here; TRL 1.16 has none"
    ),
    Case("sppo_hard", ["sppo,beta=0.1"]),
    Case("aot", ["aot,label_smoothing=0.1"], options=smoothed),
    Case("aot_unpaired", ["aot_unpaired,label_smoothing=0.1"], options=smoothed),
    Case("apo_zero", ["apo_zero"]),
    Case("apo_down", ["apo_down"]),
    Case(
        "discopop",
        ["lrml,beta=0.1"],
        note="TRL multiplies a gate with an exponential, and is NaN where one is 0 and the other infinite",
    ),
    Case(
        "sft",
        ["sft"],
        rows="even_pairs",
        note="TRL takes the mean over all tokens of the batch, here over answers: compared on answers of one length",
    ),
    Case("sigmoid_norm", ["dpo_norm,beta=0.1"]),
    Case("sigmoid", ["dpo_forward_kl"], options=(("f_divergence_type", "forward_kl"),)),
    Case("sigmoid", ["dpo_js"], options=(("f_divergence_type", "js_divergence"),)),
    Case(
        "sigmoid",
        ["dpo_alpha,alpha=0.5"],
        options=(("f_divergence_type", "alpha_divergence"), ("f_alpha_divergence_coef", 0.5)),
    ),
    Case("sigmoid", ["dpo"], options=(("use_weighting", True),), wpo=True),
    Case("sigmoid", ["dpo"], options=(("ld_alpha", 0.5),), ld_alpha=0.5),
    Case("kto", ["kto"], trainer="kto", rows="judged"),
    Case("apo_zero_unpaired", ["apo_zero_unpaired"], trainer="kto", rows="judged"),
    Case("sigmoid", ["cpo,nll_weight=0"], trainer="cpo", options=(("cpo_alpha", 0.0),)),
    Case("simpo", ["simpo,gamma=0.5,beta=2"], "cpo", (("cpo_alpha", 0.0), ("simpo_gamma", 0.5), ("beta", 2.0))),
    Case(
        "alphapo",
        ["alphapo,gamma=0.5,beta=2,alpha=0.25"],
        "cpo",
        (("cpo_alpha", 0.0), ("simpo_gamma", 0.5), ("beta", 2.0), ("alpha", 0.25)),
    ),
    Case(
        "orpo",
        ["orpo:1", "sft:-1"],
        trainer="orpo",
        note="the odds-ratio term alone: TRL's other term counts the prompt's tokens",
    ),
]


def main(options: Options) -> None:
    python = options.peer or str(environment())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        prepare(work)
        cases = [{"name": case.name, "trl": case.peer(), "rows": case.rows} for case in CASES]
        (work / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run([python, HERE / "peers" / "trl_losses.py", work], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"TRL's side failed:\n{done.stderr[-3000:]}")
        results = [compare(work, case) for case in CASES]
    width = max(len(row["trl"]) for row in results)
    print(f"{'TRL 1.16':<{width}}  {'here':<38} {'value':>9} {'gradient':>9} {'of largest':>11}")
    for row in results:
        numbers = f"{row['value']:9.1e} {row['gradient']:9.1e} {row['gradient_relative']:11.1e}"
        verdict = "agrees" if row["agrees"] else "DIFFERS"
        print(f"{row['trl']:<{width}}  {row['here']:<38} {numbers}  {verdict}")
        if row["note"]:
            print(f"{'':<{width}}  {row['note']}")
    unstable = torch.sigmoid(torch.tensor(-200.0) / 0.05) * torch.exp(torch.tensor(200.0))
    print(f"\ndiscopop's product at z = -200: {float(unstable)} in TRL's form; lrml here: {stable_lrml(-200.0):.1f}")
    name = f"trl_losses-{date.today().isoformat()}.json"
    record = {"trl": TRL, "limit": LIMIT, "results": results, "machine": machine()}
    (HERE / "results" / name).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if all(row["agrees"] for row in results) else 1)


def environment() -> Path:
    """An environment with TRL in it."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL, TORCH], check=True)
    return python


def prepare(work: Path) -> None:
    """A tiny policy, a reference some nats away from it as in training, and rows of unlike lengths."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from conftest import byte_tokenizer, tiny_model

    tokenizer = byte_tokenizer(chat_template=None)
    model = tiny_model()
    model.tokenizer = tokenizer
    model.save(work / "policy")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save(work / "reference")
    answers = ["Yes.", "no", "Certainly, in the morning", "never!", "it depends on", "ask again", "so be it", "hm"]
    prompts = ["Is it so? ", "Tell me why. ", "When? ", "How long will it take, roughly? ", "Who? "]
    pairs = [
        {"prompt": prompt, "chosen": answers[i], "rejected": answers[(3 * i + 1) % len(answers)]}
        for i, prompt in enumerate(prompts)
    ]
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(pairs)
    ]
    even = [{**row, "chosen": row["chosen"][:2].ljust(2, "!")} for row in pairs]
    for name, rows in {"pairs": pairs, "judged": judged, "even_pairs": even}.items():
        (work / f"{name}.json").write_text(json.dumps(rows))


def compare(work: Path, case: Case) -> dict[str, object]:
    """Our loss and gradient on the batch that TRL took."""
    theirs = load_file(work / f"{case.name}.safetensors")
    model, reference = load(str(work / "policy"), "float32"), load(str(work / "reference"), "float32")
    trees = trees_of(theirs, case.trainer)
    data = Preferences(trees, [""] * len(trees), [], score_trees(reference, trees))
    objective = parse_objective(case.ours, wpo=case.wpo, ld_alpha=case.ld_alpha)
    metrics = batch_gradient(model, objective, data, range(len(trees)), 10_000)
    value = abs(metrics["loss"] - float(theirs["loss"])) / max(1.0, abs(float(theirs["loss"])))
    largest = max(float(v.abs().max()) for k, v in theirs.items() if k.startswith("grad."))
    gaps = [
        float((p.grad - theirs[f"grad.{name}"]).abs().max())
        for name, p in model.network.named_parameters()
        if f"grad.{name}" in theirs
    ]
    gradient = max(gaps)
    agrees = value <= LIMIT and gradient <= LIMIT * max(1.0, largest) and math.isfinite(value + gradient)
    modifiers = [" --wpo"] * case.wpo + [f" --ld-alpha {case.ld_alpha}"] * (case.ld_alpha is not None)
    return {
        "trl": " ".join([case.trainer, case.trl, *(f"{k}={v}" for k, v in case.options)]),
        "here": " ".join(case.ours) + "".join(modifiers),
        "value": value,
        "gradient": gradient,
        "gradient_relative": gradient / largest,
        "agrees": agrees,
        "note": case.note,
    }


def trees_of(batch: dict[str, torch.Tensor], trainer: str) -> list[TokenTree]:
    """TRL's padded rows as trees, token for token."""
    if trainer in ("cpo", "orpo"):
        sides = [rows(batch[f"{s}_input_ids"], batch[f"{s}_labels"] != -100) for s in ("chosen", "rejected")]
    else:
        both = rows(batch["input_ids"], batch["completion_mask"] == 1)
        sides = [both[: len(both) // 2], both[len(both) // 2 :]] if trainer == "dpo" else [both]
    if trainer == "kto":
        if "KL_input_ids" in batch:
            sides.append(rows(batch["KL_input_ids"], batch["KL_completion_mask"] == 1))
        return [
            TokenTree(own[0], tuple(row[1] for row in (own, *other)), good=(bool(label),), mismatched=len(other))
            for own, *other, label in zip(*sides, batch["label"].tolist(), strict=True)
        ]
    assert all(chosen[0] == rejected[0] for chosen, rejected in zip(*sides, strict=True))
    return [TokenTree(c[0], (c[1], r[1]), (1.0, 2.0)) for c, r in zip(*sides, strict=True)]


def rows(ids: torch.Tensor, completion: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of each row: what stands before the first completion token, and the completion."""
    found = []
    for row, mask in zip(ids, completion, strict=True):
        (first, *_), last = mask.nonzero()[:, 0].tolist(), int(mask.nonzero()[-1])
        found.append((tuple(row[:first].tolist()), tuple(row[first : last + 1].tolist())))
    return found


def stable_lrml(z: float) -> float:
    """Our loss where the released form is not a number."""
    from sartor.losses.discovered.lrml import lrml
    from sartor.types import PairLogps

    zero, length = torch.zeros(1), torch.ones(1).long()
    return float(lrml(PairLogps(torch.tensor([z]), zero, zero, zero, length, length), beta=1.0))


if __name__ == "__main__":
    main(tyro.cli(Options))
