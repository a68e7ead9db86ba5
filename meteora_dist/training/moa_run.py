"""One MoA run from files to files: a bank and rows in, the next bank out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from meteora_dist.bank import Bank
from meteora_dist.errors import BankError
from meteora_dist.model.load import Dtype, load_base, torch_dtype
from meteora_dist.moe.inject import inject
from meteora_dist.training.moa_bank import trained_experts, write_trained
from meteora_dist.training.moa_data import read_domains
from meteora_dist.training.moa_loop import MoaRun, Report, fit
from meteora_dist.training.moa_objective import MoaObjective, MoaSettings


@dataclass(frozen=True, slots=True)
class MoaJob:
    """What is trained, on what, and where it goes.

    Attributes:
        base: Folder of the base model.
        data: Folder with the rows of every expert, see ``read_domains``.
        out: The bank to write; nothing may be there yet.
        settings: What is learned.
        run: How.
        trained: Names of the experts to train; all without any.
        max_tokens: Longest row that is used.
        dtype: Of the base model and of what it computes; what is trained is fp32.
    """

    base: Path
    data: Path
    out: Path
    settings: MoaSettings
    run: MoaRun
    trained: tuple[str, ...] = ()
    max_tokens: int = 1024
    dtype: Dtype = "float32"


def train_moa(job: MoaJob, bank: Bank, report: Report) -> Bank:
    """Trains routers, and LoRAs if wanted, from where ``bank`` stands, and writes the next one.

    Args:
        job: See there.
        bank: What training starts from.
        report: Gets the lines of ``fit`` between one with ``event`` ``start``, which has all options, and one ``end``.

    Raises:
        CheckpointError: Something is at ``job.out``, bank, base and rows do not fit each other, or files are missing.
        ExpertNotFound: An expert to train is not in the bank.
    """
    if job.out.exists():
        raise BankError(job.out, "exists already; remove it or write the bank elsewhere")
    bank.check_base(job.base)
    trained = trained_experts(bank, job.trained)
    # An expert without rows, and that gets none, can be no answer: its domain teaches nobody.
    taught = {
        entry.name: index
        for index, entry in enumerate(bank.manifest.experts)
        if entry.router == "trained" or index in trained
    }
    rows = read_domains(job.data, taught, AutoTokenizer.from_pretrained(job.base), job.max_tokens)
    dtype = torch_dtype(job.dtype)
    routed = inject(load_base(job.base, dtype), bank, dtype)
    objective = MoaObjective(routed, bank, trained, job.settings)
    routers, loras = objective.router_parameters(), objective.lora_parameters()
    report(
        {
            "event": "start",
            "experts": bank.names,
            "trained": [bank.names[index] for index in trained],
            "router_parameters": sum(parameter.numel() for parameter in routers),
            "lora_parameters": sum(parameter.numel() for parameter in loras),
            "training_rows": {name: len(rows.training[index]) for name, index in taught.items()},
            "skipped_rows": rows.skipped,
            "dtype": job.dtype,
            **job.settings.model_dump(),
            **job.run.model_dump(),
        }
    )
    fit(objective, rows, bank.names, job.run, report)
    written = write_trained(job.out, job.base, bank, routed, objective)
    report({"event": "end", "bank": str(job.out), "generation": written.manifest.generation})
    return written
