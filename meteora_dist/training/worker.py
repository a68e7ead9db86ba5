"""What every worker of a training does: load, shard, train; the first one writes what came of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.model.load import accelerator, load_base, torch_dtype
from meteora_dist.training.gate_data import GateData
from meteora_dist.training.gate_objective import GateObjective
from meteora_dist.training.loop import Keeper, Loop
from meteora_dist.training.moa_objective import MoaObjective
from meteora_dist.training.objective import Objective, TrainingData
from meteora_dist.training.run_folder import TRAINED_FILE
from meteora_dist.training.settings import GateRun, MoaRun, Run
from meteora_dist.training.task_data import TaskData
from meteora_dist.training.zero import load_deepspeed, shard_base


def train(run: Run, keeper: Keeper) -> None:
    """Trains; in a default process group of the run's workers.

    Raises:
        MeteoraError: The run does not fit its base model, its data or its checkpoints.
    """
    loop = prepare(run, keeper)
    trained = loop.run()
    if dist.get_rank() == 0:
        save_file(trained, run.folder / TRAINED_FILE)
    dist.barrier()


def prepare(run: Run, keeper: Keeper) -> Loop:
    """Loads the model and the data, and puts the objective under DeepSpeed. Collective."""
    # Before transformers does, which would let it look for an accelerator aloud.
    load_deepspeed()
    if run.loop.threads:
        torch.set_num_threads(run.loop.threads)
    device = accelerator()
    model = load_base(run.base, torch_dtype(run.loop.dtype), device=torch.device("cpu"))
    shard_base(model, run.loop, device)
    if run.loop.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective, data = _of(run, model)
    return Loop(objective, data, run.loop, keeper, device)


def _of(run: Run, model: PreTrainedModel) -> tuple[Objective, TrainingData]:
    """What the run optimises, and on what."""
    bank, dtype = Bank.open(run.draft), torch_dtype(run.loop.dtype)
    tokenizer = AutoTokenizer.from_pretrained(run.base, local_files_only=True)
    if isinstance(run, MoaRun):
        trained = [bank.names.index(name) for name in run.trained]
        data = TaskData(run, run.moa, bank.names, tokenizer, count_prompt=False)
        return MoaObjective(model, bank, trained, run.moa, dtype), data
    assert isinstance(run, GateRun), "a run trains gates or routers"
    return GateObjective(model, bank, len(run.trained), run.gates, dtype), GateData(run, bank.names, tokenizer)
