import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from sartor.evaluate.statistics import Estimate
from sartor.report.charts import change
from sartor.report.page import write_report
from sartor.report.plots import curve, histogram
from sartor.report.run import FILES, read_run
from sartor.report.texts import clip, read_samples
from sartor.report.words import (
    NO_DIFFERENCE,
    NO_INTERVAL,
    NOT_MEASURABLE,
    figure,
    number,
    read_estimate,
    shift,
    verdict,
)

NAN, INF = math.nan, math.inf
BETA = 0.1


def estimate(value: float, half: float, n: int = 120) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def fake_run(tmp_path: Path, steps: int = 60, prompts: int = 15) -> Path:
    """A run folder with every file that the report reads, shaped like a good run of DPO on film reviews."""
    run, rng = tmp_path / "run", random.Random(0)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    rows = []
    for step in range(steps + 1):
        t = step / steps
        if step:
            loss = 0.69 - 0.25 * t + rng.gauss(0, 0.05)
            rows.append({"step": step, "split": "train", "epoch": t, "loss": loss, "tokens": 900, "seconds": 1.1})
        if step % 10 == 0:
            rise = 1 - math.exp(-3 * t)
            level = {"logps/chosen": -141 - 6 * rise, "logps/rejected": -150 - 15 * rise}
            reward = {"rewards/chosen": -0.6 * rise, "rewards/rejected": -1.5 * rise}
            row = {"step": step, "split": "eval", "epoch": t, "loss": estimate(0.693 - 0.14 * rise, 0.05 * rise)}
            row |= {name: estimate(value, 11.0) for name, value in level.items()}
            row |= {name: estimate(value, 0.22 * rise) for name, value in reward.items()}
            row["rewards/accuracies"] = estimate(0.5 + 0.19 * rise, 0.082 * min(1, 10 * t))
            row["rewards/margins"] = estimate(0.9 * rise, 0.2 * rise)
            row["objective/kl"] = estimate(3.4 * rise + rng.gauss(0, 0.1), 0.2 + 0.6 * rise, 30)
            rows.append(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    margins = [rng.gauss(0.85, 1.2) for _ in range(120)]
    (run / "margins.json").write_text(json.dumps({"step": steps, "margins": margins}), encoding="utf-8")
    samples = [fake_sample(i, rng) for i in range(prompts)]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    (run / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return run


def fake_sample(i: int, rng: random.Random) -> dict:
    dull, warm = (
        "was a film that I had been told to see and so I did, and the plot went on for a while without much happening.",
        "is a quiet delight: warm performances, a script that trusts its audience, and an ending that earns its tears.",
    )
    prompt: object = f"Review {i}. The second half of this picture"
    if i % 3 == 1:
        prompt = [
            {"role": "system", "content": "You write honest film reviews."},
            {"role": "user", "content": f"Film {i}: what did you think of the second half?"},
        ]
    return {
        "prompt": prompt,
        "before": [dull, dull + " I would not sit through it again.", "", dull],
        "after": [warm * (8 if i == 2 else 1), warm, warm, warm],
        "score_before": [rng.uniform(-0.8, 0.5) for _ in range(4)],
        "score_after": [rng.uniform(0.1, 0.95) for _ in range(4)],
    }


CONFIG = {
    "model": "smollm2",
    "data": "reviews.jsonl",
    "loss": "dpo",
    "beta": BETA,
    "learning_rate": 5e-5,
    "lora_r": 16,
    "lora_targets": ["q_proj", "v_proj"],
    "max_length": 512,
    "batch_size": 16,
    "resume": False,
    "eval_data": None,
    "seed": 7,
}
SUMMARY = {
    "verb": "dpo",
    "title": "smollm2 fitted to 700 film-review comparisons with DPO",
    "date": "2026-03-14",
    "headline": "After training, the model wins 68 % [61, 75] of head-to-heads with its start on 60 held-out prompts.",
    "scorer": "VADER compound sentiment, a lexicon standing in for a person",
    "comparison": {
        "score_before": estimate(0.118, 0.071, 60),
        "score_after": estimate(0.482, 0.064, 60),
        "win_rate": {"value": 0.683, "low": 0.612, "high": 0.748, "n": 60},
        "kl": estimate(3.31, 0.79, 60),
        "distinct_2_before": estimate(0.912, 0.011, 60),
        "distinct_2_after": estimate(0.853, 0.016, 60),
        "length_before": estimate(41.2, 2.1, 60),
        "length_after": estimate(46.8, 2.4, 60),
        "prompts": 60,
        "samples": 4,
    },
    "data": {
        "train": "700 comparisons",
        "eval": "120 comparisons",
        "notes": ["3 rows skipped: chosen and rejected are the same text", "11 completions cut at 512 tokens"],
    },
    "cost": {
        "seconds": 372.0,
        "stages": [
            {"name": "load the model", "seconds": 4.2},
            {"name": "sample before", "seconds": 40.1},
            {"name": "reference log-probs", "seconds": 31.0},
            {"name": "train", "seconds": 211.4},
            {"name": "evaluate", "seconds": 38.2},
            {"name": "sample after", "seconds": 43.5},
        ],
        "peak_memory_gib": 2.41,
        "train_tokens": 214300,
        "pairs_per_second": 3.31,
    },
    "machine": {"cpu": "AMD EPYC 7763", "cores": 2, "device": "cpu", "torch": "2.11.0", "transformers": "5.17.0"},
    "command": "sartor dpo --model smollm2 --data reviews.jsonl --beta 0.1 --lora-r 16 --output runs/reviews --seed 7",
    "commit": None,
}


class Page(HTMLParser):
    """Tags and visible text, so that tests do not hang on the markup."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br", "path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page_of(run: Path) -> Page:
    report = write_report(run)
    assert report == run / "report.html"
    page = Page(report.read_text(encoding="utf-8"))
    assert not page.open, "unbalanced tags"
    return page


def edit(run: Path, **changes: object) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | changes))


def test_figures_stand_with_interval_and_n(tmp_path: Path) -> None:
    text = page_of(fake_run(tmp_path)).text
    assert "Not in this run folder" not in text
    for expected in (
        SUMMARY["headline"],
        "68 % [61, 75]n = 60 prompts scores better",  # win rate
        "0.12→0.48 [0.05, 0.19] → [0.42, 0.55]n = 60 prompts higher",
        "3.3 [2.5, 4.1]n = 60 prompts",  # KL
        "68 % [60, 76] · n = 120 prompts",  # held-out accuracy at the last step: 0.5 + 0.19 (1 - e^-3)
        "seed 7",
    ):
        assert expected in text


def test_order_is_answer_evidence_details(tmp_path: Path) -> None:
    text = page_of(fake_run(tmp_path)).text
    marks = ["wins 68 %", "Win rate against", "film that I had been told", "Nats per completion since", "Margins, pair"]
    marks += ["The model became narrower", "Wall-clock time", "sartor dpo --model", "learning_rate"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_one_file_without_scripts_or_links_outside(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    page = page_of(run)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 6
    assert all(link.startswith("#") for link in page.links)
    html = (run / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "#01020" not in html, "a plot kept a colour that is not the page's"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    sample = {"prompt": [{"role": evil, "content": evil}, {"role": "user", "content": evil}]}
    sample |= {"before": [evil], "after": [evil + "y" * 2000 + evil], "score_before": [evil], "score_after": None}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": evil, evil: "x", "beta": evil, "seed": evil}))
    stages = [{"name": evil, "seconds": 3.0}]
    edit(run, headline=evil, title=evil, scorer=evil, command=evil, verb=evil, date=evil, cost={"stages": stages})
    edit(run, machine={evil: evil}, data={evil: evil, "notes": [evil]}, commit=evil)
    page = page_of(run)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.text.count("alert(1)") >= 15


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_said(tmp_path: Path, name: str) -> None:
    run = fake_run(tmp_path)
    (run / name).unlink()
    text = page_of(run).text
    assert f"Not in this run folder: {name} ({FILES[name]})." in text
    in_place = {
        "summary.json": "The command was not recorded",
        "metrics.jsonl": "this run has no held-out accuracy",
        "samples.jsonl": "this run has no sample completions",
        "margins.json": "this run has no margins by pair",
        "config.yaml": "No options: config.yaml",
    }
    assert in_place[name] in text


def test_empty_folder_gives_a_page(tmp_path: Path) -> None:
    text = page_of(tmp_path).text
    assert "No result yet" in text
    assert all(name in text for name in FILES)


def test_summary_keys_may_be_missing(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    for key in SUMMARY:
        edit(run, **{key: None})
        page_of(run)
    (run / "summary.json").write_text("{}")
    text = page_of(run).text
    assert "smollm2 fitted to reviews.jsonl" in text  # the title, from the options
    assert "Held-out accuracy 68 % [60, 76], n = 120 prompts: better than chance." in text


def test_broken_files_are_counted(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "spl')  # killed while writing
    (run / "margins.json").write_text("[1, 2]")
    (run / "config.yaml").write_text("a: [")
    text = page_of(run).text
    assert "metrics.jsonl: 1 of 68 lines could not be read (line 68)" in text
    assert "margins.json could not be read: wanted a mapping, got list" in text
    assert "config.yaml could not be read" in text


def test_resumed_run_shows_the_later_row(tmp_path: Path) -> None:
    seen = [(0, 0.5), (9, 0.6), (9, 0.7)]
    rows = [{"step": step, "split": "eval", "rewards/accuracies": estimate(value, 0.1)} for step, value in seen]
    rows.append({"split": "eval", "rewards/accuracies": estimate(0.9, 0.1)})  # of no step: cannot be placed
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(s, e.value) for s, e in read_run(tmp_path).held_out("rewards/accuracies")] == [(0, 0.5), (9, 0.7)]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None, "n/a", {}])
def test_values_that_are_not_numbers(tmp_path: Path, bad: object) -> None:
    run = fake_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[-9:]:
        row |= dict.fromkeys(row.keys() - {"step", "split"}, bad)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "margins.json").write_text(json.dumps({"margins": [bad, 0.5]}))
    broken = {key: {"value": bad, "low": bad, "high": bad, "n": bad} for key in SUMMARY["comparison"]}
    edit(run, comparison=broken, cost={"seconds": bad, "stages": [{"name": "train", "seconds": bad}]})
    text = page_of(run).text
    assert NOT_MEASURABLE in text
    assert "Training loss: not finite in 8 of 60 steps, first at step 53." in text
    assert "Margins: 1 of 2 are not finite" in text
    for word in ("nan", "inf", "None"):
        assert word not in text.split(), word


def test_interval_of_one_prompt_is_unknown(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    edit(run, headline=None, comparison={"win_rate": {"value": 1.0, "low": -INF, "high": INF, "n": 1}})
    text = page_of(run).text
    assert f"100 % [no interval: one unit], n = 1 prompt: {NO_INTERVAL}." in text


def test_warnings_only_where_intervals_part(tmp_path: Path) -> None:
    run, comparison = fake_run(tmp_path), dict(SUMMARY["comparison"])
    text = page_of(run).text
    assert "distinct-2 fell from 0.912 [0.901, 0.923] to 0.853 [0.837, 0.869]" in text
    assert "longer, from" not in text  # clear, but 14 % is not a lot
    edit(run, comparison=comparison | {"length_after": estimate(61.8, 2.4), "distinct_2_after": estimate(0.9, 0.016)})
    text = page_of(run).text
    assert "Completions grew 50 % longer" in text
    assert "narrower:" not in text
    edit(run, comparison=comparison | {"length_after": estimate(61.8, 20.0)})
    assert "longer, from" not in page_of(run).text


def test_first_prompts_open_the_rest_folded(tmp_path: Path) -> None:
    run = fake_run(tmp_path, prompts=15)
    html = write_report(run).read_text()
    before, after = html.split('<details class="fold">')
    assert (before.count('class="sample"'), after.count('class="sample"')) == (12, 3)
    assert "3 more prompts" in after


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.5, 0.6, NO_DIFFERENCE), (0.4, 0.5, NO_DIFFERENCE), (0.5001, 0.6, "better"), (0.4, 0.4999, "worse")],
)
def test_verdict_at_the_boundary(low: float, high: float, word: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 50), 0.5) == word


def test_verdict_without_a_measurement() -> None:
    assert verdict(Estimate(NAN, NAN, NAN, 0), 0.5) == NOT_MEASURABLE
    assert verdict(Estimate(1.0, -INF, INF, 1), 0.5) == NO_INTERVAL
    assert verdict(Estimate(1.0, NAN, NAN, 1), 0.5) == NO_INTERVAL


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.2, 0.3, NO_DIFFERENCE), (0.21, 0.3, "higher"), (-0.3, -0.1, "lower")]
)
def test_shift_at_the_boundary(low: float, high: float, word: str) -> None:
    assert shift(Estimate(0.1, 0.0, 0.2, 9), Estimate((low + high) / 2, low, high, 9)) == word


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.54, 0.503, 0.61, "54.0 % [50.3, 61.0]"),  # not "[50, 61]", which would contradict "better"
        (0.543, 0.541, 0.546, "54.30 % [54.10, 54.60]"),
        (0.5, 0.5, 0.5, "50 % [50, 50]"),
    ],
)
def test_digits_follow_the_interval(value: float, low: float, high: float, expected: str) -> None:
    assert str(figure(Estimate(value, low, high, 50), percent=True)).replace("\u00a0", " ") == expected


def test_number_prints_no_negative_zero() -> None:
    assert [number(-0.001, 2), number(-0.0), number(-1234.5, 1), number(INF)] == ["0.00", "0", "−1,234.5", "n/a"]


def test_plain_number_is_not_certain() -> None:
    found = read_estimate(0.9)
    assert found is not None
    assert verdict(found, 0.5) == NO_INTERVAL
    assert read_estimate(True) is None


def test_change_of_logps_has_the_paired_interval(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path))
    last = change(run, "chosen")[-1][1]
    assert last.value == pytest.approx(-6 * (1 - math.exp(-3)))
    assert last.high - last.low == pytest.approx(2 * 0.22 / BETA * (1 - math.exp(-3)))  # not 22, that of the level
    run.config["beta"] = 0.5  # rewards that are not beta times the change say nothing about its interval
    assert change(run, "chosen")[-1][1].high == INF


def test_bars_do_not_straddle_zero() -> None:
    left, right = histogram([-0.31, -0.02, -0.02, -1.7], name="h"), histogram([0.31, 0.02, 0.02, 1.7], name="h")
    # The bin right of zero is drawn in either case (it may be empty), so blue is in both and orange in one.
    assert ("var(--orange)" in left, "var(--orange)" in right) == (True, False)
    assert bars(left, "orange") == bars(right, "blue")
    for values in ([0.0], [0.0, 0.0], [5.0], [-5.0], [1e-9, 2e-9], [-1e6, 1e-3]):
        assert "<svg" in histogram(values, name="h")


def bars(svg: str, colour: str) -> int:
    """Number of bars of a colour with a height."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--(\w+)\)', svg)
    return sum(c == colour and len(set(re.findall(r" ([\d.]+) \n", d))) > 1 for d, c in paths)


def test_curve_takes_one_point_and_unknown_intervals() -> None:
    assert "<svg" in curve({"blue": [(3.0, Estimate(0.5, -INF, INF, 1))]}, name="c")
    assert "<svg" in curve({"blue": []}, name="c", faint=([1.0], [0.3]))


def test_clip_loses_nothing() -> None:
    text = "word " * 400
    head, rest = clip(text)
    assert head + rest == text
    assert 0 < len(rest) < len(text)


def test_ragged_and_odd_samples() -> None:
    rows = [{"prompt": None, "before": ["a\ud800"], "after": ["b", "c"], "score_after": [1.0]}, {"prompt": "p"}]
    samples = read_samples(rows)
    assert [t.score for t in samples[0].after] == ["1.00", ""]
    assert samples[1].before == []


def test_half_a_surrogate_is_written(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "p", "before": ["a\ud800b"], "after": ["c"]}))
    assert "a?b" in page_of(tmp_path).text


def test_line_separator_inside_a_text_does_not_cut_the_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p", "before": ["one\u2028two"], "after": []}, ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_text(row + "\n", encoding="utf-8")
    assert "one two" in page_of(tmp_path).text
