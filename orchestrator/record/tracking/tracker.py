"""Store -> MLflow: study run > trial run > stage run.

One process replays what stages wrote. Invariant: replaying is idempotent and may stop anywhere: a run is found again
by its tag, a journal line has one time and one step, MLflow ignores a point that it has, and what is sent once only
carries a mark on its run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.distill.training.journal import read_journal
from orchestrator.record.choices import Chosen, choices_of
from orchestrator.record.decisions import choice_line
from orchestrator.record.home import Home
from orchestrator.record.probe_results import probe_numbers, probe_result
from orchestrator.record.provenance import Provenance
from orchestrator.record.remembered import variant_of, variants
from orchestrator.record.task_results import task_numbers, task_results
from orchestrator.record.tracking import entry as entries
from orchestrator.record.tracking.entry import OUTCOME, Entry, Point, path_identity, stage_identity
from orchestrator.record.tracking.experiment import describe, digest, show
from orchestrator.record.tracking.names import Path as TrialPath
from orchestrator.record.tracking.names import shown
from orchestrator.record.tracking.runs import BATCH, Runs
from orchestrator.record.tracking.source import data_of, remembered_source, source_tags, study_text
from orchestrator.record.tracking.view import front_view, view_link, view_name
from orchestrator.run.store import Store
from orchestrator.study.plan import Plan
from orchestrator.study.spec import ThroughputSpec, short
from orchestrator.study.stages import Step

FAILURE, TRACEBACK = (
    "layerswap.failure",
    "layerswap.traceback",
)  # tags: why a run failed; the attempt whose file is there

CHOICES = "layerswap.choices"  # tag: which choices were sent


class Tracker:
    """Keeps one study's MLflow runs in step with the store. Any call may raise what MLflow raises; then make a new one.

    A `live` one marks the runs it finds as running again. `provenance` says where results come from, if it is known.
    """

    def __init__(
        self,
        home: Home,
        plan: Plan,
        speeds: dict[str, ThroughputSpec],
        live: bool = True,
        provenance: Provenance | None = None,
    ) -> None:
        self.plan, self.speeds, self.shown = plan, speeds, shown(plan)
        self.store = Store(home.store)
        self.closed: set[str] = set()  # identities that need no more attention
        self.variants = variants(home, plan.study.study)
        self.variant = variant_of(home, plan)
        self.lasts: dict[str, int] = {}  # key of a finished stage -> the last step of its journal
        self.source = source_tags(provenance or remembered_source(self.variant))
        self.newest = live or not self.variants or self.variants[0].id == self.variant.id
        self.runs = Runs(home, plan.study.study, live, self.newest, self.source, data_of(plan))

    def replan(self, plan: Plan, speeds: dict[str, ThroughputSpec]) -> None:
        """Go on with a plan that may have grown."""
        if plan is not self.plan:
            self.plan, self.speeds, self.shown = plan, speeds, shown(plan)
            self.closed.discard("study")

    @property
    def heard(self) -> float:
        """When MLflow last answered, in monotonic seconds."""
        return self.runs.heard

    def sync(self) -> None:
        """Send what is new: runs of started stages, journal points, results of finished ones."""
        self._study_run()
        for step in (self.plan.teacher, *self.plan.controls.values()):
            self._stage(step)
        for path in self.shown.paths:
            self._path(path)

    def finish(self, stopped: dict[str, int], failures: dict[str, str], summary: dict[str, float]) -> None:
        """Send the rest and give every run its true status: trials of `stopped` were ended early, the rest is read."""
        self.runs.find()  # the client asks once more where no answer comes, and a server that was away does both
        self.sync()
        self._asked()
        alone = [self.plan.teacher, *self.plan.controls.values()]
        complete = all(self._finished(step) for step in alone)
        for path in self.shown.paths:
            complete &= self._end_path(path, stopped, failures)
        for step in self.plan.steps:
            run = self.run_id(step)
            if run is not None and stage_identity(step) not in self.closed:
                self._end_stage(step, run)
        study, failed = self._study_run(), bool(failures) or any(self._failure(step) for step in self.plan.steps)
        if not self.newest:  # its own runs only: the study's tells of the newest
            return
        describe(self.runs.client, self.runs.experiment, self.plan.study.question)
        self.runs.score(study, summary)
        status = "FINISHED" if complete and not failures else "FAILED" if failed else "KILLED"
        self.runs.close(study, status, None if self.runs.live else self._ended(tuple(self.plan.steps)))

    def add_files(self, files: list[Path]) -> None:
        """Give the study run its files, in a folder for every variant, and MLflow a model for every finished student,
        without copying weights."""
        study, folder = self._study_run(), self.variant.id
        self.runs.add_text(study, f"{folder}/resolved.yaml", study_text(self.plan))
        as_written = self.variant.folder / "study.yaml"
        for path in [*files, *([as_written] if as_written.is_file() else [])]:
            self.runs.add_file(study, path, folder)
        for step in self.plan.steps:
            run = self.run_id(step)
            if run is None:
                continue
            self._add_traceback(step, run)
            if step.swapped and getattr(step.train, "phases", ()) and self.store.finished(step.evaluate.key):
                key = step.train.key
                self.runs.add_model(run, f"student-{short(key)}", key, str(self.store.artefacts(key).resolve()))

    def run_id(self, step: Step) -> str | None:
        """The MLflow run of a step's stage."""
        return self.runs.ids.get(stage_identity(step))

    def _asked(self) -> None:
        """What tasks and probes found of students and their teacher, beside the rest of their runs."""
        found = {key: task_numbers(tasks) for key, tasks in task_results(self.store).items()}
        for step in self.plan.steps:
            numbers = probe_numbers(probe_result(self.store, step)) if step.probes else {}
            found[step.train.key] = found.get(step.train.key, {}) | numbers
        for key, numbers in found.items():
            run = self.runs.ids.get(f"stage:{key}")
            if run is not None and numbers:
                self.runs.score(run, numbers)

    def _end_path(self, path: TrialPath, stopped: dict[str, int], failures: dict[str, str]) -> bool:
        """Give the run of a path its last status, if there is one; says whether nothing more is wanted of the path."""
        early = [trial.name for trial in path.trials if trial.name in stopped]
        done = bool(early) or (not path.open and all(self._finished(step) for step in path.steps))
        run = self.runs.ids.get(path_identity(path))
        if run is None:
            return done
        told = [failures[trial.name] for trial in path.trials if trial.name in failures]
        told += [failure["error"] for step in path.steps if (failure := self._failure(step))]
        self.runs.renew(run, {"layerswap.stopped_early": str(bool(early)).lower()})
        self._mark_failed(run, None if done or not told else str(told[0]))
        status = "FINISHED" if done else "FAILED" if told else "KILLED"
        over = done or self._failed(path.steps) is not None
        self.runs.close(run, status, self._ended(path.steps) if over else None)
        return done

    def _end_stage(self, step: Step, run: str) -> None:
        failure = self._failure(step)
        self._mark_failed(run, None if failure is None else str(failure["error"]))
        if not self.store.finished(step.evaluate.key):
            self.runs.close(run, "KILLED" if failure is None else "FAILED", self._failed((step,)))

    def _mark_failed(self, run: str, why: str | None) -> None:
        if why is None:
            self.runs.forget(run, FAILURE)
        else:
            self.runs.renew(run, {FAILURE: why[:5000]})

    def _add_traceback(self, step: Step, run: str) -> None:
        """The traceback of a stage's last failure as a file of its run, once for every attempt."""
        failure, attempt = self._failure(step), self.store.attempt(step.train.key) or {}
        if failure is not None:
            text, number = str(failure.get("traceback") or failure["error"]), str(attempt.get("number", 1))
            mark = f"{number} {digest(text)}"
            if self.runs.tags[run].get(TRACEBACK) != mark:
                self.runs.add_text(run, f"failure-{number}.txt", text)
                self.runs.renew(run, {TRACEBACK: mark})

    def _finished(self, step: Step) -> bool:
        return all(self.store.finished(spec.key) for spec in (step.evaluate, *step.probed))

    def _failure(self, step: Step) -> dict[str, Any] | None:
        """Why a step's stage, evaluation or probes failed last, the first of them that did."""
        failures = (self.store.failure(spec.key) for spec in (step.train, step.evaluate, *step.probed))
        return next((failure for failure in failures if failure is not None), None)

    def _study_run(self) -> str:
        study = self.plan.study
        link = f"[Quality against speed]({view_link(self.runs.experiment, self.runs.home_id)})"
        note = "\n\n".join(filter(None, [study.question, link]))
        made = Entry("study", study.study, tags={"layerswap.role": "study"}, note=note)
        run = self.runs.open(made, self._study_began)
        if "study" not in self.closed:
            self.closed.add("study")
            self.runs.reopen(run)
            if self.runs.live:
                self.runs.renew(run, self.source)
            if self.newest:
                paths = {path_identity(path) for path in self.shown.paths}
                view = front_view(self.plan, self.shown, self.runs.home_id)
                show(self.runs.client, self.runs.experiment, view_name(self.runs.home_id), view)
                self.runs.set_aside({"study", *paths, *(stage_identity(step) for step in self.plan.steps)})
        return run

    def _study_began(self) -> int | None:
        """When the study was first run: by what its home remembers, else, looking back, when its first stage began."""
        remembered = [int(1000 * run["started"]) for variant in self.variants for run in variant.runs()]
        if remembered or self.runs.live:
            return min(remembered, default=None)
        return self._began(tuple(self.plan.steps))

    def _path(self, path: TrialPath) -> None:
        """The run of a path: quality and speed over its tokens, one point a stage, with links to the stages."""
        identity = path_identity(path)
        if identity in self.closed or not any(self.store.begun(step.train.key) for step in path.steps):
            return
        run = self.runs.open(entries.path_entry(path), lambda: self._began(path.steps))
        for step in path.steps:
            self._stage(step)
            if (stage := self.run_id(step)) is not None:  # a closed stage learns what became of it, too
                self.runs.renew(stage, {OUTCOME: entries.outcome_of(self.shown, step)})
        chosen = choices_of(self.plan, self.store, path.trials[:1])
        if path.open or not all(self.store.finished(step.evaluate.key) for step in path.steps):
            self.runs.reopen(run)
        told = [*entries.choice_results(self.store, chosen), *entries.path_results(self.store, path, self.speeds)]
        self.runs.tell(run, told)
        self._add_choices(run, chosen)
        self.runs.note(run, "\n".join(filter(None, [*map(choice_line, chosen), self._links(path)])))
        if not path.open and all(stage_identity(step) in self.closed for step in path.steps):
            self.closed.add(identity)

    def _add_choices(self, run: str, chosen: Sequence[Chosen]) -> None:
        """The decisions of a path as a file of its run, anew when there are more."""
        text = entries.choices_json(chosen)
        if chosen and self.runs.tags[run].get(CHOICES) != digest(text):
            self.runs.add_text(run, "choices.json", text)
            self.runs.renew(run, {CHOICES: digest(text)})

    def _links(self, path: TrialPath) -> str:
        lines = []
        for step in path.steps:
            if not self.store.finished(step.evaluate.key):
                break
            ratio = self.store.result(step.evaluate.key)["perplexity_ratio"]
            lines.append(
                f"- layers {list(step.swapped)}: ratio {ratio:.3f} ([stage {short(step.train.key)}]"
                f"(#/experiments/{self.runs.experiment}/runs/{self.run_id(step) or ''}))"
            )
        return "\n".join(lines)

    def _stage(self, step: Step) -> None:
        key, identity = step.train.key, stage_identity(step)
        if identity in self.closed or not self.store.begun(key):
            return
        run = self.runs.open(entries.stage_entry(self.shown, step), lambda: self._began((step,)))
        speed = self.speeds.get(key)
        if not self.store.finished(step.evaluate.key):
            self.runs.reopen(run)
        results = entries.stage_results(self.store, step, speed, self._last(key)) if self.store.finished(key) else []
        if not results or self.runs.lacks(run, results):
            self.runs.resume(run)
            self._journal(run, key)
            self.runs.tell(run, results)
        if results and self.runs.status[run] != "FINISHED":
            self.runs.close(run, "FINISHED", self._ended((step,)))
        if len(results) == 1 + (speed is not None):
            self.runs.forget(run, FAILURE)
            self.closed.add(identity)
        self.runs.heard = time.monotonic()

    def _began(self, steps: tuple[Step, ...]) -> int | None:
        """When the first of stages began, in milliseconds since 1970: an attempt at it, or its journal's first line."""
        times = []
        for key in (step.train.key for step in steps):
            if not self.store.begun(key):
                continue
            known = [line["time"] for line in read_journal(self.store.folder(key))[:1]]
            attempt = self.store.attempt(key)
            if attempt is not None:
                known.append(attempt["started"])
            if not known:  # a mirror has no attempts
                done = self.store.done(key)
                known.append(done["finished"] - done["seconds"])
            times.append(min(known))
        return min((int(1000 * began) for began in times), default=None)

    def _ended(self, steps: tuple[Step, ...]) -> int | None:
        """When the last of stages was evaluated or failed, in milliseconds since 1970; None before the first one."""
        finished = [key for step in steps if self.store.finished(key := step.evaluate.key)]
        times = [int(1000 * self.store.done(key)["finished"]) for key in finished]
        failed = self._failed(steps)
        return max(times if failed is None else [*times, failed], default=None)

    def _failed(self, steps: tuple[Step, ...]) -> int | None:
        """When the last of stages failed, in milliseconds since 1970; None where none did."""
        times = [failure["time"] for step in steps if (failure := self._failure(step)) and "time" in failure]
        return max((int(1000 * time) for time in times), default=None)

    def _last(self, key: str) -> int:
        """The last step in the journal of a finished stage, which writes no more; 0 of one that trains nothing."""
        if key not in self.lasts:
            self.lasts[key] = max((line["step"] for line in read_journal(self.store.folder(key))), default=0)
        return self.lasts[key]

    def _journal(self, run: str, key: str) -> None:
        batch: list[Point] = []
        for points in entries.journal_points(self.store, key, self.runs.sent[run]):
            if len(batch) + len(points) > BATCH:
                self.runs.send(run, batch)
                batch = []
            batch += points
        self.runs.send(run, batch)
