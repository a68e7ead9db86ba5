"""``meteora bank build`` and ``import-reference``: banks out of adapters, and out of a released checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, NewExpert, RoutingDefaults
from meteora_dist.bank.build import build_bank
from meteora_dist.bank.reference import import_reference as take_apart
from meteora_dist.cli.options import AsJson, named_paths
from meteora_dist.cli.progress import progress_bar
from meteora_dist.model.fit import check_adapters
from meteora_dist.training.sources import find_adapters

Base = Annotated[Path, typer.Option(help="Folder of the base model.")]
BaseId = Annotated[str | None, typer.Option(help="Name of the base model in the bank. [its folder's]")]
TopK = Annotated[int, typer.Option(help="Experts a token uses unless a request says otherwise.", min=1)]


def build(
    out: Annotated[Path, typer.Argument(help="The bank to write; nothing may be there yet.")],
    base: Base,
    adapters: Annotated[Path | None, typer.Option(help="Folder with a PEFT adapter for each expert, EXPERT/.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="One adapter, NAME=FOLDER; repeat for several.")] = None,
    base_id: BaseId = None,
    top_k: TopK = 2,
    as_json: AsJson = False,
) -> None:
    """Build a bank of PEFT adapters without training.

    An expert's gate rows come from gate_rows.safetensors beside its adapter; without it they are prototypes, made of
    the adapter's own matrices. `meteora train gates` trains them.

    Example: meteora bank build bank --base model --adapter chess=adapters/chess --adapter poems=adapters/poems
    """
    folders = {} if adapters is None else {name: found.path for name, found in find_adapters(adapters, ()).items()}
    single = named_paths(adapter or [], "--adapter")
    if twice := sorted(folders.keys() & single):
        raise typer.BadParameter(f"{twice[0]} is in {adapters} as well", param_hint="--adapter")
    folders |= single
    if not folders:
        raise typer.BadParameter("name at least one, or a folder of them with --adapters", param_hint="--adapter")
    with Console(stderr=True).status(f"building a bank of {len(folders)} adapter(s)"):
        check_adapters(base, {name: read_adapter(folder) for name, folder in folders.items()})
        experts = {name: NewExpert(folder) for name, folder in folders.items()}
        bank = build_bank(out, base, base_id or base.resolve().name, experts, RoutingDefaults(top_k=top_k))
    say(bank, as_json)


def import_reference(
    checkpoint: Annotated[Path, typer.Argument(help="The released checkpoint: its folder, or its safetensors file.")],
    out: Annotated[Path, typer.Argument(help="The bank to write; nothing may be there yet.")],
    base: Base,
    base_id: BaseId = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="An expert's name; repeat, in the order of the gates. [MeteoRA's 28 tasks]")
    ] = None,
    alpha: Annotated[float, typer.Option(help="lora_alpha of all experts, which the checkpoint does not say.")] = 16.0,
    top_k: TopK = 2,
    as_json: AsJson = False,
) -> None:
    """Make a bank of a checkpoint that MeteoRA's authors released.

    Gates and matrices keep their numbers. The copy of the base model in the checkpoint is held against BASE.

    Example: meteora bank import-reference MeteoRA-llama3-8b bank --base Meta-Llama-3-8B --top-k 1
    """
    name = base_id or base.resolve().name
    with progress_bar() as progress:
        task = progress.add_task("experts", total=None)
        bank = take_apart(
            checkpoint,
            out,
            base,
            name,
            expert or (),
            alpha,
            RoutingDefaults(top_k=top_k),
            lambda done, of: progress.update(task, completed=done, total=of),
        )
    say(bank, as_json)


def say(bank: Bank, as_json: bool) -> None:
    """The line a command ends with that has written a bank."""
    if as_json:
        typer.echo(json.dumps(made_bank(bank)))
        return
    made = sum(bank.prototypes)
    kinds = f"{len(bank.names) - made} with rows of their own, {made} with prototypes" if made else "all trained"
    line = f"{bank.path}: generation {bank.manifest.generation}, {len(bank.names)} experts ({kinds}), "
    Console(soft_wrap=True, highlight=False).print(f"{line}{len(bank.linears)} gates", markup=False)


def made_bank(bank: Bank) -> dict[str, object]:
    """The same for programs."""
    return {
        "bank": str(bank.path),
        "generation": bank.manifest.generation,
        "experts": list(bank.names),
        "prototypes": [name for name, made in zip(bank.names, bank.prototypes, strict=True) if made],
        "gates": len(bank.linears),
        "routers": len(bank.router_layers),
    }
