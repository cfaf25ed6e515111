"""`report.html`: one file that needs no other, its tables and what they sort by, its charts and their points."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from orchestrator.record.answer import charts
from orchestrator.record.answer.page import page
from orchestrator.record.answer.points import curves_of
from orchestrator.record.answer.verdict import verdict
from orchestrator.record.records import Record, make_records
from tests.record.handmade import Hand, speed

RUN = {"seconds": 90.0}
Cell = tuple[str, str | None]  # text, and what it sorts by


class Read(HTMLParser):
    """Tables by id, texts of scripts by id, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Cell]]] = {}
        self.scripts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = self.tables.setdefault(str(self.tags[-1][1]["id"]), [])
        elif tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1]
        self.text += data
        if tag == "script" and attributes.get("id"):
            self.scripts.setdefault(str(attributes["id"]), data)
        elif tag == "td" and data.strip():
            self.rows[-1].append((data, attributes.get("data-key")))


@pytest.fixture
def rows(hand: Hand) -> list[Record]:
    hand.all_done()
    bounds = {"prefill_interval": {"16": [0.7, 0.8], "32": [0.9, 1.7]}}
    hand.write(hand.speeds[hand.key("two 1")], {**speed(1.5, 2.0), **bounds})
    return make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: "run")


@pytest.fixture
def text(hand: Hand, rows: list[Record]) -> str:
    return page(hand.plan, rows, RUN, curves_of(hand.plan, hand.store, rows))


def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    read = Read(text)
    assert not [tag for tag, attributes in read.tags if tag in ("link", "img", "iframe") or "src" in attributes]
    assert "http" not in text.replace(read.scripts["plotly"], "") and "@import" not in text and "url(" not in text
    assert gzip.decompress(base64.b64decode(read.scripts["plotly"])).startswith(b"/**\n* plotly.js v")
    assert len(text) < 3_000_000


def test_the_answer_comes_first(rows: list[Record], text: str) -> None:
    told = Read(text).text
    parts = [
        "Which of two operators costs less?", verdict(rows), "The best student for every number of swapped layers",
        "knee: trial-00 joint", "Quality against speed and layers", "Teacher and controls",
        "Every trial at its last stage", "The best path, stage by stage", "Speed and memory by length", "Training",
        "cost: 1.5 min",
    ]  # fmt: skip
    found = [told.find(part) for part in parts]
    assert -1 not in found and found == sorted(found)


def test_tables_sort_by_numbers_not_by_their_texts(text: str) -> None:
    tables = Read(text).tables
    lead = {row[-1][0]: row for row in tables["lead"] if row}
    best = lead["trial-00 joint losses=kl:1.0"]
    assert best[:3] == [("2/2", "2.0"), ("0-1", None), ("1.100", "1.1")]
    assert best[5] == ("same", "1.0")
    [trial] = [row for row in tables["trials"] if row and row[0][0].startswith("trial-00")]
    assert trial[1:4] == [("2/2", "2"), ("640", "640"), ("8.80", "8.8")]
    assert trial[-2:] == [("same", "1.5"), ("2.00x", "2.0")]
    assert len(tables["stages"]) == 1 + 9 and tables.keys() == {"lead", "controls", "trials", "path", "stages", "speed"}


def chart(text: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Read(text).scripts[f"data-{name}"])
    return found


def test_points_tell_what_they_are(text: str) -> None:
    figure = chart(text, "quality")
    [scratch] = [trace for trace in figure["data"] if trace["name"] == "from scratch" and trace["xaxis"] == "x"]
    assert (scratch["x"], scratch["y"], scratch["yaxis"]) == ([1.5], [4.0], "y")  # of the upper part
    two = next(trace for trace in figure["data"] if trace["name"] == "hyena-2" and trace["xaxis"] == "x4")
    at = two["y"].index(1.1)
    assert two["text"][at].split("<br>") == [
        "<b>trial-00 joint</b>", "losses=kl:1.0", "layers 0-1 (2/2)", "ratio 1.100", "agree 0.682", "hit 1.650",
        "prefill same", "decode 2.00x",
    ]  # fmt: skip
    assert two["error_x"]["array"][at] == pytest.approx(0.2) and two["error_x"]["arrayminus"][at] == pytest.approx(0.6)
    legend = [trace["name"] for trace in figure["data"] if trace["showlegend"]]
    assert sorted(legend) == sorted(set(legend)) and "from scratch" in legend
    low, high = (10**limit for limit in figure["layout"]["yaxis4"]["range"])
    assert low < 1.0 and 1.5 < high < 4.0


def test_curves_and_speeds_have_charts(text: str) -> None:
    figure = chart(text, "curves")
    assert [note["text"].split()[0] for note in figure["layout"]["annotations"]] == ["trial-00", "trial-02", "trial-01"]
    assert figure["data"][0]["x"][:2] == [80, 160] and figure["data"][0]["y"][2] is None
    assert [shape["x0"] for shape in figure["layout"]["shapes"][:2]] == [160, 320]
    figure = chart(text, "speed")
    first = figure["data"][0]
    assert (first["x"], first["y"]) == ([16, 32], [0.75, 1.5])
    assert first["error_y"]["arrayminus"] == pytest.approx([0.05, 0.6])
    assert figure["data"][-1]["name"] == "teacher"


def test_what_a_study_says_is_text_not_code(hand: Hand, rows: list[Record]) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    told = page(hand.plan, [row | {"words": evil} for row in rows], RUN, [])
    assert "<img" not in told and told.count("</script>") == told.count("<script")


def test_a_beginning_is_a_page_without_charts(hand: Hand) -> None:
    hand.finish("teacher")
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    told = page(hand.plan, rows, {}, [])
    assert "No student is finished yet." in told and "Plotly" not in told
    assert Read(told).tables.keys() == {"controls"}


def test_probes_have_a_chart(tmp_path: Any) -> None:
    hand = Hand(tmp_path, "evaluation.probes={}")
    hand.all_done()
    hand.probe("teacher", "two joint")
    rows = make_records(hand.plan, hand.store, hand.speeds, set(), lambda _: None)
    figure = chart(page(hand.plan, rows, RUN, []), "probes")
    apart, by_length, teacher = figure["data"]
    assert apart["x"] == [1, 16, 32] and apart["y"] == pytest.approx([0.1, 0.05, 0.2])
    assert (by_length["x"], by_length["y"]) == ([8, 64], pytest.approx([4.1, 3.3]))
    assert (teacher["name"], teacher["y"]) == ("teacher", [4.0, 3.0])


def test_a_group_of_seeds_names_its_members(rows: list[Record]) -> None:
    from orchestrator.record.groups import students

    seeds = [row | {"group": "trial-00", "stage_key": str(i)} for i, row in enumerate(rows[7:11:3])]
    [row] = students(seeds)
    assert "<br>2 seeds: trial-00, trial-01<br>ratio 1.125 ± 0.035<br>" in charts._under_pointer(row, "32")


def test_scripts_are_few(text: str) -> None:
    """The page's own code sorts, filters and paints; charts are the library's."""
    own = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert sum(map(len, own)) < 5_000
