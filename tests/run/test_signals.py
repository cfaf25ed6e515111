"""Signals through the real command: what stops, what is said, what is left; nothing of anybody else's is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.distill.context import newest_step
from orchestrator.distill.training.journal import read_journal
from orchestrator.run.interrupt import Interrupt
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ray
STUDY = """
study: long
teacher: {kind: pretrain, layers: 2, hidden: 32, heads: 2, max_length: 64, tokens: 81_920_000, batch_size: 8}
data:
  train: {source: text, files: [text.txt]}
  validation: {source: text, files: [text.txt]}
  sequence_length: 64
  vocabulary: 300
operator: {kind: hyena}
schedule: {layer_order: bottom_up, layers_per_stage: 2}
recipe: {batch_size: 4, phases: [{tokens_per_layer: 5_120, losses: {kl: 1.0}}]}
evaluation: {tokens: 1024, prompts: 0}
controls: {skip: false, scratch: none}
throughput: {lengths: [64], decode_tokens: 8, repeats: 1}
"""
STRANGER = """
import sys, ray
ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=10**8, log_to_driver=False)
print(ray.get(ray.remote(lambda: "here").remote()), flush=True)
for _ in sys.stdin:
    print(ray.get(ray.remote(lambda: "still here").remote()), flush=True)
"""


class Long:
    """A study whose teacher trains for an hour, and its driver."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        (root / "long.yaml").write_text(STUDY)
        (root / "text.txt").write_text("".join(f"def f{i}(x): return x + {i} * {i % 7}\n" * 3 for i in range(2000)))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Run it until its teacher trains."""
        before = self.lines()
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.root / "long.yaml")]
        command += ["--home", str(self.home), "--checkpoint-seconds", "1000", *words]
        driver = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_until(lambda: self.lines() > before or driver.poll() is not None)
        assert driver.poll() is None, driver.communicate()
        return driver

    def lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.home.glob("store/*/*/journal.jsonl"))

    @property
    def teacher(self) -> Path:
        [journal] = self.home.glob("store/*/*/journal.jsonl")
        return journal.parent


def family(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(driver.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in found)
    return found


def no_orphan(of: list[psutil.Process]) -> None:
    """All end by themselves; a busy machine may take its time."""
    _, alive = psutil.wait_procs(of, timeout=PATIENCE)
    assert alive == []


def stopped_by_ctrl_c(of: Long, driver: subprocess.Popen[str]) -> tuple[str, int]:
    """Interrupt it as a terminal does, the whole group; what it said and the step of the checkpoint it left."""
    children = family(driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, told = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, told
    no_orphan(children)
    step = newest_step(of.teacher / "work")
    assert step == read_journal(of.teacher)[-1]["step"] > 0
    assert not (of.teacher / "failure.json").exists()
    return told, step


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Long:
    return Long(tmp_path_factory.mktemp("long"))


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[str]]:
    """Somebody else's Ray."""
    folder = tempfile.mkdtemp(prefix="stranger-")  # short, for a socket's path is
    command = [sys.executable, "-c", STRANGER, folder]
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "here\n"
    yield other
    other.communicate(timeout=PATIENCE)
    shutil.rmtree(folder)


def test_ctrl_c_stops_at_a_checkpoint_and_says_how_to_go_on(long: Long, stranger: subprocess.Popen[str]) -> None:
    """As a terminal sends it: to the whole process group."""
    told, step = stopped_by_ctrl_c(long, long.start())
    assert told.splitlines() == [
        "stopping at the next checkpoint; once more stops at once",
        "stopped; nothing finished is lost",
        f"  teacher goes on after step {step}, {step * 512:,} of 81,920,000 tokens",
        f"go on with: layerswap run {long.root}/long.yaml --home {long.home} --checkpoint-seconds 1000",
    ]
    assert list(long.home.glob("store/stop*")) == []
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{long.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("long")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["layerswap.role"]: run.info.status for run in runs} == {
        "study": "KILLED", "teacher": "KILLED"
    }  # fmt: skip
    assert stranger.stdin is not None and stranger.stdout is not None
    print("still there?", file=stranger.stdin, flush=True)
    assert stranger.stdout.readline() == "still here\n"


@pytest.mark.slow  # two processes of two more, that load everything
def test_ctrl_c_stops_all_ranks_of_a_stage_at_one_checkpoint(tmp_path: Path) -> None:
    ranked = Long(tmp_path)
    told, step = stopped_by_ctrl_c(ranked, ranked.start("--set", "numerics.world_size=2"))
    assert f"  teacher goes on after step {step}, {step * 512:,} of 81,920,000 tokens" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_sigterm_twice_stops_at_once(long: Long) -> None:
    driver = long.start()
    children = family(driver)
    os.kill(driver.pid, signal.SIGSTOP)  # so that the second comes before the first is served
    driver.send_signal(signal.SIGTERM)
    driver.send_signal(signal.SIGINT)
    os.kill(driver.pid, signal.SIGCONT)
    _, told = driver.communicate(timeout=PATIENCE)
    assert driver.returncode in (143, 130), told
    assert "stopped at once; nothing finished is lost, go on with the same command" in told
    no_orphan(children)
    assert list(long.home.glob("store/stop*")) == []


@pytest.mark.slow
def test_nothing_outlives_a_killed_driver(long: Long) -> None:
    driver = long.start()
    children = family(driver)
    temporary = {Path(file.path).parts[:3] for child in children for file in opened(child) if "layerswap-" in file.path}
    driver.kill()
    driver.communicate()
    no_orphan(children)
    assert temporary and not any(Path(*parts).exists() for parts in temporary)


def opened(process: psutil.Process) -> list[psutil._ntuples.popenfile]:
    try:
        return process.open_files()
    except psutil.Error:
        return []


def test_sigterm_stops_before_anything_began(long: Long) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(long.root / "long.yaml"), "--home", str(long.home)]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: handles(driver, signal.SIGTERM))
    driver.send_signal(signal.SIGTERM)
    _, told = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 143, told
    assert "Traceback" not in told and "go on with" in told


def test_a_signal_in_the_making_of_a_dataclass_has_its_exit_code(tmp_path: Path) -> None:
    """Python 3.11 kills itself with SIGINT where a `KeyboardInterrupt` left the `exec` of a string."""
    (tmp_path / "cut.py").write_text(
        "from orchestrator.run.interrupt import Interrupt\n"
        "with Interrupt():\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGTERM); [0 for _ in range(1000)]')\n"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    cut = subprocess.run(
        [sys.executable, "-m", "cut"], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert cut.returncode == 143, cut
    assert "nothing finished is lost" in cut.stderr


def test_an_error_that_a_signal_brought_about_is_an_interruption(capfd: pytest.CaptureFixture[str]) -> None:
    """As from a module whose import was cut short."""

    def interrupted(number: int) -> None:
        with Interrupt() as interrupt:
            interrupt.number = number
            raise RecursionError("half a module")

    with pytest.raises(SystemExit) as left:
        interrupted(signal.SIGINT)
    assert left.value.code == 130
    assert "nothing finished is lost" in capfd.readouterr().err
    with pytest.raises(RecursionError):  # a fault of our own
        interrupted(0)


def handles(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(mask >> (number - 1) & 1)
