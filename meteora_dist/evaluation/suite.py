"""Tasks to evaluate on: found in files and folders, split, cut to the rows that are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meteora_dist.errors import DatasetError, EvaluationError
from meteora_dist.evaluation.bigbench import read_bigbench
from meteora_dist.evaluation.tasks import TaskRow, read_task, split

CONTAINMENT_TASKS = frozenset(
    {
        *("abstract_narrative_understanding", "contextual_parametric_knowledge_conflicts", "disfl_qa"),
        *("goal_step_wikihow", "language_identification", "logical_deduction", "object_counting"),
        *("play_dialog_same_or_different", "question_selection", "reasoning_about_colored_objects"),
        "vitaminc_fact_verification",
    }
)
"""Tasks that MeteoRA's evaluation scores by containment; all others with short answers by exact match."""

TEXT_TASKS = frozenset(
    {
        *("alpaca", "cnn_dailymail", "linguistics_puzzles", "strategyqa", "topical_chat"),
        *("news_commentary_de", "news_commentary_es", "news_commentary_it"),
    }
)
"""Tasks that it also scores by BLEU and ROUGE."""

_SUFFIXES = (".jsonl.gz", ".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: Of its file; the expert that was trained for it has the same.
        rows: What is scored.
        training: Rows that are not scored; baselines that need examples take theirs here.
        text: Whether BLEU and ROUGE say something of its answers.
    """

    name: str
    rows: tuple[TaskRow, ...]
    training: tuple[TaskRow, ...] = ()
    text: bool = False

    @property
    def paper_metric(self) -> str:
        """The accuracy that MeteoRA's evaluation takes for this task."""
        return "containment" if self.name in CONTAINMENT_TASKS else "exact_match"


def load_suite(
    sources: Sequence[Path],
    names: Sequence[str] = (),
    rows: int | None = None,
    held_out: bool = True,
    text: Collection[str] = (),
) -> list[Task]:
    """Reads the tasks of files and folders.

    Args:
        sources: ``.jsonl``, ``.jsonl.gz`` or BIG-bench ``.json`` files, or folders of such; a folder in them with a
            ``task.json`` is one BIG-bench task, and one whose own folders have some is a task of all these together.
        names: Which tasks, in this order; all in the order of their files without.
        rows: Most rows of a task; None for all.
        held_out: Whether only the last fifth of a file is scored, which training leaves alone.
        text: Further tasks that BLEU and ROUGE are computed for.

    Raises:
        DatasetError: A file is missing or damaged; names the line or the example.
        EvaluationError: A name is not among the tasks, or two files have the same name.
    """
    found = _found(sources)
    if unknown := [name for name in (*names, *text) if name not in found]:
        raise EvaluationError(f"there is no task {unknown[0]!r} in {_listed(sources)}; there are {', '.join(found)}")
    return [_load(name, found[name], rows, held_out, name in TEXT_TASKS or name in text) for name in names or found]


def _load(name: str, files: Sequence[Path], count: int | None, held_out: bool, text: bool) -> Task:
    rows = [row for file in files for row in (read_bigbench(file) if file.suffix == ".json" else read_task(file))]
    training, scored = split(rows) if held_out else ([], rows)
    if not scored:
        raise DatasetError(files[0], f"has {len(rows)} rows, too few to hold out a fifth; score all of them instead")
    return Task(name, tuple(scored[:count]), tuple(training), text)


def _found(sources: Sequence[Path]) -> dict[str, list[Path]]:
    """Files of every task by its name."""
    found: dict[str, list[Path]] = {}
    for source in sources:
        for name, files in _tasks_of(source):
            if name in found:
                raise EvaluationError(f"two tasks are called {name}: {found[name][0]} and {files[0]}")
            found[name] = files
    if not found:
        raise EvaluationError(f"{_listed(sources)}: no {' or '.join(_SUFFIXES)} file there")
    return found


def _tasks_of(source: Path) -> Iterator[tuple[str, list[Path]]]:
    """(name, files) of every task of a file, of a task's folder, or of a folder of such."""
    if not source.is_dir():
        yield _name(source), [source]
        return
    if (source / "task.json").is_file():
        yield source.name, [source / "task.json"]
        return
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            files = [entry / "task.json"] if (entry / "task.json").is_file() else sorted(entry.glob("*/task.json"))
            if files:
                yield entry.name, files
        elif entry.name.endswith(_SUFFIXES):
            yield _name(entry), [entry]


def _name(file: Path) -> str:
    if file.name == "task.json":
        return file.parent.name
    return next((file.name.removesuffix(suffix) for suffix in _SUFFIXES if file.name.endswith(suffix)), file.stem)


def _listed(sources: Sequence[Path]) -> str:
    return ", ".join(map(str, sources))
