"""``meteora bank add`` and ``remove``: the next generation of a bank, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meteora_dist.bank import Bank, BankEdit, NewExpert, edit_bank
from meteora_dist.cli.bank.make import say
from meteora_dist.cli.options import AsJson, complete_expert, named_paths

Old = Annotated[Path, typer.Argument(help="Folder of the bank as it is; it stays.")]
Out = Annotated[Path, typer.Option(help="The next generation; nothing may be there yet.")]


def add(
    bank: Old,
    expert: Annotated[list[str], typer.Argument(help="Experts that join, NAME=FOLDER of a PEFT adapter.")],
    out: Out,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let them take the place of experts of the same name.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a bank with more experts, or with new adapters for some it has; all of them or none.

    Rows of other experts stay bit for bit. A new one's gate rows come from gate_rows.safetensors beside its adapter,
    else they are prototypes. A running service is changed by its administration API instead.

    Example: meteora bank add bank poems=adapters/poems --out bank-2
    """
    joining = {name: NewExpert(folder) for name, folder in named_paths(expert, "EXPERT").items()}
    with Console(stderr=True).status("checking and writing"):
        old = Bank.open(bank)
        known = {name: one for name, one in joining.items() if replace and name in old.names}
        new = {name: one for name, one in joining.items() if name not in known}
        after = edit_bank(old, BankEdit(add=new, replace=known), out)
    say(after, as_json)


def remove(
    bank: Old,
    expert: Annotated[list[str], typer.Argument(help="Names of the experts that go.", autocompletion=complete_expert)],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Write a bank with fewer experts.

    Example: meteora bank remove bank chess poems --out bank-2
    """
    with Console(stderr=True).status("checking and writing"):
        after = edit_bank(Bank.open(bank), BankEdit(remove=tuple(expert)), out)
    say(after, as_json)
