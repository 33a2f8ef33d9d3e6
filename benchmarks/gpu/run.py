"""Everything about speed and exactness that only a GPU can tell, in one run of under nine minutes.

usage: benchmarks/gpu.sh [--out FILE] [--minutes 8.5] [--only TEXT] [--device cpu --tiny]

Models have the shape of Llama 3.2 1B and Llama 3.1 8B with random weights, data the lengths of UltraFeedback and HH:
neither changes what a step costs. Each case is a process of its own with a time limit, and the results are written
after each, so that nothing is lost when the machine goes. First what must be right, then what should be fast:

- ``check``: both roads and their gradients against fp32; flash against dense attention; Triton kernels against fp64.
- ``repeat``: whether two equal runs end with equal bits, with deterministic algorithms off and on.
- ``head``: the passes over a chunk of logits, in torch and in Triton, and the head as it is used.
- ``profile``: where the host waits for the device in a step, and which kernels take the time.
- ``step/MODEL/TRAINED/DATA/WHO``: optimizer steps of 16 pairs by Sartor, by TRL with the best settings known to us
  (``trl-tuned``: reference scored ahead, no checkpointing, micro-batches as large as fit, bf16 where nothing trains
  it), and by TRL as shipped (``trl``). All start from the same weights and take the same pairs in the same order.

What is right stands in ``exactness.py``, where time goes in ``profiles.py``, steps in ``training.py``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

# In order of what we would miss most, with the seconds each may take.
CASES: list[tuple[str, int]] = [
    ("check", 60),
    ("step/1b/lora/uf/sartor", 60),
    ("step/1b/lora/uf/trl-tuned", 60),
    ("step/1b/full/uf/sartor", 60),
    ("step/1b/full/uf/trl-tuned", 60),
    ("step/8b/lora/uf/sartor", 75),
    ("step/8b/lora/uf/trl-tuned", 90),
    ("profile", 60),
    ("head", 45),
    ("repeat", 45),
    ("step/1b/lora/hh/sartor", 45),
    ("step/1b/lora/hh/trl-tuned", 45),
    ("step/1b/lora/uf/trl", 60),
    ("step/1b/full/uf/trl", 60),
    ("step/8b/lora/hh/sartor", 60),
    ("step/8b/lora/hh/trl-tuned", 60),
    ("step/8b/lora/uf/trl", 90),
    ("step/1b/full/hh/sartor", 45),
    ("step/1b/full/hh/trl-tuned", 45),
    ("step/1b/lora/hh/trl", 45),
    ("step/8b/full/uf/sartor", 90),
    ("step/8b/full/uf/trl-tuned", 90),
]


def run_all(options: argparse.Namespace) -> None:
    begun, results = time.time(), []
    for name, limit in CASES:
        left = options.minutes * 60 - (time.time() - begun)
        if options.only not in name:
            continue
        if left < 15:
            results.append({"case": name, "skipped": "no time left"})
            continue
        # Half the micro-batch where memory runs out, twice.
        for scale in (1.0, 0.5, 0.25):
            result = run_one(name, scale, min(limit, left), options)
            if result.get("error") != "memory":
                break
        results.append(result)
        write(options.out, results)
        print(line(result), flush=True)
    write(options.out, results)


def run_one(name: str, scale: float, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", name, "--scale", str(scale), "--device", options.device]
    begun = time.time()
    try:
        found = subprocess.run(
            command + ["--tiny"] * options.tiny, capture_output=True, text=True, timeout=limit, env=environment(name)
        )
    except subprocess.TimeoutExpired as late:
        return {"case": name, "error": f"took more than {limit:.0f} s", "tail": str(late.stderr or "")[-800:]}
    rows = [row for row in found.stdout.splitlines() if row.startswith("RESULT ")]
    result = json.loads(rows[-1].removeprefix("RESULT ")) if rows else {"error": found.stderr[-1500:]}
    return {"case": name, "scale": scale, "process_seconds": round(time.time() - begun, 1), **result}


def environment(name: str) -> dict[str, str]:
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if name == "repeat":
        more["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    else:
        more["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return {**os.environ, **more}


def write(path: str, results: list[dict[str, Any]]) -> None:
    scratch = Path(path).with_suffix(".partial")
    scratch.write_text(json.dumps({"date": date.today().isoformat(), "results": results}, indent=1) + "\n")
    scratch.rename(path)


def line(result: dict[str, Any]) -> str:
    if "ms_per_step" in result:
        share = "" if result["mfu"] is None else f"  MFU {result['mfu']:.1%}"
        return (
            f"{result['case']:28} {result['ms_per_step']:8.1f} ms  {result['pairs_per_second']:7.2f} pairs/s{share}"
            f"  {result['peak_gib']:.1f} GiB  loss {result['loss'][0]:.5f}  norm {result['grad_norm'][0]:.5f}"
        )
    text = {key: value for key, value in result.items() if key not in ("case", "scale", "kernels", "machine")}
    return f"{result['case']:28} {json.dumps(text)[:1500]}"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process. The parent imports none of this: it must not take the device."""
    import torch

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    try:
        match options.case:
            case "check" | "repeat":
                import exactness

                return getattr(exactness, f"{options.case}_case")(device, options.tiny)
            case "head" | "profile":
                import profiles

                return getattr(profiles, f"{options.case}_case")(device, options.tiny)
            case _:
                from training import step_case

                return step_case(options.case, options.scale, device, options.tiny)
    except torch.OutOfMemoryError:
        return {"error": "memory"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=f"gpu-{date.today().isoformat()}.json")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that everything runs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is None:
        run_all(options)
        return
    print("RESULT " + json.dumps(measure(options), default=float))


if __name__ == "__main__":
    main()
