"""Writes the playground's examples: a question that takes several experts, and a held-out row of each task of the demo.

Run it in a checkout: ``.venv/bin/python examples/page_examples.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from demo_tasks import DATA, TASKS

from meteora_dist.cli.demo_questions import short_rows

OUT = Path("meteora_dist/serving/playground/static/examples.json")

SEVERAL = "Could a blue whale fit into a school bus? Explain, and say how long both are in metres."
ROWS = {"strategyqa": 2}
"""Which short row of a task to take, where it is not the first: one whose answer takes more than one expert."""


def examples() -> list[dict[str, object]]:
    """What the page offers: a title, the experts that a bank must have for it, and the prompt."""
    rows = {task: short_rows(DATA / f"{task}.jsonl.gz", 3)[ROWS.get(task, 0)] for task in TASKS}
    return [
        {"title": "a whale in a bus", "experts": ["strategyqa", "unit_conversion"], "prompt": SEVERAL},
        *({"title": task.replace("_", " "), "experts": [task], "prompt": rows[task].prompt} for task in TASKS),
    ]


if __name__ == "__main__":
    OUT.write_text(json.dumps(examples(), indent=1, ensure_ascii=False) + "\n")
