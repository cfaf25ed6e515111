"""Draws of a search that learns: of the space, none twice, by what trials came to, the same whenever."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrator.distill.choosing.draw import STORAGE, draw
from orchestrator.distill.context import RunContext, Workplace
from orchestrator.study.spec import DrawSpec

LINE = {"recipe.optimizer.lr": {"low": 0.0, "high": 1.0}}
Value = Callable[[dict[str, Any]], tuple[float, ...]]


@dataclasses.dataclass
class Search:
    """Rounds of draws whose trials come to what `value` says."""

    folder: Path
    value: Value
    settings: dict[str, Any]
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def round(self, count: int) -> list[dict[str, Any]]:
        """Draw once more."""
        number = len(list(self.folder.glob("*")))
        out = self.folder / f"{number}"
        out.mkdir()
        inputs = {"previous": self.folder / f"{number - 1}"} if number else {}
        last = self.points[-self.count :] if number else []
        spec = DrawSpec(
            previous="before" if number else None,
            told=tuple(map(self.value, last)),
            count=count,
            seed=3,
            **self.settings,
        )
        place = Workplace(inputs, out, out, out, RunContext(store=str(self.folder)), print)
        found: list[dict[str, Any]] = draw(spec, place)["points"]
        self.points += found
        self.count = len(found)
        return found

    count: int = 0

    @property
    def storage(self) -> Any:
        """What Optuna has kept."""
        newest = self.folder / f"{len(list(self.folder.glob('*'))) - 1}"
        backend = optuna.storages.journal.JournalFileBackend(str(newest / STORAGE))
        return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))


def settings(*spaces: dict[str, Any], sampler: str = "tpe", goals: tuple[str, ...] = ("minimize",), **more: Any) -> Any:
    return {"spaces": spaces, "whole": (), "sampler": sampler, "directions": goals, **more}


def parabola(point: dict[str, Any]) -> tuple[float, ...]:
    return ((point["recipe.optimizer.lr"] - 0.3) ** 2,)


def made(tmp_path: Path, value: Value, *spaces: dict[str, Any], **more: Any) -> Search:
    folder = tmp_path / f"search-{len(list(tmp_path.glob('*')))}"
    folder.mkdir()
    return Search(folder, value, settings(*spaces, **more))


def test_what_trials_came_to_is_told_to_optuna_in_the_order_of_their_points(tmp_path: Path) -> None:
    search = made(tmp_path, parabola, LINE)
    first = search.round(3)
    search.round(2)
    kept = search.storage.trials
    assert [trial.params["0 recipe.optimizer.lr"] for trial in kept] == [
        p["recipe.optimizer.lr"] for p in search.points
    ]
    assert [trial.values for trial in kept[:3]] == [list(parabola(point)) for point in first]
    assert [trial.state.name for trial in kept] == ["COMPLETE"] * 3 + ["RUNNING"] * 2
    assert search.storage.direction.name == "MINIMIZE"


def test_a_search_learns(tmp_path: Path) -> None:
    search = made(tmp_path, parabola, LINE)
    for _ in range(15):
        search.round(2)
    near = [abs(point["recipe.optimizer.lr"] - 0.3) < 0.1 for point in search.points[4:]]
    assert sum(near) / len(near) > 0.4  # of draws by chance it would be a fifth


def test_the_other_way_round_it_goes_away_from_there(tmp_path: Path) -> None:
    search = made(tmp_path, parabola, LINE, goals=("maximize",))
    for _ in range(15):
        search.round(2)
    far = [point["recipe.optimizer.lr"] > 0.8 for point in search.points[4:]]
    assert sum(far) / len(far) > 0.4


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "qmc"])
def test_the_same_results_give_the_same_draws(tmp_path: Path, sampler: str) -> None:
    space = {
        "recipe.optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "operator": [{"kind": "a"}, {"kind": "b"}],
    }

    def value(point: dict[str, Any]) -> tuple[float, ...]:
        return point["recipe.optimizer.lr"], float(point["operator"]["kind"] == "b")

    goals = ("minimize", "maximize")
    one, other = (made(tmp_path, value, space, sampler=sampler, goals=goals) for _ in range(2))
    for search in (one, other):
        for _ in range(8):
            search.round(2)
    assert one.points == other.points and len({str(point) for point in one.points}) == 16
    assert all(1e-4 <= point["recipe.optimizer.lr"] <= 1e-1 for point in one.points)
    assert [goal.name for goal in one.storage.directions] == ["MINIMIZE", "MAXIMIZE"]


def test_no_point_is_drawn_twice_and_a_space_comes_to_its_end(tmp_path: Path) -> None:
    spaces = ({"seed": [1, 2, 3]}, {"schedule.choice": [{"take": 1}, {"take": 2}], "seed": [4]})
    search = made(tmp_path, lambda point: (float(point["seed"]),), *spaces)
    drawn = [search.round(2) for _ in range(4)]
    assert [len(points) for points in drawn] == [2, 2, 1, 0]
    every = [{"seed": 1}, {"seed": 2}, {"seed": 3}, *({"schedule.choice": {"take": n}, "seed": 4} for n in (1, 2))]
    assert sorted(map(str, search.points)) == sorted(map(str, every))


def test_ranges_are_whole_in_steps_and_within_their_bounds(tmp_path: Path) -> None:
    space = {
        "recipe.batch_size": {"low": 2, "high": 8, "step": 3},
        "recipe.optimizer.lr": {"low": 0, "high": 1, "step": 0.5},
    }
    search = made(tmp_path, lambda point: (0.0,), space, whole=("recipe.batch_size",))
    for _ in range(5):
        search.round(2)
    points = {(point["recipe.batch_size"], point["recipe.optimizer.lr"]) for point in search.points}
    assert points == {(batch, rate) for batch in (2, 5, 8) for rate in (0.0, 0.5, 1.0)}
    assert all(isinstance(point["recipe.batch_size"], int) for point in search.points)
