"""Homes whose stores are written by hand, and an MLflow database to begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.record.handmade import Hand


@pytest.fixture
def hand(tmp_path: Path) -> Hand:
    """A home without a stage, and the study that wants twelve."""
    return Hand(tmp_path)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, for making one takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked(hand: Hand, empty_database: Path) -> Hand:
    """The same with a database of MLflow in it."""
    shutil.copy(empty_database, hand.home.root / "mlflow.db")
    return hand
