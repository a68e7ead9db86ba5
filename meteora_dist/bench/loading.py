"""Loads a world, one process a rank, under measurement and, if asked for, under a limit on memory."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from meteora_dist.bench.memory import limited_growth, peak_resident, reset_peak, resident
from meteora_dist.bench.processes import rank_processes
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import EngineUnavailable
from meteora_dist.model.packed import PackedLinear

PROMPT = tuple(range(100, 116))
TOKENS = 8
_LOADING_S = 600.0
_AFTER_A_FAILURE_S = 5.0


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank after loading; sizes in bytes.

    Attributes:
        bank: Matrices of its experts.
        gates: Its gates.
        base: Its part of the base model.
        peak: Largest resident set while loading, above that after the imports.
        load_s: Seconds that loading took.
        tokens: Its greedy answer to a fixed prompt; empty where the rank takes no requests.
    """

    bank: int
    gates: int
    base: int
    peak: int
    load_s: float
    tokens: tuple[int, ...]

    @property
    def shard(self) -> int:
        """What it has to hold."""
        return self.bank + self.gates + self.base


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank did not load; ``memory`` says whether it ran out of that."""

    message: str
    memory: bool


def load_world(config: EngineConfig, limit: int | None = None) -> list[RankReport] | Failure:
    """Loads every rank and lets those that take requests answer one.

    Args:
        config: What to serve.
        limit: Bytes by which each rank's private memory may grow after its imports; None for no limit.

    Returns:
        A report of every rank, or the failure of one that ran out of memory.

    Raises:
        EngineUnavailable: A rank failed for another reason.
    """
    with rank_processes(config, _rank, limit) as pipes:
        return _outcome(pipes)


def _outcome(pipes: Sequence[Connection]) -> list[RankReport] | Failure:
    outcomes: dict[int, RankReport | Failure] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + _LOADING_S
    while waiting and (ready := wait(waiting, timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            outcomes[waiting.pop(pipe)] = outcome = _receive(pipe)
            if isinstance(outcome, Failure):
                deadline = min(deadline, time.monotonic() + _AFTER_A_FAILURE_S)
    failures = sorted((rank, one) for rank, one in outcomes.items() if isinstance(one, Failure))
    if short := [one for _, one in failures if one.memory]:
        return short[0]
    if failures or len(outcomes) < len(pipes):
        raise EngineUnavailable(f"the world did not load: {failures or 'it took too long'}")
    return [one for _, one in sorted(outcomes.items()) if isinstance(one, RankReport)]


def _receive(pipe: Connection) -> RankReport | Failure:
    try:
        outcome: RankReport | Failure = pipe.recv()
    except EOFError:
        return Failure("died without a word", memory=False)
    return outcome


def _rank(config: EngineConfig, rank: int, rendezvous: str | None, pipe: Connection, limit: int | None) -> None:
    """Loads one rank, reports, and serves until the pipe closes."""
    transformers_logging.disable_progress_bar()
    _import_model(config.model)
    gc.collect()
    imported = resident()
    with limited_growth(limit):
        outcome, engine = _load(config, rank, rendezvous, imported)
    pipe.send(outcome)
    with suppress(EOFError):
        pipe.recv()
    if engine is not None:
        engine.stop()


def _load(
    config: EngineConfig, rank: int, rendezvous: str | None, imported: int
) -> tuple[RankReport, RankEngine] | tuple[Failure, None]:
    """Loads and asks one rank, whose process held ``imported`` bytes after its imports."""
    reset_peak()
    started = time.monotonic()
    try:
        engine = RankEngine(config, rank, rendezvous)
        peak, seconds = peak_resident() - imported, time.monotonic() - started
        tokens = asyncio.run(_answer(engine)) if config.mesh.tp_rank(rank) == 0 else ()
    except Exception as error:
        # Not only torch: any allocation may be the one that fails.
        return Failure(repr(error), memory=isinstance(error, MemoryError) or "allocate memory" in str(error)), None
    return _report(engine, peak, seconds, tokens), engine


def _import_model(folder: Path) -> None:
    """Imports what transformers imports only when a model of this kind is made."""
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def _report(engine: RankEngine, peak: int, load_s: float, tokens: tuple[int, ...]) -> RankReport:
    routed = engine.routed
    return RankReport(
        bank=sum(group.state.stack.nbytes for group in routed.groups),
        gates=sum(gate_PH.nbytes for group in routed.groups for gate_PH in group.state.gates),
        base=_base_bytes(routed.model),
        peak=peak,
        load_s=load_s,
        tokens=tokens,
    )


def _base_bytes(model: PreTrainedModel) -> int:
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    return packed + sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters())


async def _answer(engine: RankEngine) -> tuple[int, ...]:
    request = GenerationRequest("capacity", PROMPT, TOKENS, ignore_eos=True)
    return tuple([event.token_id async for event in engine.generate(request)])
