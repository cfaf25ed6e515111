"""A home whose store is written by hand: three trials, known numbers, no training and no Ray.

The study asks for these steps, by the names that `Hand.steps` gives them (tokens of each stage in brackets):

    teacher [1,600]
    |- two 0 [160] - two 1 [160] -+- two joint [320]      trial-00, losses kl
    |                             +- two mixed [320]      trial-01, losses kl and ce
    +- heads 0 [160] - heads 1 [160] - heads joint [320]  trial-02
    scratch [640], skip 0, skip 1, skip all               controls

Every evaluation ends two seconds after its stage, every stage takes the seconds it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.files import sealed, sha256_file
from orchestrator.record.home import Home
from orchestrator.record.remembered import Asked
from orchestrator.run.hardware import machine
from orchestrator.run.store import Store
from orchestrator.study.loader import read_document, validate
from orchestrator.study.plan import Plan, throughput_specs
from orchestrator.study.sources import resolve
from orchestrator.study.spec import Spec
from orchestrator.study.stages import Step

STUDY = """\
study: handmade
question: Which of two operators costs less?
teacher: {kind: pretrain, layers: 2, hidden: 16, heads: 2, max_length: 64, tokens: 1_600, batch_size: 2}
data: {train: {source: text, files: [text.txt]}, sequence_length: 8, vocabulary: 300}
operator: {kind: hyena, order: 2}
recipe:
  batch_size: 2
  phases: [{tokens: 160, losses: {kl: 1.0}}]
  joint: [{tokens: 320, losses: {kl: 1.0}}]
evaluation: {tokens: 64, prompts: 2, prompt_tokens: 4, new_tokens: 4}
throughput: {lengths: [16, 32], decode_tokens: 8, repeats: 1}
controls: {skip: true, scratch: own}
search:
  space:
    - recipe.joint.0.losses: [{kl: 1.0}, {kl: 1.0, ce: 0.5}]
    - operator: [{kind: hyena, heads: 2}]
"""
START = 1_700_000_000.0  # seconds since 1970, when the teacher begins
RATIOS = {
    "teacher": 1.0, "scratch": 4.0, "skip 0": 1.5, "skip 1": 1.25, "skip all": 8.0, "two 0": 1.05, "two 1": 1.25,
    "two joint": 1.1, "two mixed": 1.15, "heads 0": 1.2, "heads 1": 1.3, "heads joint": 1.12,
}  # fmt: skip
SPEEDS = {  # prefill and decode at 32 tokens; at 16 tokens both are half of it
    "teacher": (1.0, 0.98), "skip 0": (1.2, 1.25), "skip 1": (1.2, 1.25), "skip all": (2.0, 2.5), "two 0": (1.1, 1.2),
    "two 1": (1.5, 2.0), "heads 0": (1.3, 1.3), "heads 1": (1.6, 1.9),
}  # fmt: skip


def asked(root: Path, *overrides: str) -> Asked:
    """The study, or an edited one, whose file lies in a folder."""
    file = root / "handmade.yaml"
    file.write_text(STUDY)
    (root / "text.txt").write_text("a long convolution\n")
    document = read_document(file, overrides)
    resolved = resolve(validate(document), root)
    return Asked(str(file), STUDY, overrides, document.values, document.places, resolved, "cpu", "test")


def planned(root: Path, *overrides: str) -> Plan:
    """Its plan."""
    return asked(root, *overrides).plan()


class Hand:
    """A home below `root`, and what a test lets its store hold."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.file = root / "handmade.yaml"
        self.asked = asked(root, *overrides)
        self.plan = self.asked.plan()
        self.home = Home(root / "home")
        self.store = Store(self.home.store)
        self.speeds = throughput_specs(self.plan, "test")
        (a, b, joint), (_, _, mixed), (c, d, last) = (trial.steps for trial in self.plan.trials)
        students = {"two 0": a, "two 1": b, "two joint": joint, "two mixed": mixed}
        students |= {"heads 0": c, "heads 1": d, "heads joint": last}
        controls = {name.replace(" hyena-2", ""): step for name, step in self.plan.controls.items()}
        self.steps: dict[str, Step] = {"teacher": self.plan.teacher, **controls, **students}

    def key(self, name: str) -> str:
        """The key of a trained stage."""
        return self.steps[name].train.key

    def write(
        self, spec: Spec, result: dict[str, Any], *, started: float = START, seconds: float = 2.0,
        files: dict[str, bytes] | None = None, number: int = 1,
    ) -> None:  # fmt: skip
        """Let a stage be finished, with all that `orchestrator.run.store` documents."""
        folder = self.store.folder(spec.key)
        self.attempt(spec.key, started, number)
        (folder / "spec.json").write_text(spec.model_dump_json())
        (folder / "artefacts").mkdir(exist_ok=True)
        for name, content in (files or {}).items():
            (folder / "artefacts" / name).write_bytes(content)
        manifest = {
            "key": spec.key,
            "kind": json.loads(spec.model_dump_json())["kind"],
            "result": result,
            "seconds": seconds,
            "core_seconds": 2 * seconds,
            "finished": started + seconds,
            "machine": machine(),
            "files": {name: sha256_file(folder / "artefacts" / name) for name in (files or {})},
        }
        put(folder / "DONE.json", sealed(manifest))

    def attempt(self, key: str, started: float = START, number: int = 1, pid: int = 1) -> None:
        """Let an attempt at a stage have begun."""
        told = {"pid": pid, "host": "here", "started": started, "number": number}
        put(self.store.folder(key) / "attempt.json", told)

    def journal(self, key: str, *lines: tuple[int, int, float, dict[str, float]]) -> None:
        """Let a stage have written lines of (step, tokens, time, metrics)."""
        told = [{"step": s, "tokens": t, "time": at, "metrics": metrics} for s, t, at, metrics in lines]
        folder = self.store.folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))

    def text(self, **more: Any) -> None:
        """Let the text be ready."""
        self.write(self.plan.tokens, {"train_tokens": 12_345, "valid_tokens": 678}, **more)

    def train(self, name: str, *, started: float = START, seconds: float = 10.0, rate: float = 40.0) -> None:
        """Let a stage be trained: `rate` tokens a second for the tokens it has, and a journal of half and whole."""
        step = self.steps[name]
        tokens = step.own_tokens
        result: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "tokens_per_s": None, "parameters": 5_000}
        if tokens:
            result |= {"seconds": tokens / rate, "tokens": tokens, "tokens_per_s": rate, "resumed_at": 0}
            last = tokens // 16
            self.journal(
                step.train.key,
                (last // 2, tokens // 2, started + 1.5, {"loss/kl": 0.5, "tokens_per_s": rate}),
                (last, tokens, started + 3.25, {"loss/kl": 0.25, "tokens_per_s": rate}),
            )
        if name not in ("teacher", "scratch"):
            result |= {"operator_trainable": 1_230_000, "rest_trainable": 450_000}
        files = {} if name == "teacher" else {"student.safetensors": name.encode()}
        self.write(step.train, result, started=started, seconds=seconds, files=files)

    def evaluate(self, name: str, *, started: float = START + 10.0, seconds: float = 2.0) -> None:
        """Let a stage be evaluated."""
        self.write(self.steps[name].evaluate, quality(RATIOS[name]), started=started, seconds=seconds)

    def finish(self, *names: str, started: float = START) -> None:
        """Let stages be trained and evaluated, in ten and two seconds, all begun at the same time."""
        for name in names:
            self.train(name, started=started)
            self.evaluate(name, started=started + 10.0)

    def measure(self, *names: str, core: str = "torch", started: float = START + 100.0) -> None:
        """Let the speed of stages' architectures be measured, in five seconds each."""
        for name in names:
            spec = self.speeds[self.key(name)]
            self.write(spec, speed(*SPEEDS[name], core), started=started, seconds=5.0)

    def probe(self, *names: str, started: float = START + 200.0) -> None:
        """Let stages be probed, in three seconds each; of a study that asks for it."""
        for name in names:
            spec = self.steps[name].probes
            assert spec is not None
            self.write(spec, probes(RATIOS[name]), started=started, seconds=3.0)

    def all_done(self) -> None:
        """Let everything be there; stage number n of `steps` begins n minutes after the first."""
        self.text()
        for index, name in enumerate(self.steps):
            self.finish(name, started=START + 60.0 * index)
        self.measure(*SPEEDS, started=START + 900.0)

    def weigh(self, key: str, size: int) -> None:
        """Let a stage's files have so many bytes together."""
        folder = self.store.folder(key)
        rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with (folder / "weight").open("wb") as stream:
            stream.truncate(size - rest)


def put(path: Path, value: Any) -> None:
    """Write a JSON file; the disk may take its time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, sort_keys=True))


def quality(ratio: float) -> dict[str, Any]:
    """The result of an evaluation beside a teacher of perplexity 8."""
    return {
        "perplexity": 8.0 * ratio,
        "perplexity_ratio": ratio,
        "accuracy": 0.375,
        "agreement": 0.75 / ratio,
        "kl": ratio - 1.0,
        "hit_nll": 1.5 * ratio,
        "miss_nll": 2.5 * ratio,
        "generation_agreement": 0.5 / ratio,
        "greedy_generation_perplexity": 4.0 * ratio,
        "sampled_generation_perplexity": 12.0 * ratio,
        "parameters": 6_000,
    }


def speed(prefill: float, decode: float, core: str = "torch") -> dict[str, Any]:
    """The result of a measurement of speed."""
    return {
        "core": core,
        "train_ratio": 0.8,
        "prefill_ratio": {"16": prefill / 2, "32": prefill},
        "decode_ratio": {"16": decode / 2, "32": decode},
    }


def probes(ratio: float) -> dict[str, Any]:
    """The result of probes: losses grow by what the ratio has over 1, keys are found as many times less often."""
    more = ratio - 1.0

    def needle(right: float, items: int) -> dict[str, Any]:
        return {"items": items, "accuracy": right / ratio, "margin": 2.0 - more}

    return {
        "loss": {"1": 5.0 + more, "16": 3.0 + more / 2, "32": 2.0 + 2 * more},
        "hit_nll": {"1": 1.0 + more, "128": 1.5 + more},
        "hit_tokens": {"1": 30, "128": 5},
        "bits_per_byte": 2.0 + more,
        "nll": {"8": 4.0 + more, "64": 3.0 + 3 * more},
        "needle": {
            "8": {**needle(0.25, 24), "chance": 0.125, "stderr": 0.0625, "depths": {"0.5": needle(0.25, 24)}},
            "64": {
                **needle(0.75, 24), "chance": 0.125, "stderr": 0.09,
                "depths": {"0.1": needle(0.5, 12), "0.9": needle(1.0, 12)},
            },
        },
    }  # fmt: skip
