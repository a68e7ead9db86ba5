"""``meteora eval``: how well a bank answers, against its own adapters and what else could be made of them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from transformers.utils import logging as transformers_logging

from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.lorahub import HubSearch
from meteora_dist.evaluation.methods import DEFAULT, parse_methods
from meteora_dist.evaluation.plan import CompositeKind, EvalPlan, Machine, context_length
from meteora_dist.evaluation.report import markdown
from meteora_dist.evaluation.results import Results
from meteora_dist.evaluation.run import evaluate
from meteora_dist.evaluation.suite import load_suite
from meteora_dist.model.demo_model import demo_model_dir

_Texts = list[str] | None


def command(
    out: Annotated[Path, typer.Option(help="Folder of results and of what is measured; an interrupted run goes on.")],
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    bank: Annotated[
        _Texts, typer.Option(help="Bank folder, or LABEL=FOLDER; repeat for seeds. [examples/bank]")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Task file or folder; repeat. [examples/data]")] = None,
    task: Annotated[_Texts, typer.Option(help="Task, by its file's name; repeat, in order. [all]")] = None,
    rows: Annotated[int, typer.Option(help="Most rows of a task.", min=1)] = 24,
    split: Annotated[Literal["held-out", "all"], typer.Option(help="Rows that may be scored.")] = "held-out",
    text: Annotated[_Texts, typer.Option(help="Task to score by BLEU and ROUGE as well; repeat.")] = None,
    method: Annotated[_Texts, typer.Option(help=f"Method; repeat. [{', '.join(DEFAULT)}]")] = None,
    adapter: Annotated[_Texts, typer.Option(help="Another PEFT adapter as a method, NAME=FOLDER; repeat.")] = None,
    composite: Annotated[list[int] | None, typer.Option(help="Sub-questions of composite questions; repeat.")] = None,
    shots: Annotated[list[int] | None, typer.Option(help="Worked examples before them; repeat. [2]")] = None,
    composite_rows: Annotated[int, typer.Option(help="Composite questions of each kind.", min=1)] = 24,
    composite_method: Annotated[_Texts, typer.Option(help="Method that is asked them; repeat. [all]")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 24,
    max_len: Annotated[int, typer.Option(help="Most tokens of prompt and answer.", min=2)] = 4096,
    perplexity: Annotated[bool, typer.Option(help="Also measure the perplexity of gold answers.")] = False,
    gates: Annotated[bool, typer.Option(help="Also count the gates' choices, and draw one composite.")] = False,
    density: Annotated[float, typer.Option(help="Share of entries TIES and DARE keep.", min=0.001, max=1)] = 0.2,
    merge_rank: Annotated[int, typer.Option(help="Rank of what TIES and DARE leave.", min=1)] = 64,
    hub_examples: Annotated[int, typer.Option(help="Rows LoraHub learns from.", min=1)] = 5,
    hub_evaluations: Annotated[int, typer.Option(help="Weights LoraHub tries.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Of all draws.", min=0)] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")] = "float32",
    batch: Annotated[int, typer.Option(help="Requests in one pass.", min=1)] = 6,
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1)] = 1,
) -> None:
    """Score methods on tasks and on composites of them: results.json, results.md and plots in OUT.

    Example: meteora eval --out out --method base --method oracle --method top-2 --composite 3 --gates
    """
    _need_extra()
    transformers_logging.disable_progress_bar()
    adapters = {name: Path(path) for name, path in (_named(one, "--adapter") for one in adapter or [])}
    base = model or demo_model_dir()
    plan = EvalPlan(
        model=base,
        banks=_banks(bank or ["examples/bank"]),
        out=out,
        methods=parse_methods(method or DEFAULT, adapters),
        tasks=tuple(load_suite(data or [Path("examples/data")], task or (), rows, split == "held-out", text or ())),
        adapters=adapters,
        composites=tuple(CompositeKind(n, count) for n in composite or () for count in shots or (2,)),
        composite_rows=composite_rows,
        composite_methods=tuple(composite_method or ()),
        max_tokens=max_tokens,
        seed=seed,
        perplexity=perplexity,
        gates=gates,
        density=density,
        merge_rank=merge_rank,
        hub=HubSearch(hub_examples, hub_evaluations, seed),
        machine=Machine(dtype, threads, batch, context_length(base, max_len)),
    )
    _write(evaluate(plan, lambda line: typer.echo(line, err=True)), out)


def _write(found: Results, out: Path) -> None:
    """All files of the results; their head goes to the terminal."""
    from meteora_dist.evaluation.plots import draw

    files = draw(found, out)
    page = markdown(found, shlex.join(["meteora", *sys.argv[1:]]), files)
    (out / "results.json").write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    (out / "results.md").write_text(page, encoding="utf-8")
    typer.echo(page.split("## Exact match\n")[0])
    typer.echo(f"{out / 'results.md'}, {out / 'results.json'}, {len(files)} plots")


def _need_extra() -> None:
    """Says what to install, before hours of answers that could not be scored."""
    from importlib.util import find_spec

    if missing := [name for name in ("cma", "matplotlib", "peft", "sacrebleu", "torchmetrics") if not find_spec(name)]:
        raise EvaluationError(f"{', '.join(missing)} not installed; pip install 'meteora-dist[eval]' brings them")


def _banks(texts: Sequence[str]) -> dict[str, Path]:
    banks: dict[str, Path] = {}
    for one in texts:
        label, path = _named(one, "--bank") if "=" in one else (Path(one).name, one)
        if not label or label in banks:
            raise EvaluationError(f"--bank {one}: several banks need labels of their own, LABEL=FOLDER")
        banks[label] = Path(path)
    return banks


def _named(text: str, option: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise EvaluationError(f"{option} {text}: it must be NAME=FOLDER")
    return name, path
