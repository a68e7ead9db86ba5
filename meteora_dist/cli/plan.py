"""``meteora plan``: what a model and its bank need of each rank, and which layouts of the GPUs fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from meteora_dist.engine.config import EngineConfig
from meteora_dist.planning.known import KNOWN, shape_of
from meteora_dist.planning.layouts import Hardware, Layout, Plan, plan
from meteora_dist.planning.memory import Demand
from meteora_dist.planning.sizes import parse_bytes, show_bytes

KV_TOKENS: int = EngineConfig.model_fields["kv_cache_tokens"].default


def command(
    model: Annotated[str, typer.Option(help=f"config.json, its folder, or one of {', '.join(KNOWN)}.")],
    experts: Annotated[int, typer.Option(help="Experts in the bank.")],
    rank: Annotated[int, typer.Option(help="LoRA rank of each.")],
    gpus: Annotated[int, typer.Option(help="GPUs, one a rank.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each.")] = "80GiB",
    headroom: Annotated[float, typer.Option(help="Part of it kept for activations and the allocator.")] = 0.1,
    ep: Annotated[int | None, typer.Option(help="Only layouts with so many expert-parallel groups.")] = None,
    tp: Annotated[int | None, typer.Option(help="Only layouts with so many ranks a group.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and KV cache.")] = "bfloat16",
    kv_tokens: Annotated[int, typer.Option(help="Tokens the KV cache of each group has room for.")] = KV_TOKENS,
    top_k: Annotated[int, typer.Option(help="Experts a token uses.")] = 2,
    target: Annotated[list[str] | None, typer.Option(help="Linear the experts adapt; repeat. [all seven]")] = None,
    routers: Annotated[bool, typer.Option("--routers", help="The bank has layer routers; counted with gates.")] = False,
    expert_dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of experts; CPUs keep bfloat16. [as --dtype]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compute memory per rank, bytes on the wire per token, and the ep x tp layouts that fit, best first.

    Best is the layout that puts the fewest bytes on the wire for a token. Nothing is loaded.

    Example: meteora plan --model Llama-3.1-8B --experts 1000 --rank 16 --gpus 8 --gpu-memory 80GiB
    """
    targets = None if target is None else frozenset(target)
    demand = Demand(experts, rank, dtype, kv_tokens, top_k, targets, routers, expert_dtype)
    hardware = Hardware(gpus, parse_bytes(gpu_memory), headroom)
    result = plan(shape_of(model), demand, hardware, ep, tp)
    if as_json:
        typer.echo(json.dumps({name: [_row(one) for one in getattr(result, name)] for name in ("fitting", "refused")}))
    else:
        _show(result, hardware)


def _row(layout: Layout) -> dict[str, object]:
    row = asdict(layout)
    row["memory"]["total"] = layout.memory.total
    for exchange, one in zip(row["exchanges"], layout.exchanges, strict=True):
        exchange["total"] = one.total
    return row


def _show(result: Plan, hardware: Hardware) -> None:
    console = Console()
    console.print(_memory_table(result, hardware))
    console.print(_wire_table(result.fitting[0]))
    for layout in result.refused:
        console.print(f"ep {layout.mesh.ep} x tp {layout.mesh.tp}: {layout.refusal}", highlight=False)


def _memory_table(result: Plan, hardware: Hardware) -> Table:
    unit, size = ("GiB", 2**30) if result.fitting[0].memory.total >= 2**30 else ("MiB", 2**20)
    usable = f"{show_bytes(hardware.usable)} usable of {show_bytes(hardware.memory)}"
    table = Table(
        *("ep", "tp", "base", "bank", "gates", "KV", "total", "KV room", "wire"),
        title=f"{unit} on the fullest rank ({usable}), best first",
        caption="KV room: tokens a group; wire: bytes a token, all layers and ranks",
    )
    for layout in result.fitting:
        memory = layout.memory
        parts = (memory.base, memory.bank, memory.gates, memory.kv, memory.total)
        table.add_row(
            *(str(layout.mesh.ep), str(layout.mesh.tp), *(f"{part / size:,.2f}" for part in parts)),
            *(f"{layout.kv_room:,}", show_bytes(layout.wire)),
        )
    return table


def _wire_table(layout: Layout) -> Table:
    title = f"Bytes a token and layer, one rank of ep {layout.mesh.ep} x tp {layout.mesh.tp}"
    table = Table("exchange", "dispatch", "combine", "rank space", "gate logits", title=title)
    for exchange in layout.exchanges:
        parts = (exchange.dispatch, exchange.combine, exchange.rank_space, exchange.gate_logits)
        table.add_row(", ".join(name.removesuffix("_proj") for name in exchange.linears), *(f"{n:,.0f}" for n in parts))
    return table
