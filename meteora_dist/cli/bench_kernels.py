"""``meteora bench kernels``: what routing costs a layer, and on a GPU whether its kernels are right."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from meteora_dist.bench.kernel_checks import SANITIZER, check_kernels
from meteora_dist.bench.kernel_tuning import tune_device
from meteora_dist.bench.kernels import KernelPlan, KernelRow, measure_kernels
from meteora_dist.errors import PlanError
from meteora_dist.model.load import accelerator
from meteora_dist.planning.sizes import show_bytes

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def kernels(
    model: Annotated[str, typer.Option(help="Known model whose layer is measured, or a folder.")] = "SmolLM2-135M",
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a pass; repeat for several. [8, 512]")] = None,
    experts: Annotated[list[int] | None, typer.Option(help="Experts in the bank; repeat for several. [28]")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank of each.", min=1)] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token uses.", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="Layers a run goes through.", min=1)] = 4,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.", min=1)] = 11,
    threads: Annotated[int, typer.Option(help="Torch threads, on a CPU.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    check: Annotated[bool, typer.Option(help="Only check the kernels against the fp32 reference. GPU.")] = False,
    tune: Annotated[Path | None, typer.Option(help="Measure tile sizes, and write this table's row. GPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Measure a layer's routed linears against its plain ones, and against other ways of computing the same.

    With --check it exits with 1 when a kernel is wrong.

    Example: meteora bench kernels --tokens 8 --tokens 512 --experts 28 --json kernels.json
    """
    device = accelerator()
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(_DTYPES)}", param_hint="--dtype")
    if (check or tune) and device.type != "cuda":
        raise PlanError("--check and --tune run kernels, which needs a CUDA device; this process sees none")
    torch.set_num_threads(threads)
    if check:
        _check(device, json_file)
        return
    if tune is not None:
        Console().print(tune_device(device, tune), highlight=False)
        return
    sizes = tuple(experts or [28])
    if top_k > min(sizes):
        raise typer.BadParameter(f"{top_k} of {min(sizes)} experts cannot be used", param_hint="--top-k")
    plan = KernelPlan(model, tuple(tokens or [8, 512]), sizes, rank, top_k, layers, repeats, _DTYPES[dtype], device)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=plan.rounds)
        rows = measure_kernels(plan, lambda: progress.advance(task))
    Console().print(_table(plan, rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _check(device: torch.device, json_file: Path | None) -> None:
    findings = check_kernels(device, (torch.bfloat16, torch.float16, torch.float32))
    table = Table("check", "case", "found", "at most", "right", title=torch.cuda.get_device_name(device))
    for one in findings:
        table.add_row(one.check, one.case, f"{one.found:.2e}", f"{one.limit:.0e}", "yes" if one.right else "NO")
    Console().print(table)
    Console().print(f"memory errors: {SANITIZER}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in findings], indent=1) + "\n")
    if not all(one.right for one in findings):
        raise typer.Exit(1)


def _table(plan: KernelPlan, rows: list[KernelRow]) -> Table:
    title = f"One layer of {plan.model}, rank {plan.rank}, top-{plan.top_k}, {plan.dtype}, {plan.device.type}"
    table = Table(
        "way", "tokens", "experts", "ms", "of base", "moves at least", "of that, at memory speed", title=title
    )
    for row in rows:
        table.add_row(
            *(row.way, str(row.tokens), str(row.experts), f"{row.milliseconds:.3f}", f"{row.of_base:.2f}"),
            *(show_bytes(row.bytes_moved), f"{row.floor_share:.0%}"),
        )
    return table
