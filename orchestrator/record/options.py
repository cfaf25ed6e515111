"""Arguments and options that several commands have, with what they tell of themselves."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="study file, for example studies/layerwise.yaml")]
StudyName = Annotated[
    Path, typer.Argument(metavar="STUDY", help="study file, or the NAME or NAME/ID of one that was run in the home")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key of the study; repeatable")
]
HomeDirectory = Annotated[
    Path | None,
    typer.Option("--home", envvar="LAYERSWAP_HOME", help="store, records, reports; default: runs/ of the repository"),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        envvar=["LAYERSWAP_TRACKING_URI", "MLFLOW_TRACKING_URI"],
        help="MLflow server or database, or home for the one in the home; default: that one",
    ),
]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="a Ray cluster to run on; default: one on this machine")
]
Cpus = Annotated[
    int | None,
    typer.Option("--cpus", min=1, help="cores of this machine to use; default: all that it gives this process"),
]


class Claims(StrEnum):
    """`--claims`: a lock of the kernel, or a file that is renewed."""

    flock = "flock"
    lease = "lease"


class Best(StrEnum):
    """`--best`, of all finished students, those of few layers included."""

    quality = "quality"
    speed = "speed"
    knee = "knee"


class Kept(StrEnum):
    """`--keep`: whose weights stay."""

    best = "best"
    front = "front"
    all = "all"


TrialName = Annotated[str | None, typer.Option("--trial", help="a trial, trial-03 say; its last stage, or see --stage")]
StageName = Annotated[
    str | None,
    typer.Option("--stage", help="start of a stage key, or with --trial a number from 1 on, or joint"),
]
BestOf = Annotated[
    Best | None,
    typer.Option(
        "--best",
        help="of all students, or the trial's: the one of lowest perplexity (quality), of fastest prefill (speed), "
        "or the point of the report's front that is farthest below the line between its ends (knee); default: the "
        "one that swaps most layers, and of those the one of lowest perplexity",
    ),
]
