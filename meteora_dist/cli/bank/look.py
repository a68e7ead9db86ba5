"""``meteora bank inspect``, ``validate`` and ``diff``: what a bank is, whether it is sound, how two differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE
from meteora_dist.adapters.files import read_json_object
from meteora_dist.bank import Bank
from meteora_dist.bank.check import faults_of
from meteora_dist.bank.diff import BankDiff, diff_banks
from meteora_dist.bank.gates import GATES_FILE
from meteora_dist.bank.manifest import read_manifest
from meteora_dist.cli.options import AsJson
from meteora_dist.cli.progress import progress_bar
from meteora_dist.errors import AdapterError, MeteoraError
from meteora_dist.planning.sizes import show_bytes

Folder = Annotated[Path, typer.Argument(help="Folder of the bank.")]
_SHOWN_DIGITS = 8


def inspect(bank: Folder, as_json: AsJson = False) -> None:
    """Show what a bank holds: experts, ranks, linears, sizes, gates, routers, digests, where they are from.

    Headers are checked, weights are not hashed; `meteora bank validate` does that.

    Example: meteora bank inspect examples/bank
    """
    opened = Bank.open(bank, hashing=False)
    facts = _facts(opened)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = Console(soft_wrap=True, highlight=False)
    for name in ("base_model", "base_fingerprint", "generation", "routing", "gates", "routers"):
        console.print(f"{name.replace('_', ' '):<17}{_line(facts[name])}", markup=False)
    for name, of in (("adapts", _targets), ("made for", _made_for)):
        console.print(f"{name:<17}{_shared(facts['experts'], of)}", markup=False)
    Console().print(_table(facts["experts"]))


def validate(
    bank: Folder,
    model: Annotated[Path | None, typer.Option(help="Base model folder that it must be for. [not checked]")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every header and digest of a bank; exit code 1 and a line for each fault.

    Example: meteora bank validate examples/bank
    """
    with progress_bar() as progress:
        task = progress.add_task("checking", total=None)

        def checked(what: str) -> None:
            progress.update(task, advance=1, description=f"checked {what}")

        faults = faults_of(bank, model, checked)
    if as_json:
        typer.echo(json.dumps({"bank": str(bank), "sound": not faults, "faults": faults}))
    elif faults:
        for fault in faults:
            typer.secho(f"error: {fault}", fg=typer.colors.RED, err=True)
    else:
        typer.echo(f"{bank}: sound, {len(read_manifest(bank / 'bank.json').experts)} experts")
    raise typer.Exit(bool(faults))


def diff(
    a: Annotated[Path, typer.Argument(help="Folder of one bank.")],
    b: Annotated[Path, typer.Argument(help="Folder of the other.")],
    as_json: AsJson = False,
) -> None:
    """Show how bank B differs from bank A: experts by digest, gate and router rows by number.

    Exit code 0 when nothing but the generation differs, 1 when something does, 2 when a bank cannot be read.

    Example: meteora bank diff bank bank-2
    """
    try:
        with Console(stderr=True).status("comparing"):
            found = diff_banks(Bank.open(a), Bank.open(b))
    except MeteoraError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"same": found.same, **asdict(found)}))
    else:
        Console(soft_wrap=True, highlight=False).print("\n".join(_lines(found)), markup=False)
    raise typer.Exit(not found.same)


def _facts(bank: Bank) -> dict[str, Any]:
    manifest, header, routers = bank.manifest, bank.gate_header, bank.router_header
    return {
        "path": str(bank.path),
        "base_model": manifest.base_model,
        "base_fingerprint": manifest.base_fingerprint,
        "generation": manifest.generation,
        "routing": manifest.routing.model_dump(),
        "gates": {
            "linears": len(bank.linears),
            "dtypes": sorted({info.dtype for info in header.tensors.values()}),
            "bytes": (bank.path / GATES_FILE).stat().st_size,
            "digest": manifest.gate_digest,
        },
        "routers": None
        if manifest.routers is None or routers is None
        else {"layers": len(routers.tensors), **manifest.routers.model_dump()},
        "experts": [_expert(bank, index) for index in range(len(bank.names))],
    }


def _expert(bank: Bank, index: int) -> dict[str, Any]:
    entry, adapter = bank.manifest.experts[index], bank.adapters[index]
    config = read_json_object(adapter.path / CONFIG_FILE, AdapterError)
    return {
        **entry.model_dump(),
        "ranks": sorted({shape.rank for shape in adapter.shapes.values()}),
        "linears": len(adapter.shapes),
        "parameters": adapter.parameters,
        "bytes": (adapter.path / WEIGHTS_FILE).stat().st_size,
        "made_for": config.get("base_model_name_or_path"),
        "peft_version": config.get("peft_version"),
    }


def _line(value: Any) -> str:
    """A fact as a person reads it."""
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    return ", ".join(
        f"{name.replace('_', ' ')} {', '.join(part) if isinstance(part, list) else _counted(name, part)}"
        for name, part in value.items()
    )


def _counted(name: str, value: object) -> str:
    return show_bytes(value) if name == "bytes" and isinstance(value, int) else str(value)


def _targets(expert: dict[str, Any]) -> str:
    return " ".join(expert["targets"])


def _made_for(expert: dict[str, Any]) -> str:
    peft = f", by PEFT {expert['peft_version']}" if expert["peft_version"] else ""
    return f"{expert['made_for'] or 'not said'}{peft}"


def _shared(experts: list[dict[str, Any]], of: Callable[[dict[str, Any]], str]) -> str:
    """What all experts have in common; where they differ, each with its experts."""
    values = dict.fromkeys(map(of, experts))
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value}: {', '.join(one['name'] for one in experts if of(one) == value)}" for value in values)


def _table(experts: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"{len(experts)} experts", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False
    )
    table.add_column("expert", overflow="fold", min_width=18)
    for column in ("rank", "alpha", "linears", "size", "gate", "router", "digest"):
        table.add_column(column, no_wrap=True)
    for one in experts:
        table.add_row(
            one["name"],
            ", ".join(map(str, one["ranks"])),
            f"{one['alpha']:g}" + (" rs" if one["rslora"] else ""),
            str(one["linears"]),
            show_bytes(one["bytes"]),
            one["gate"],
            one["router"],
            one["digest"][:_SHOWN_DIGITS],
        )
    return table


def _lines(found: BankDiff) -> list[str]:
    lines = [f"{field}: {before} -> {after}" for field, (before, after) in found.settings.items()]
    lines += [f"- {name}" for name in found.removed] + [f"+ {name}" for name in found.added]
    for name, fields in found.changed.items():
        shown = (f"{field} {_short(before)} -> {_short(after)}" for field, (before, after) in fields.items())
        lines.append(f"~ {name}: {', '.join(shown)}")
    lines += [f"~ {name}: gate rows of {count} linears" for name, count in found.gates.items()]
    lines += [f"~ {name}: router rows" for name in found.routers]
    lines += ["the experts come in another order"] if found.order else []
    return lines or ["no difference"]


def _short(value: str) -> str:
    return value[:_SHOWN_DIGITS] if len(value) == 64 else value
