"""The time left: the broker's order by hand, and whole runs whose durations are known, played by a clock of our own."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.screen.costs import (
    BESIDE,
    SHARES,
    TEXT,
    Cost,
    Costs,
    Observation,
    expected,
    kind_of,
    models_of,
    units,
)
from orchestrator.record.screen.earlier import earlier_observations
from orchestrator.record.screen.facts import Facts, Stage
from orchestrator.record.screen.time_left import TURN, Left, Task, Work, duration, played, time_left
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import make_plan, throughput_specs
from orchestrator.study.sources import resolve
from orchestrator.study.spec import ImportSpec, ProbesSpec, ThroughputSpec
from orchestrator.study.stages import stretches_of
from tests.record.handmade import STUDY, Hand

GRID = "[{recipe.joint.0.losses: [{kl: 1.0}, {ce: 1.0}, {kl: 1.0, ce: 0.5}], operator: [{kind: hyena, heads: 2}, {kind: hyena, order: 3}]}]"  # noqa: E501
LARGE = ("teacher.tokens=40_000", "recipe.phases=[{tokens: 8_000, losses: {kl: 1.0}}]")
LARGE += ("recipe.joint=[{tokens: 12_000, losses: {kl: 1.0}}]",)
PROBED = "evaluation.probes={lengths: [8, 16], windows: 4, needles: 2}"
PHASES = "recipe.phases=[{tokens: 6_000, losses: {mixer_mse: 1.0}}, {tokens: 6_000, losses: {kl: 1.0}}]"


@dataclasses.dataclass
class Job:
    """A stage of a run that is played: seconds until its first step, of each token, and after its last."""

    key: str
    spec: Any
    setup: float
    tokens: list[tuple[int, float]]
    done: float = 0.0  # seconds of it that are played
    since: float | None = None

    @property
    def seconds(self) -> float:
        return self.setup + sum(count * each for count, each in self.tokens)

    def stage(self) -> Stage:
        """As a look would find it."""
        if self.since is None:
            return Stage()
        trained, points, at = 0, [], self.setup
        for count, each in self.tokens:
            now = min(count, max(0, int((self.done - at) / each) // 160 * 160))
            points += [(trained + n, 1 / each) for n in range(160, now + 1, 160)]
            trained, at = trained + now, at + count * each
        known: dict[str, Any] = {"tokens": trained, "points": tuple(points), "fresh": True}
        if self.done < self.seconds:
            return Stage("running", since=self.since, heard=self.since + self.done, **known)
        beside = self.setup if hasattr(self.spec, "optimizer") else None
        return Stage("done", seconds=self.seconds, beside=beside, **known)


def noise(stage: str, most: float) -> float:
    """A factor within `most` of 1, another one for every stage, whatever its key is."""
    share = int(hashlib.sha256(stage.encode()).hexdigest()[:8], 16) / 2**32
    return 1 + most * (2 * share - 1)


def jobs_of(work: Work) -> dict[str, Job]:
    """What a machine of a thousand tokens a second would take; what does not train a seventh more than is guessed."""
    found = {}
    for index, (key, spec) in enumerate(work.specs.items()):
        stage, model = f"stage {index}", work.models.get(key)
        slow = 1 + 0.04 * model.layers + 0.25 * ("heads" in model.operator) if model else 1.0
        each = {"alone": 0.001, "beside": 0.0014, "layers": 0.0009}
        tokens = [(count, each[name] * slow * noise(stage, 0.1)) for name, count in stretches_of(spec)]
        setup = 1.5 * noise(f"{stage} setup", 0.3)
        if not tokens and key in work.models and spec.kind != "distil":
            setup = (BESIDE + 0.001 * SHARES[spec.kind] * units(spec)) * 1.15 * noise(stage, 0.1)
        found[key] = Job(key, spec, 4.0 if spec.kind == "tokens" else setup, tokens)
    return found


def run(work: Work, cores: int) -> list[tuple[float, Facts]]:
    """Play the run: what a look finds every four seconds, and at the end when it is over."""
    jobs, phases = jobs_of(work), ([], [], [])
    for job in jobs.values():
        phases[2 if isinstance(job.spec, ThroughputSpec) else int(isinstance(job.spec, ProbesSpec))].append(job)
    looks: list[tuple[float, Facts]] = []
    now = 0.0
    for number, phase in enumerate(phases):
        ranked = sorted(phase, key=lambda job: hasattr(job.spec, "optimizer"))  # stable: the plan's order
        while any(job.done < job.seconds for job in phase):
            busy = [job for job in phase if job.since is not None and job.done < job.seconds]
            free = cores - sum(min(job.spec.cores, cores) if number < 2 else cores for job in busy)
            for job in ranked:
                need = cores if number == 2 else min(job.spec.cores, cores)
                parents = [jobs[parent] for parent in job.spec.parents.values()]
                if job.since is None and all(parent.done >= parent.seconds for parent in parents):
                    if need > free:
                        break
                    job.since, free = now, free - need
                    busy.append(job)
            for job in busy:
                job.done += 0.25
            now += 0.25
            if now % 4 == 0:
                looks.append((now, {key: job.stage() for key, job in jobs.items()}))
    return [*looks, (now, {})]


def work_of(root: Path, *overrides: str) -> Work:
    """The handmade study with enough tokens that a run of it takes minutes."""
    (root / "study.yaml").write_text(STUDY)
    (root / "text.txt").write_text("a long convolution\n")
    document = read_document(root / "study.yaml", (*LARGE, *overrides))
    study = validate(document)
    plan = make_plan(document, study, resolve(study, root))
    return Work.of(plan, throughput_specs(plan, "test"))


SHAPES = {
    "three trials": ((), 2),
    "three trials on one core": ((), 1),
    "a wide grid": ((f"search.space={GRID}",), 2),
    "a wide grid on eight cores": ((f"search.space={GRID}", PROBED, "teacher.tokens=16_000"), 8),
    "one long path": (("teacher.layers=6", "search.space=[{seed: [0]}]", "controls={skip: false, scratch: none}"), 4),
    "no joint stage": (("teacher.layers=4", "recipe.joint=[]", "search.space=[{seed: [0, 1, 2, 3]}]", PROBED), 3),
    "stages of two threads": (("numerics.threads=2", "teacher.threads=2", PROBED), 3),
    "phases without logits": ((PHASES,), 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_from_a_third_on_it_is_within_a_fifth_of_the_truth(shape: str, tmp_path: Path) -> None:
    more, cores = SHAPES[shape]
    work = work_of(tmp_path, *more)
    *looks, (end, _) = run(work, cores)
    assert end > 45
    wrong = []
    for now, facts in looks:
        left, truth = time_left(work, facts, [], cores, now), end - now
        if now >= end / 3 and (left is None or abs(left.seconds - truth) > max(0.2 * truth, 3.0)):
            wrong.append((now, truth, left and round(left.seconds, 1)))
    assert wrong == [], f"of {end} s"


def task(key: str, seconds: float, *parents: str, cores: int = 1, trains: bool = True, running: bool = False) -> Task:
    return Task(key, seconds, cores, frozenset(parents), trains, running)


def test_stages_are_played_in_the_brokers_order() -> None:
    assert played([], 2) == 0
    alike = [task("a", 10), task("b", 10), task("c", 10)]
    assert played(alike, 2) == pytest.approx(20 + 2 * TURN)
    judged = [task("a", 5, running=True), task("x", 8, running=True), task("b", 10)]
    judged += [task("judge", 2, trains=False), task("c", 10, "judge")]  # b begins when the judge has ended, c beside it
    assert played(judged, 2) == pytest.approx(8 + 10 + TURN)
    waits = [task("a", 10, running=True), task("wide", 5, cores=2), task("c", 3)]  # c does not overtake
    assert played(waits, 2) == pytest.approx(10 + 5 + 3 + 2 * TURN)
    late = [task("a", 10), *(task(name, 4, "a") for name in "bcd")]  # three that fork after the first
    assert played(late, 4) == pytest.approx(14 + 2 * TURN)
    assert played(late, 1) == pytest.approx(22 + 4 * TURN)
    assert played([task("a", 1, "done before")], 1) == pytest.approx(1 + TURN)


def test_the_nearest_kind_counts_and_of_one_kind_this_run() -> None:
    kind = ("beside", "teacher", (1,), "hyena", 2)
    seen = [Observation((*kind[:3], "hyena", 1), 4.0, True), Observation(kind, 2.0, False)]
    assert Costs(seen).unit(kind) == (2.0, True)
    assert Costs([*seen, Observation(kind, 3.0, True)]).unit(kind) == (3.0, True)
    assert Costs(seen).unit((*kind[:3], "other", 2)) == (4.0, True)  # this run's before what is older
    assert Costs(seen).unit(("beside", "another teacher", (), "hyena", 2)) is None
    assert Costs([]).beside(kind) == BESIDE


def test_what_other_threads_took_is_told_for_ones_own() -> None:
    """The teacher trains on two threads, and the first student on one."""
    two, one = ("teacher", (2, 1, "float32", "torch")), ("teacher", (1, 1, "float32", "torch"))
    costs = Costs([Observation(("alone", *two, "", 0), 1.0, True)])
    assert costs.unit(("alone", *two, "", 0)) == (1.0, True)
    assert costs.unit(("beside", *one, "hyena", 1)) == (pytest.approx(1.7 * 2**0.75), False)
    assert costs.unit(("beside", *two, "hyena", 1)) == (pytest.approx(1.7), False)
    assert costs.unit(("beside", "teacher", (4, 1, "float32", "torch"), "hyena", 1)) == (
        pytest.approx(1.7 / 2**0.75),
        False,
    )


def test_older_measures_are_slowed_down_as_this_run_is() -> None:
    """What was measured twice took three times as long in this run."""
    kinds = [("beside", "teacher", (), "hyena", layers) for layers in (1, 2)]
    seen = [Observation(kinds[0], 1.0, False), Observation(kinds[1], 2.0, False), Observation(kinds[0], 3.0, True)]
    costs = Costs([Observation(("evaluate", "teacher", (), "", 0), 10.0, False), *seen])
    assert costs.slower == pytest.approx(3.0)
    assert costs.unit(kinds[1]) == (pytest.approx(6.0), True)
    assert costs.unit(("evaluate", "teacher", (), "", 0)) == (pytest.approx(30.0), True)


def test_until_it_is_measured_a_step_alone_stands_in_for_the_other_kinds() -> None:
    costs = Costs([Observation(("alone", "teacher", (), "", 0), 3.0, True)])
    found = {name: costs.unit((name, "teacher", (), "", 0)) for name in ("beside", "layers", "evaluate", "throughput")}
    assert found == {
        "beside": (pytest.approx(5.1), False),
        "layers": (4.5, False),
        "evaluate": (1.0, False),
        "throughput": (pytest.approx(0.6), False),
    }


def test_speeds_that_are_measured_until_they_are_sure_take_a_second_and_a_half_each_before_any_is_known(
    tmp_path: Path,
) -> None:
    for repeats, each in ((1, 0.0), (3, 5 * 1.5)):  # prefill and decode at two lengths, and training
        work = work_of(tmp_path, f"throughput={{lengths: [16, 32], decode_tokens: 8, repeats: {repeats}}}")
        spec = next(spec for spec in work.specs.values() if spec.kind == "throughput")
        for rate in (1e-9, 1.0):
            costs = Costs([Observation(("alone", work.models[spec.key].teacher), rate, True)])
            wanted = max(each, units(spec) * rate / 5) + BESIDE
            assert expected(spec, Stage(), work.models, costs) == Cost(pytest.approx(wanted), frozenset({"throughput"}))
        costs = Costs([Observation(kind_of("throughput", spec, work.models), 1e-3, True)])
        assert expected(spec, Stage(), work.models, costs) == Cost(pytest.approx(units(spec) * 1e-3))


@pytest.mark.parametrize("score", ["kl", "{probe: 320}", "{joint: 320}"])
def test_a_choice_that_nothing_like_it_was_measured_of_is_told_roughly(score: str, tmp_path: Path) -> None:
    choice = f"schedule={{choice: {{score: {score}, texts: 640}}}}"
    work = work_of(tmp_path, choice, "search.space=[{seed: [0]}]", "controls={skip: false, scratch: none}")
    [teacher] = [spec for spec in work.specs.values() if spec.kind == "teacher"]
    facts: Facts = {key: Stage() for key in work.specs}
    # A third of its 40,000 tokens, ten a second.
    facts[teacher.key] = Stage("running", tokens=13_440, points=((160, 10.0), (13_440, 10.0)), fresh=True)
    left = time_left(work, facts, [], 2, 0.0)
    assert left is not None and left.at_least
    if score == "kl":
        scores = [spec for spec in work.specs.values() if spec.kind == "score"]
        assert sum(units(spec) for spec in scores) == 640 * (
            2 + len(scores) - 1
        )  # the others keep the teacher's side from the first
        assert {"score"} <= left.guessed
    if "joint" in score:
        [blend] = [spec for spec in work.specs.values() if spec.kind == "blend"]
        assert units(blend) == 320
        found = expected(
            blend, Stage(), work.models, Costs([Observation(("alone", repr(teacher.architecture)), 0.1, True)])
        )
        assert found == Cost(pytest.approx(320 * 2.5 * 0.1 + BESIDE), frozenset({"blend"}))
        assert {"blend"} <= left.guessed


def test_text_and_an_imported_teacher_take_what_no_rate_tells(hand: Hand) -> None:
    brought = ImportSpec(fingerprint="f")
    models = models_of({brought.key: brought})
    known = Costs([Observation(("beside", "f", (), "hyena", 1), 3.0, True)])
    assert expected(brought, Stage(), models, known) == expected(hand.plan.tokens, Stage(), {}, known) == Cost(TEXT)


def all_done(hand: Hand) -> tuple[Work, Facts]:
    """A run with one rate for all: 40 tokens a second, 2 s beside them; 3 s an evaluation and 5 s a speed."""
    work = Work.of(hand.plan, hand.speeds)
    facts = {}
    for key, spec in work.specs.items():
        count = sum(tokens for _, tokens in stretches_of(spec))
        trains = hasattr(spec, "optimizer")
        seconds = count / 40 + 2 if trains else 5.0 if isinstance(spec, ThroughputSpec) else 3.0
        beside = 2.0 if trains else None
        facts[key] = Stage("done", 0.0, seconds, beside, count, ((count, 40.0),) if count else (), fresh=True)
    return work, facts


def test_what_is_left_is_what_the_same_took(hand: Hand) -> None:
    work, facts = all_done(hand)
    assert time_left(work, facts, [], 2, 0.0) == Left(0.0)
    mixed, speed = hand.steps["two mixed"], hand.speeds[hand.key("heads 0")].key
    facts |= {mixed.train.key: Stage(), mixed.evaluate.key: Stage(), speed: Stage()}
    alone = 320 / 40 + 2 + 3 + 5 + 3 * TURN  # a measurement has the machine alone, after all else
    assert time_left(work, facts, [], 2, 0.0) == Left(pytest.approx(alone))
    facts[mixed.train.key] = Stage("running", since=90.0, tokens=160, points=((160, 20.0),), heard=100.0)
    rest = 160 / 20 + 2 + 3 + 5 + 2 * TURN  # by its own rate, which the run's is not
    assert time_left(work, facts, [], 2, 100.0) == Left(pytest.approx(rest))
    assert time_left(work, facts, [], 2, 103.0) == Left(pytest.approx(rest - 3))  # it has trained on meanwhile
    assert time_left(work, facts, [], 2, 999.0) == Left(pytest.approx(rest - 8))  # as far as to its next line
    facts[mixed.train.key] = Stage("done")
    facts[mixed.evaluate.key] = Stage("running", since=100.0)
    assert time_left(work, facts, [], 2, 102.0) == Left(pytest.approx(1 + 5 + TURN))
    assert time_left(work, facts, [], 2, 150.0) == Left(pytest.approx(0.3 + 5 + TURN))  # longer than those before


def test_what_comes_after_a_failure_is_not_waited_for(hand: Hand) -> None:
    work, facts = all_done(hand)
    for name in ("heads 0", "heads 1", "heads joint"):
        speed = hand.speeds[hand.key(name)].key
        facts |= {hand.key(name): Stage(), hand.steps[name].evaluate.key: Stage(), speed: Stage()}
    whole = time_left(work, facts, [], 2, 0.0)
    assert whole is not None and whole.seconds > 20
    facts[hand.key("heads 0")] = Stage("failed", error="OSError")
    assert time_left(work, facts, [], 2, 0.0) == Left(0.0)


def test_without_any_rate_nothing_is_told(hand: Hand) -> None:
    work = Work.of(hand.plan, hand.speeds)
    nothing: Facts = {key: Stage() for key in work.specs}
    assert time_left(work, nothing, [], 2, 0.0) is None
    teacher = Observation(("alone", work.models[hand.key("teacher")].teacher, (), "", 0), 0.1, False)
    left = time_left(work, nothing, [teacher], 2, 0.0)
    assert left is not None and left.guessed == {"beside", "evaluate", "throughput"}


def test_early_stopping_may_end_it_sooner(tmp_path: Path) -> None:
    work = work_of(tmp_path, "search.early_stopping={grace_layers: 1}")
    facts: Facts = {key: Stage("done") for key in work.specs}
    assert str(time_left(work, facts, [], 2, 0.0)) == "at most 5 s left"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "5 s"), (12.4, "10 s"), (89, "90 s"), (90, "2 min"), (5_399, "90 min"), (5_400, "1.5 h"), (86_400, "24.0 h")],
)
def test_a_time_in_words(seconds: float, told: str) -> None:
    assert duration(seconds) == told
    guessed = Left(seconds, frozenset({"throughput", "evaluate"}))
    assert str(guessed) == f"about {told} left (not measured yet: evaluations, speeds)"


def test_stages_of_other_studies_tell_what_their_kind_takes(hand: Hand, tmp_path: Path) -> None:
    hand.finish("teacher", "two 0", "two 1", "skip 0")
    (hand.store.folder("00" * 32)).mkdir(parents=True)  # without a specification
    damaged = hand.store.folder(hand.key("skip 0")) / "DONE.json"
    damaged.write_text("{")
    (tmp_path / "other").mkdir()
    work = Work.of(hand.plan, hand.speeds)
    seen = earlier_observations(hand.store, but=[hand.key("two 1")])
    told = sorted((each.kind[0], each.kind[3:], each.seconds, each.fresh) for each in seen)
    two = (work.models[hand.key("two 0")].operator, 1)
    assert ("beside", two, 1 / 40, False) in told
    assert ("beside distil", two, 10 - 160 / 40, False) in told
    assert ("alone", ("", 0), 1 / 40, False) in told
    assert not any(kind == "skip" for kind, *_ in told)
    assert [each for each in told if each[0] == "beside"] == [("beside", two, 1 / 40, False)]


def test_what_results_will_bring_comes_on_top(tmp_path: Path) -> None:
    for folder in ("plain", "gated"):
        (tmp_path / folder).mkdir()
    plain, gated = work_of(tmp_path / "plain"), work_of(tmp_path / "gated", "schedule.gate={ratio: 1.1}")
    assert (plain.may_grow, gated.may_grow) == (False, True)
    assert str(Left(120.0, at_least=True)) == "at least 2 min left"
    facts = {key: Stage("done") for key in gated.specs}
    assert time_left(gated, facts, [], 2, 0.0) == Left(0.0, at_least=True)
