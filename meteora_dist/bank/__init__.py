"""The bank: LoRA experts of one base model and their gates, on disk."""

from meteora_dist.bank.bank import Bank
from meteora_dist.bank.edit import BankEdit, edit_bank, preview
from meteora_dist.bank.fingerprint import fingerprint
from meteora_dist.bank.joining import NewExpert
from meteora_dist.bank.manifest import BankManifest, ExpertEntry, RoutingDefaults
from meteora_dist.bank.routers import Routers
from meteora_dist.bank.write import write_bank

__all__ = [
    "Bank",
    "BankEdit",
    "BankManifest",
    "ExpertEntry",
    "NewExpert",
    "Routers",
    "RoutingDefaults",
    "edit_bank",
    "fingerprint",
    "preview",
    "write_bank",
]
