"""``sartor sample``: prompts in, completions out."""

import json
from pathlib import Path

from sartor.config import SampleConfig
from sartor.console import progress, say
from sartor.data.chat import encode_prompts, last_turn
from sartor.data.formats import load_examples
from sartor.errors import UserError
from sartor.model.load import load
from sartor.rewards.scoring import as_rows
from sartor.rollout.local import Sampling, sample
from sartor.types import Comparison, Demonstration, Judged, Prompt, Ranking, Text

WITH_PROMPTS = (Prompt, Comparison, Ranking, Demonstration, Judged)


def run_sample(config: SampleConfig) -> None:
    """Answer every prompt ``config.n`` times; write JSON lines, or show them.

    Raises:
        UserError: no prompts, a model that cannot be loaded, or an output that cannot be written.
    """
    prompts = read_prompts(config.prompts)
    if config.output is not None:
        _check_writable(config.output)
    model = load(config.model, config.dtype)
    room = min(config.max_length, (model.context or 2**31) - config.max_new_tokens)
    ids = encode_prompts(model.tokenizer, prompts, max(1, room), model.reads_as_chat(config.as_chat))
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size, config.seed)
    with progress("sampling", len(prompts) * config.n) as advance:
        answers = sample(model, ids, config.n, sampling, advance)
    if not model.shares_prompts:
        say("note    sampled by transformers' generate, which is slower: this model cannot share prompts")
    rows = [
        {"prompt": as_rows(prompt), "completions": [one.text for one in row], "finished": [one.finished for one in row]}
        for prompt, row in zip(prompts, answers, strict=True)
    ]
    if config.output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        config.output.write_text(lines, encoding="utf-8")
        cut = sum(not one.finished for row in answers for one in row)
        say(f"{len(prompts) * config.n} completions in {config.output}; {cut} reached {config.max_new_tokens} tokens")
        return
    for prompt, row in zip(prompts, rows, strict=True):
        print(last_turn(prompt))
        for completion in row["completions"]:
            print("  " + completion.strip().replace("\n", "\n  ") + "\n")


def _check_writable(path: Path) -> None:
    """Find out before sampling, not after."""
    if path.exists():
        raise UserError(f"--output {path} exists already: name a new file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror or error}") from error


def read_prompts(source: str) -> list[Text]:
    """Prompts from a text file, one a line, or from any data with prompts in it.

    Raises:
        UserError: no such file, or nothing in it.
    """
    if Path(source).suffix == ".txt":
        return [*read_lines(source, "--prompts")]
    loaded = load_examples(source, wanted=WITH_PROMPTS)
    say(f"prompts {loaded}")
    return [example.prompt for example in loaded.examples if isinstance(example, WITH_PROMPTS)]


def read_lines(source: str, option: str) -> list[str]:
    """The lines of a text file that say anything.

    Raises:
        UserError: no such file, or nothing in it.
    """
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {source}: {reason}; wanted a text file with one prompt a line") from error
    if not any(lines):
        raise UserError(f"{option} {source} is empty: wanted one prompt a line")
    return [line for line in lines if line]
