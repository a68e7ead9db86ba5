"""A bank of your own PEFT adapters, without training: they can be named and blended at once.

Gate rows are prototypes, made from the adapters' own matrices (docs/decisions/0006), until `meteora train gates` trains
some.

Usage: python examples/build_a_bank/build.py --base BASE --adapters ADAPTERS --out bank
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from meteora_dist.errors import MeteoraError
from meteora_dist.training.moa_bank import first_bank

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
parser.add_argument("--adapters", type=Path, required=True, help="folder with a PEFT adapter for each expert, <name>/")
parser.add_argument("--out", type=Path, required=True, help="the bank; nothing may be there yet")
asked = parser.parse_args()
try:
    bank = first_bank(asked.out, asked.base, asked.base.resolve().name, asked.adapters)
except MeteoraError as error:
    sys.exit(f"error: {error}")
for expert in bank.manifest.experts:
    print(f"{expert.name}: rank {expert.rank}, {', '.join(expert.targets)}")
