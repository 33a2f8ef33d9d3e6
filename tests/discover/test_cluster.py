"""Jobs as Ray tasks: the same outcomes as here, workers and nodes that go cost one job, errors stay readable."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.config import DiscoverConfig
from sartor.discover import cluster
from sartor.discover.archive import Archive
from sartor.discover.cluster import Cluster, share
from sartor.discover.command import run_discover
from sartor.discover.language.printing import to_python
from sartor.discover.workbench import Job, Workbench, job_of
from sartor.errors import UserError

ONE = {"num_cpus": 1, "include_dashboard": False}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Ray would keep one in the user's home."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with a CPU each."""
    pytest.importorskip("ray", reason="needs sartor[ray]")
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_AUTH_MODE", "disabled")
        patched.setenv("SARTOR_CACHE", str(tmp_path_factory.mktemp("cache")))  # workers have what the nodes have
        found = Nodes(initialize_head=True, head_node_args=ONE)
        found.add_node(**ONE)
    yield found
    found.shutdown()


def config_of(folder: Path, **options: Any) -> DiscoverConfig:
    return DiscoverConfig(output=folder, **{"workers": 2, **options})


def noting(folder: Path, work: Callable[[Any, int], Any]) -> Callable[..., Any]:
    """What a worker does in place of ``_execute``: note the job in ``folder``, then ``work(job, try)``, then the job.

    A function in a function, with imports of its own: so it goes to workers by value, who cannot import this file.
    Without our types, too: a worker that need not know them starts in no time.
    """

    def noted(*args):
        import json

        import ray

        about = [args[-1].rung, args[-1].candidates[0]]
        with (folder / "notes.jsonl").open("a+") as file:
            file.write(json.dumps([*about, ray.get_runtime_context().get_node_id()]) + "\n")
            file.seek(0)
            tries = sum(json.loads(line)[:2] == about for line in file)
        found = work(args[-1], tries)
        if found is None:
            from sartor.discover.cluster import _execute

            return _execute(*args)
        return found

    return noted


def notes(folder: Path) -> list[list[Any]]:
    path = folder / "notes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class Light(Job):
    """A job that workers see no more of than its fields."""

    def __reduce__(self) -> Any:
        return SimpleNamespace, (), vars(self)


def a_job(number: int) -> Job:
    return Light("adapter", (number,), ("x",))


def test_a_search_over_two_nodes_survives_a_killed_worker(
    nodes: Any, sharp_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Name {i}. ", "chosen": f"A{7 * i % 5} yes", "rejected": f"b{i} no"} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"

    def first_waits_second_is_killed(job, tries):
        import os
        import signal
        import time

        about = job.rung, job.candidates[0]
        if about == ("adapter", 2) and tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        # Else one quick worker would have done it all before the other has started.
        while about == ("adapter", 1) and '["adapter", 2,' not in (tmp_path / "notes.jsonl").read_text():
            time.sleep(0.05)

    monkeypatch.setattr(cluster, "_execute", noting(tmp_path, first_waits_second_is_killed))
    monkeypatch.chdir(tmp_path)  # workers have another current folder, and find what is given by relative paths
    run_discover(
        config_of(
            Path("run"),
            model=str(sharp_folder),
            task="preferences",
            data="data.jsonl",
            start=("dpo", "ipo", "simpo"),
            candidates=16,
            adapters=1,
            seeds=0,
            lora_r=2,
            ray_address=nodes.address,
        )
    )
    done = notes(tmp_path)
    assert len({node for _, _, node in done}) == 2
    again = {job: times for job, times in Counter((rung, number) for rung, number, _ in done).items() if times > 1}
    assert again == {("adapter", 2): 2}
    assert "#2 on the adapter rung lost its worker and is run again" in capsys.readouterr().err

    archive = Archive(folder / "archive.sqlite", reads_only=True)
    texts = {one.number: to_python(one.tree) for one in archive.candidates() if one.tree is not None}
    there = {(one.rung, one.candidate): one.outcome for one in archive.results()}
    numbers = {rung: [n for at, n in there if at == rung] for rung in ("linear", "adapter")}
    assert len(numbers["linear"]) >= 16
    assert len(numbers["adapter"]) >= 4
    bench = Workbench(folder)
    for rung, some in numbers.items():
        settings = [there["linear", n].setting for n in some] if rung == "adapter" else []
        for number, here in zip(
            some, bench.execute(job_of(rung, some, [texts[n] for n in some], settings)), strict=True
        ):
            found = there[rung, number]
            assert found.setting == here.setting
            assert found.values == pytest.approx(here.values, abs=1e-4)
            assert found.measures == pytest.approx(here.measures, abs=1e-4)
            assert found.seconds > 0


def test_a_node_that_goes_costs_its_job_alone(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(job, tries):
        import time

        import ray

        # Until a node is gone; and for ever on that one, whose processes may outlive it by a moment.
        gone, here = tmp_path / "gone", ray.get_runtime_context().get_node_id()
        while not gone.exists() or gone.read_text() in ("", here):
            time.sleep(0.05)
        return []

    monkeypatch.setattr(cluster, "_execute", noting(tmp_path, waits))
    third = nodes.add_node(**ONE)
    runner = Cluster(config_of(tmp_path, workers=3, ray_address=nodes.address))
    try:
        jobs = [a_job(1), a_job(2), a_job(3)]
        for job in jobs:
            runner.submit(job)
        while len(notes(tmp_path)) < 3:
            time.sleep(0.05)
        (lost,) = [number for _, number, node in notes(tmp_path) if node == third.node_id]
        nodes.remove_node(third, allow_graceful=False)
        (tmp_path / "gone").write_text(third.node_id)
        ended = [runner.wait()[0] for _ in jobs]
        assert sorted(map(id, ended)) == sorted(map(id, jobs))
        assert sorted(number for _, number, _ in notes(tmp_path)) == sorted([1, 2, 3, lost])
    finally:
        runner.close()


def test_errors_of_workers_are_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Ray of its own, which ends with the runner."""
    ray = pytest.importorskip("ray", reason="needs sartor[ray]")

    def fails(job, tries):
        import os
        import signal

        if job.candidates == (1,):
            raise UserError("one line")
        if job.candidates == (2,):
            raise ZeroDivisionError("a bug")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cluster, "_execute", noting(tmp_path, fails))
    runner = Cluster(config_of(tmp_path, workers=1))
    try:
        runner.submit(a_job(1))
        with pytest.raises(UserError) as error:
            runner.wait()
        assert type(error.value) is UserError
        assert str(error.value) == "one line"
        runner.submit(a_job(2))
        with pytest.raises(ZeroDivisionError, match="in fails"):  # with the worker's traceback
            runner.wait()
        runner.submit(a_job(3))
        with pytest.raises(UserError, match=r"^#3 on the adapter rung lost its worker 3 times") as error:
            runner.wait()
        assert "\n" not in str(error.value)
        assert Counter(number for _, number, _ in notes(tmp_path)) == {1: 1, 2: 1, 3: 3}
    finally:
        runner.close()
    assert not ray.is_initialized()


def test_without_ray_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--workers: Ray is not installed; pip install 'sartor\[ray\]'.*$"):
        Cluster(config_of(tmp_path))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"])
def test_a_cluster_that_is_not_there_is_named(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs sartor[ray]")
    with pytest.raises(UserError, match=rf"^--ray-address {address}: .*$"):
        Cluster(config_of(tmp_path, ray_address=address))


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not there on the node .* that all nodes share"):
        cluster._bench(tmp_path / "elsewhere", tmp_path)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "gpus"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}], 2, 1, 0),
        ([{"CPU": 16.0}], 4, 4, 0),
        ([{"CPU": 16.0}, {"CPU": 8.0}], 3, 8, 0),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 3, 2, 0),  # 2.67 each would leave one out
        ([{"CPU": 2.0}], 3, 0.5, 0),
        ([{"CPU": 16.0, "GPU": 8.0}], 4, 4, 1),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}], 4, 4, 0.5),
        ([{"CPU": 8.0, "GPU": 1.0}], 6, 1, 0.1666),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, 2, 0.5),
        ([{}], 2, 1, 0),  # all that compute are gone: wait for one
    ],
)
def test_workers_share_the_nodes(nodes: list[dict[str, float]], workers: int, cpus: float, gpus: float) -> None:
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 512.0, "GPU": 8.0}}
    assert share([*alive, gone], workers) == (cpus, gpus)
