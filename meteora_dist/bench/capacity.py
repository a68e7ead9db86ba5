"""What a mesh holds: bank bytes and peak memory of its ranks, and a bank that one rank cannot hold and two can."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from meteora_dist.bench.loading import Failure, RankReport, load_world
from meteora_dist.bench.synthetic import write_synthetic_bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.mesh import Mesh
from meteora_dist.planning.known import shape_of
from meteora_dist.planning.memory import Demand, rank_memory

PEAK_SLACK = 1.15
"""Most that a rank's resident set may reach while loading, of what it has to hold."""
KV_TOKENS = 64
"""Tokens of KV cache: next to none, because experts are what is measured."""


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    """What is measured.

    Attributes:
        model: Folder of the base model.
        experts: Sizes of the banks, in experts.
        rank: LoRA rank of every expert.
        meshes: Layouts that load each bank.
        dtype: Of weights.
        threads: Torch threads of a rank.
    """

    model: Path
    experts: tuple[int, ...]
    rank: int
    meshes: tuple[Mesh, ...]
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = 1

    def config(self, bank: Path, mesh: Mesh) -> EngineConfig:
        """An engine with next to no KV cache."""
        return EngineConfig(
            **{"model": self.model, "bank": bank, "ep": mesh.ep, "tp": mesh.tp},
            **{"dtype": self.dtype, "threads": self.threads},
            **dict.fromkeys(("max_model_len", "max_batch_tokens", "kv_cache_tokens"), KV_TOKENS),
        )


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """One bank on one mesh; bytes, of the fullest rank unless it says otherwise.

    Attributes:
        experts: In the bank.
        ep: Expert-parallel groups.
        tp: Ranks of a group.
        dtype: Of weights.
        bank_total: Of the whole bank.
        bank: The rank's part of it.
        bank_of_even_share: ``bank`` over ``bank_total / (ep tp)``.
        gates: Its gates.
        base: Its part of the base model.
        peak: Largest resident set while loading, above that after the imports; of the rank where it is largest for its
            shard.
        peak_of_shard: ``peak`` over all that rank has to hold.
        load_s: Seconds that loading took.
    """

    experts: int
    ep: int
    tp: int
    dtype: str
    bank_total: int
    bank: int
    bank_of_even_share: float
    gates: int
    base: int
    peak: int
    peak_of_shard: float
    load_s: float


@dataclass(frozen=True, slots=True)
class LimitRow:
    """A bank under a limit on every rank's memory.

    Attributes:
        experts: In the bank.
        limit: Bytes a rank's private memory may grow by after its imports.
        one_rank: What became of a world of one rank: ``served``, or the error.
        two_ranks: The same of two, ep = 2.
        same_tokens: Whether the two answered as one rank without a limit does.
    """

    experts: int
    limit: int
    one_rank: str
    two_ranks: str
    same_tokens: bool


def measure_capacity(plan: CapacityPlan, advance: Callable[[], None]) -> list[CapacityRow]:
    """Writes each bank once and loads it on every mesh; ``advance`` is called after each."""
    rows = []
    for experts in plan.experts:
        with _bank(plan, experts) as bank:
            for mesh in plan.meshes:
                rows.append(_row(plan, experts, mesh, _loaded(load_world(plan.config(bank, mesh)))))
                advance()
    return rows


def measure_limit(plan: CapacityPlan, experts: int, advance: Callable[[], None]) -> tuple[LimitRow, list[CapacityRow]]:
    """Gives one bank to one rank under a limit, to the same rank without it, and to two ranks under that limit.

    Random experts are bfloat16 and stay so. The limit is half way between what one rank has to hold and what each of
    two has to. ``advance`` is called after each world. Tokens are compared, so ``plan.dtype`` should be float32.

    Returns:
        What became of them, and what the ranks held that served: one without a limit, two under it if they did.
    """
    one, two = Mesh(), Mesh(ep=2)
    demand = Demand(experts, plan.rank, plan.dtype, kv_tokens=KV_TOKENS, expert_dtype="bfloat16")
    shape = shape_of(str(plan.model))
    # On the CPU an output layer that is the embedding is packed beside it.
    head = shape.vocabulary * shape.hidden * demand.number_bytes if shape.tied else 0
    limit = (rank_memory(shape, demand, one).total + rank_memory(shape, demand, two).total) // 2 + head
    with _bank(plan, experts) as bank:
        alone = load_world(plan.config(bank, one), limit)
        advance()
        free = load_world(plan.config(bank, one))
        advance()
        together = load_world(plan.config(bank, two), limit)
        advance()
    rows = [_row(plan, experts, one, _loaded(free))]
    rows += [] if isinstance(together, Failure) else [_row(plan, experts, two, together)]
    outcome = LimitRow(
        experts=experts,
        limit=limit,
        one_rank=_told(alone),
        two_ranks=_told(together),
        same_tokens=not isinstance(together, Failure)
        and {report.tokens for report in together} == {report.tokens for report in _loaded(free)},
    )
    return outcome, rows


@contextmanager
def _bank(plan: CapacityPlan, experts: int) -> Iterator[Path]:
    with TemporaryDirectory(prefix="meteora-capacity-") as folder:
        path = Path(folder) / "bank"
        write_synthetic_bank(path, plan.model, experts, plan.rank)
        shutil.rmtree(path.with_name("bank.parts"))
        yield path


def _loaded(outcome: Sequence[RankReport] | Failure) -> Sequence[RankReport]:
    if isinstance(outcome, Failure):
        raise MemoryError(f"a rank ran out of memory although none was set a limit: {outcome.message}")
    return outcome


def _told(outcome: Sequence[RankReport] | Failure) -> str:
    return f"out of memory: {outcome.message}" if isinstance(outcome, Failure) else "served"


def _row(plan: CapacityPlan, experts: int, mesh: Mesh, reports: Sequence[RankReport]) -> CapacityRow:
    total = sum(report.bank for report in reports)
    fullest = max(reports, key=lambda report: report.bank)
    steepest = max(reports, key=lambda report: report.peak / report.shard)
    return CapacityRow(
        experts=experts,
        ep=mesh.ep,
        tp=mesh.tp,
        dtype=plan.dtype,
        bank_total=total,
        bank=fullest.bank,
        bank_of_even_share=fullest.bank * mesh.size / total,
        gates=fullest.gates,
        base=fullest.base,
        peak=steepest.peak,
        peak_of_shard=steepest.peak / steepest.shard,
        load_s=max(report.load_s for report in reports),
    )
