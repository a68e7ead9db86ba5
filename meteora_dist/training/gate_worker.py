"""What every worker of a gate training does: load, shard, train; the first one writes what came of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoTokenizer

from meteora_dist.bank import Bank
from meteora_dist.model.load import accelerator, load_base, torch_dtype
from meteora_dist.training.gate_data import GateData
from meteora_dist.training.gate_objective import GateObjective
from meteora_dist.training.loop import Keeper, Loop
from meteora_dist.training.settings import GateRun
from meteora_dist.training.zero import load_deepspeed, shard_base

TRAINED_FILE = "trained.safetensors"
"""In the run's folder: what the objective exports."""


def train_gates(run: GateRun, keeper: Keeper) -> None:
    """Trains; in a default process group of the run's workers.

    Raises:
        MeteoraError: The run does not fit its base model, its data or its checkpoints.
    """
    loop = prepare(run, keeper)
    trained = loop.run()
    if dist.get_rank() == 0:
        save_file(trained, run.folder / TRAINED_FILE)
    dist.barrier()


def prepare(run: GateRun, keeper: Keeper) -> Loop:
    """Loads the model and the data, and puts the objective under DeepSpeed. Collective."""
    # Before transformers does, which would let it look for an accelerator aloud.
    load_deepspeed()
    if run.loop.threads:
        torch.set_num_threads(run.loop.threads)
    bank, device, dtype = Bank.open(run.draft), accelerator(), torch_dtype(run.loop.dtype)
    model = load_base(run.base, dtype, device=torch.device("cpu"))
    shard_base(model, run.loop, device)
    if run.loop.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = GateObjective(model, bank, len(run.trained), run.gates, dtype)
    data = GateData(run, bank.names, AutoTokenizer.from_pretrained(run.base, local_files_only=True))
    return Loop(objective, data, run.loop, keeper, device)
