"""From what ranks count to metrics: growth between two looks, sums over ranks, and how uneven the load is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from meteora_dist.bank import BankManifest
from meteora_dist.engine.mesh import Mesh
from meteora_dist.engine.report import RankReport
from meteora_dist.moe.residency import Residency
from meteora_dist.observability import metrics
from meteora_dist.observability.metrics import OTHER_EXPERTS, Metric, Recorder


@dataclass(frozen=True, slots=True)
class Losses:
    """What became of the ranks since the replica started.

    Attributes:
        lost: Times they were lost.
        rebuilt: Times they came back.
        failed: Attempts to bring them back that failed.
        rebuild_s: Seconds from losses to returns.
    """

    lost: int = 0
    rebuilt: int = 0
    failed: int = 0
    rebuild_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What the ranks serve at the time of a look.

    Attributes:
        manifest: Of the bank generation that new requests use.
        newest: The newest bank generation of all replicas.
        residency: What they hold, and where.
    """

    manifest: BankManifest
    newest: int
    residency: Residency


Key = TypeVar("Key", bound=Hashable)


class Growth(Generic[Key]):
    """How much counters have grown from one look to the next; one that is smaller than before has begun anew."""

    def __init__(self) -> None:
        """Starts with every counter at zero."""
        self._seen: Mapping[Key, float] = {}

    def since_last(self, counts: Mapping[Key, float]) -> dict[Key, float]:
        """By how much each counter has grown since the last look, where a missing one was zero."""
        before, self._seen = self._seen, counts
        grown = {counter: count - before.get(counter, 0.0) for counter, count in counts.items()}
        return {counter: counts[counter] if growth < 0 else growth for counter, growth in grown.items()}

    def forget(self) -> None:
        """All counters begin anew."""
        self._seen = {}


class ExpertLabels:
    """Which experts have a label of their own: the first ``limit`` of all that were ever seen here.

    Prometheus keeps a series for every label that ever was, so an expert that has left does not make room for another.
    """

    def __init__(self, limit: int) -> None:
        """Starts with none."""
        self._limit = limit
        self._names: set[str] = set()

    def of(self, name: str) -> str:
        """The label of an expert."""
        if name not in self._names:
            if len(self._names) >= self._limit:
                return OTHER_EXPERTS
            self._names.add(name)
        return name


class RankMeter:
    """Writes the metrics of ranks, from what they count."""

    def __init__(self, recorder: Recorder, mesh: Mesh, max_expert_labels: int) -> None:
        """Starts with nothing counted.

        Args:
            recorder: Where metrics go.
            mesh: Of the ranks.
            max_expert_labels: Most experts with a label of their own.
        """
        self._recorder = recorder
        self._mesh = mesh
        self._labels = ExpertLabels(max_expert_labels)
        self._names: dict[str, str] = {}
        self._losses = Losses()
        self._exchanged = Growth[tuple[Metric, int, str]]()
        self._used = Growth[tuple[int, str]]()

    def losses(self, now: Losses) -> None:
        """Writes what became of the ranks; comes before ``look``, as new ranks count from zero."""
        record, before = self._recorder, self._losses
        record.add(metrics.RANK_LOSSES, now.lost - before.lost)
        record.add(metrics.REBUILDS, now.rebuilt - before.rebuilt, {"outcome": "ok"})
        record.add(metrics.REBUILDS, now.failed - before.failed, {"outcome": "failed"})
        record.add(metrics.REBUILD_SECONDS, now.rebuild_s - before.rebuild_s)
        if now.lost > before.lost:
            self._exchanged.forget()
            self._used.forget()
        self._losses = now

    def look(self, ranks: Sequence[RankReport], serving: Serving) -> None:
        """Writes what the ranks count.

        Args:
            ranks: In rank order.
            serving: What they serve.
        """
        for rank, report in enumerate(ranks):
            self._rank(str(rank), report)
        self._exchanges(ranks)
        self._bank(serving)
        self._experts(self._routed(ranks), serving)

    def _rank(self, rank: str, report: RankReport) -> None:
        record = self._recorder
        record.set(metrics.RANK_REQUESTS, report.active, {"rank": rank, "state": "active"})
        record.set(metrics.RANK_REQUESTS, report.waiting, {"rank": rank, "state": "waiting"})
        record.set(metrics.KV_CACHE_USED, report.cache_used, {"rank": rank})
        record.set(metrics.BANK_BYTES, report.expert_bytes, {"rank": rank, "part": "experts"})
        record.set(metrics.BANK_BYTES, report.gate_bytes, {"rank": rank, "part": "gates"})

    def _exchanges(self, ranks: Sequence[RankReport]) -> None:
        counts: dict[tuple[Metric, int, str], float] = {}
        for rank, report in enumerate(ranks):
            counts |= {(metrics.EXCHANGE_BYTES, rank, kind): count for kind, count in report.exchanged_bytes.items()}
            counts |= {(metrics.EXCHANGE_SECONDS, rank, kind): count for kind, count in report.exchange_s.items()}
        for (metric, rank, kind), grown in self._exchanged.since_last(counts).items():
            self._recorder.add(metric, grown, {"rank": str(rank), "kind": kind})

    def _bank(self, serving: Serving) -> None:
        record = self._recorder
        record.set(metrics.BANK_GENERATION, serving.manifest.generation)
        record.set(metrics.BANK_NEWEST_GENERATION, serving.newest)
        record.set(metrics.BANK_LIVE_GENERATIONS, len(serving.residency.roster.generations))
        record.set(metrics.BANK_EXPERTS, len(serving.manifest.experts))

    def _routed(self, ranks: Sequence[RankReport]) -> dict[str, float]:
        """Tokens of every adapter since the last look, by digest; each group counts those of its own requests."""
        counts = {
            (driver, digest): uses / ranks[driver].linears
            for driver in self._mesh.drivers
            for digest, uses in ranks[driver].loads.items()
        }
        routed: dict[str, float] = {}
        for (_, digest), tokens in self._used.since_last(counts).items():
            routed[digest] = routed.get(digest, 0.0) + tokens
        return routed

    def _experts(self, routed: Mapping[str, float], serving: Serving) -> None:
        newest = {expert.digest: expert.name for expert in serving.manifest.experts}
        # Requests that began with a generation before use adapters that the newest no longer has.
        self._names = {digest: name for digest, name in self._names.items() if digest in routed} | newest
        for digest, tokens in routed.items():
            label = self._labels.of(self._names[digest]) if digest in self._names else OTHER_EXPERTS
            self._recorder.add(metrics.EXPERT_TOKENS, tokens, {"expert": label})
        of_experts = [routed.get(digest, 0.0) for digest in newest]
        self._recorder.set(metrics.EXPERT_IMBALANCE, imbalance(of_experts))
        self._recorder.set(metrics.GROUP_IMBALANCE, imbalance(group_loads(routed, serving.residency)))


def group_loads(routed: Mapping[str, float], residency: Residency) -> list[float]:
    """Tokens every expert-parallel group works on, when an expert's are shared evenly by the groups that hold it.

    Args:
        routed: Tokens of each adapter, by digest.
        residency: Who holds which.
    """
    loads = [0.0] * residency.placement.groups
    for digest, owners in zip(residency.roster.slots, residency.placement.owners, strict=True):
        for group in owners:
            loads[group] += routed.get(digest, 0.0) / len(owners)
    return loads


def imbalance(loads: Sequence[float]) -> float:
    """The largest over the mean: 1 when all are equal, 0 when there are none."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0
