"""MLflow's database of a home: made whole, by one process."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from mlflow import MlflowClient

from orchestrator.record.home import Home
from orchestrator.record.runs import make_database


def test_two_makers_and_a_torn_beginning_give_one_whole_database(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "mlflow.db.part").write_bytes(b"half a database")
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=make_database, args=(home,)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(100)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert [e.name for e in MlflowClient(tracking_uri=home.database).search_experiments()] == ["Default"]
    assert not (tmp_path / "mlflow.db.part").exists()
