"""Losses of the catalogue, said in the language: equal to their hand-written twins, which a test holds them to.

What does not fit: losses of verdicts or rankings, of ties or strengths, of whole distributions (TDPO), and those that
sort the batch (AOT).
"""

from functools import cache

from sartor.discover.language.expression import Expression
from sartor.discover.language.parse import parse

_Z = "z = beta * margin\n"
_RATIOS = "w = beta * chosen_logratio\nl = beta * rejected_logratio\n"
_MEANS = "w = policy_chosen / maximum(chosen_length, 1)\nl = policy_rejected / maximum(rejected_length, 1)\n"
_MEAN_RATIOS = "w = chosen_logratio / maximum(chosen_length, 1)\nl = rejected_logratio / maximum(rejected_length, 1)\n"

KNOWN = {
    "dpo": "-log_sigmoid(beta * margin)",
    "cdpo": _Z + "-0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z)",
    "robust": _Z + "(-0.9 * log_sigmoid(z) + 0.1 * log_sigmoid(-z)) / 0.8",
    "ipo": _MEAN_RATIOS + "(w - l - 1 / (2 * beta)) ** 2",
    "ipo_sum": "(margin - 1 / (2 * beta)) ** 2",
    "hinge": "relu(1 - beta * margin)",
    # log(1 - ε) and log ε at ε = 0.001
    "exo": _Z + "sigmoid(z) * (log_sigmoid(z) + 0.0010005) + sigmoid(-z) * (log_sigmoid(-z) + 6.907755)",
    "nca": _RATIOS + "-log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l)",
    "bco_pair": _RATIOS + "d = detach(0.5 * (mean(w) + mean(l)))\n-log_sigmoid(w - d) - log_sigmoid(d - l)",
    "sppo": "t = 0.5 / beta\n(chosen_logratio - t) ** 2 + (rejected_logratio + t) ** 2",
    "apo_zero": _RATIOS + "sigmoid(-w) + sigmoid(l)",
    "apo_down": "sigmoid(beta * chosen_logratio) + sigmoid(-(beta * margin))",
    "r_dpo": "-log_sigmoid(beta * margin + 0.01 * (chosen_length - rejected_length))",
    "dpo_norm": _MEAN_RATIOS + "-log_sigmoid(beta * (w - l))",
    "dpop": "-log_sigmoid(beta * (margin - 50 * relu(-chosen_logratio)))",
    "cal_dpo": "t = 0.5 / beta\n-log_sigmoid(margin) + (chosen_logratio - t) ** 2 + (rejected_logratio + t) ** 2",
    "dpo_forward_kl": "-log_sigmoid(beta * (expm1(-rejected_logratio) - expm1(-chosen_logratio)))",
    "dpo_js": "-log_sigmoid(beta * (log_sigmoid(chosen_logratio) - log_sigmoid(rejected_logratio)))",
    "dpo_alpha": "-log_sigmoid(beta * (expm1(-0.5 * rejected_logratio) - expm1(-0.5 * chosen_logratio)) / 0.5)",
    "sft": "-policy_chosen / maximum(chosen_length, 1)",
    "cpo": _MEANS + "-log_sigmoid(beta * (policy_chosen - policy_rejected)) - w",
    "simpo": _MEANS + "-log_sigmoid(beta * w - beta * l - 1)",
    "alphapo": _MEANS + "-log_sigmoid(beta * (expm1(-0.25 * l) / 0.25 - expm1(-0.25 * w) / 0.25) - 1)",
    "orpo": _MEANS + "-w - 0.1 * log_sigmoid(w - l - (log1mexp(w) - log1mexp(l)))",
    "dbaql": _Z + "v = var(z / 0.05)\nsigmoid(v) * softplus(-z / 0.9) + sigmoid(-v) * exp(-0.9 * z)",
    "aql": _Z
    + "g = 0.05 * (0.5 + 0.01 * (mean(sigmoid(z / 0.05)) - 0.5)) - z\n"
    + "sigmoid(g) * softplus(-z) + sigmoid(-g) * relu(1 - z)",
    "padll": "where(margin < 0, 0.45, 0.9) * softplus(-(beta * margin))",
    "aqfl": _Z
    + "x = z / 0.05\nm = mean(sigmoid(-x)) * var(x)\nq = 0.1 * abs(x - (m + 0.05 * sigmoid(mean(x) - m)))\n"
    + "sigmoid(q) * softplus(-z) + sigmoid(-q) * relu(1 - z)",
    "cell": _Z + "0.5 * softplus(-z) + 0.5 * exp(-z)",
    "lrml": _Z + "sigmoid(-z / 0.05) * softplus(-z) + sigmoid(z / 0.05) * exp(-z)",
    "pfl": _Z + "where(policy_chosen > policy_rejected, 0.5 * softplus(-z / 0.05), 2 * relu(1 - z / 0.05))",
}
# What a search has to be able to tell from an objective: training does nothing, or the opposite.
CANARIES = {
    "zero": "0 * margin",
    "inverted": "-log_sigmoid(-(beta * margin))",
    "constant": "1 + 0 * margin",
}


@cache
def known(name: str) -> Expression:
    """A loss of the catalogue, or a canary, as a tree."""
    return parse({**KNOWN, **CANARIES}[name])
