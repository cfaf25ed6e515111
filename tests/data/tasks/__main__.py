"""Write the records of the tasks in this folder, 200 each, from the standard library's own sources.

    python -m tests.data.tasks

Another Python has other sources; the committed records are those of 3.11.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.study.sources import stdlib_files

FOLDER = Path(__file__).parent
ITEMS = 200
LINE = re.compile(r"^ {0,8}\w[\x20-\x7e]{15,55}\S$")  # of code, neither short nor long, in plain signs


def main() -> None:
    """Write `choice.jsonl`, `rolling.jsonl` and `generate.jsonl`."""
    draw = random.Random(0)
    texts = [path.read_text(encoding="utf-8", errors="replace").splitlines() for _, path in stdlib_files()]
    draw.shuffle(texts)
    write("choice", choices(texts, draw))
    write("rolling", documents(texts, draw))
    write("generate", repeats(texts, draw))


def write(name: str, records: Iterator[dict[str, Any]]) -> None:
    """The first records as lines of JSON."""
    lines = [json.dumps(next(records)) + "\n" for _ in range(ITEMS)]
    (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def choices(texts: list[list[str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Three lines, and four for the next one: the true one, and three with its words in another order."""
    for lines in texts:
        places = [at for at in range(3, len(lines)) if all(map(LINE.match, lines[at - 3 : at + 1]))]
        true = lines[draw.choice(places)].strip() if places else ""
        words = true.split()
        others = {" ".join(draw.sample(words, len(words))) for _ in range(20)} - {true}
        if len(others) >= 3:
            at = next(at for at in places if lines[at].strip() == true)
            options, answer = draw.sample(sorted(others), 3), draw.randrange(4)
            options.insert(answer, true)
            yield {"text": "\n".join(lines[at - 3 : at]), "choices": options, "answer": answer}


def documents(texts: list[list[str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Eight lines one after another."""
    for lines in texts:
        plain = [line for line in lines if line.isascii() and len(line) < 80]
        if len(plain) > 8:
            at = draw.randrange(len(plain) - 8)
            text = "\n".join(plain[at : at + 8]).strip()
            if len(text) > 100:
                yield {"text": text}


def repeats(texts: list[list[str]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """A line three times, the third time up to its middle."""
    for lines in texts:
        found = [line.strip() for line in lines if LINE.match(line) and line.count(" ") > line.count("  ") + 2]
        if found:
            line = draw.choice(found)
            words = line.split(" ")
            half = " ".join(words[: len(words) // 2])
            yield {"text": f"{line}\n{line}\n{half}", "rest": line.removeprefix(half)}


if __name__ == "__main__":
    main()
