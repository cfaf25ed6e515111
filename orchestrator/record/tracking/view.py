"""A view of a study's experiment in MLflow's UI: its trials, as points of quality against speed and as lines.

MLflow keeps the views that people share as tags of an experiment; this is one of them. Invariant: where a later MLflow
reads it otherwise, the link leads to the plain page.
"""

from __future__ import annotations

import json
from typing import Any

from orchestrator.record.tracking.identity import HOME
from orchestrator.record.tracking.names import Shown
from orchestrator.study.plan import Plan

SHARED = "mlflow.sharedViewState."  # and the name of a view: a tag of an experiment
SECTION = "layerswap"
WORKFLOW = "workflowType=machine_learning"  # of an address: without it the UI opens on traces of language models


def view_name(home: str) -> str:
    """The name of the view on the trials of a home."""
    return f"front-{home[:8]}"


def view_link(experiment: str, home: str) -> str:
    """Where the UI shows it."""
    return f"#/experiments/{experiment}/runs?{WORKFLOW}&compareRunsMode=CHART&viewStateShareKey={view_name(home)}"


def front_view(plan: Plan, shown: Shown, home: str) -> str:
    """The view: perplexity ratio over the speeds at the longest length that is measured, and all swept values."""
    length = max(plan.study.throughput.lengths)
    speeds = [f"{kind}_ratio/length_{length}" for kind in ("prefill", "decode")]
    told = [path.parameters for path in shown.paths]
    swept = [key for key in told[0] if len({parameters[key] for parameters in told}) > 1]
    charts = [
        _chart(
            f"front-{speed.split('_')[0]}", "SCATTER", f"perplexity ratio over {speed}",
            xaxis={"key": speed, "type": "METRIC"}, yaxis={"key": "perplexity_ratio", "type": "METRIC"},
        )
        for speed in speeds
    ]  # fmt: skip
    numbers = ["perplexity_ratio", *speeds]
    # Lines of runs whose value is a word where others have a number are left out, so such keys are.
    drawn = [key for key in swept if len({_is_number(parameters[key]) for parameters in told}) == 1]
    lines = {"selectedParams": drawn, "selectedMetrics": numbers, "showAllRuns": False}
    charts.append(_chart("front-lines", "PARALLEL", "what was tried, and what came of it", **lines))
    trials = {"layerswap.role": "trial", "layerswap.in_plan": "true", HOME: home}
    return json.dumps(
        {
            "searchFilter": " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in trials.items()),
            "orderByKey": "metrics.`perplexity_ratio`",  # by any but the time of creation, runs are not nested
            "orderByAsc": True,
            "selectedColumns": [f"params.`{key}`" for key in swept] + [f"metrics.`{key}`" for key in numbers],
            "runsHiddenMode": "SHOW_ALL",
            "compareRunCharts": charts,
            "compareRunSections": [{"uuid": SECTION, "name": SECTION, "display": True, "isReordered": True}],
            "isAccordionReordered": True,  # else sections stand by their names
        }
    )


def _chart(name: str, kind: str, title: str, **more: Any) -> dict[str, Any]:
    place = {"uuid": name, "type": kind, "metricSectionId": SECTION, "displayName": title}
    return {**place, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **more}


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
