#!/usr/bin/env bash
# Runs gpu/run.py on a machine that has torch, transformers, peft and a GPU, and perhaps nothing else and no network.
#
# WHEELS may name a folder of wheels for what the machine lacks; they are unpacked apart and put on PYTHONPATH.
#   Sartor's side needs      tyro docstring_parser typeguard jaxtyping wadler_lindig
#   TRL's side needs besides trl datasets dill multiprocess xxhash pyarrow pandas   (without it those cases are skipped)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" "$root/benchmarks/gpu/run.py" "$@"
