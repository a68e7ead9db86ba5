"""Gives the demo bank the routers of a trained bank of the same experts, in bf16; everything else stays as it is.

    python examples/add_routers.py --base BASE --routers MOA_BANK [--bank examples/bank]

Routers read hidden states of the base model alone, so they fit whichever adapters the experts have.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from meteora_dist.bank import Bank, Routers, write_bank


def main() -> None:
    """Rewrites the bank the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    parser.add_argument("--routers", type=Path, required=True, help="a bank with trained routers")
    parser.add_argument("--bank", type=Path, default=Path(__file__).parent / "bank", help="the bank that gets them")
    arguments = parser.parse_args()
    bank, source = Bank.open(arguments.bank), Bank.open(arguments.routers)
    if source.manifest.routers is None or source.names != bank.names:
        parser.error(f"{arguments.routers} must have routers for the experts {', '.join(bank.names)}, in this order")
    weights = dict(zip(source.router_layers, source.routers().bfloat16(), strict=True))
    with TemporaryDirectory(dir=arguments.bank.parent) as folder:
        write_bank(
            Path(folder) / "bank",
            arguments.base,
            bank.manifest.base_model,
            {name: adapter.path for name, adapter in zip(bank.names, bank.adapters, strict=True)},
            {linear: bank.gate(linear) for linear in bank.linears},
            bank.manifest.routing,
            bank.manifest.generation,
            Routers(weights, source.manifest.routers.pooling),
        )
        shutil.rmtree(arguments.bank)
        shutil.move(Path(folder) / "bank", arguments.bank)


if __name__ == "__main__":
    main()
