"""One replica of the service: it speaks HTTP and gRPC, and owns the ranks."""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar

from fastapi import FastAPI
from ray.util import get_current_placement_group

from meteora_dist.bank import Bank
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.residency import Residency
from meteora_dist.observability.calls import Observer
from meteora_dist.observability.logs import log_json
from meteora_dist.observability.ranks import RankMeter, Serving
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.admin_grpc import AdminMethods
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.experts import ExpertAdmin
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.grpc_health import HealthMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.ray_metrics import RayRecorder
from meteora_dist.serving.rounds import Rounds
from meteora_dist.serving.service import TextService
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.sources import Sources
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.world import World


class Server(AdminMethods, HealthMethods):
    """The class behind the Serve deployment; plain, so that it runs without Serve as well.

    Attributes:
        member: The class of its ranks.
        experts: Changes the bank that it serves.
    """

    member: ClassVar[type[RankActor]] = RankActor

    async def __init__(self, config: ServiceConfig) -> None:  # type: ignore[misc]
        """Reads bank and tokenizer, starts the ranks, and returns when every one is ready.

        Args:
            config: The service's configuration. Its ranks live in this process's placement group when it has one.

        Raises:
            InvalidRequest: There are no API keys, though the configuration demands them, or an expert root is missing.
            CheckpointError: The model, the bank or the keys file cannot be used.
            ClusterError: The ranks could not be placed or did not start.
        """
        log_json(sys.stderr)
        self._playground = config.playground
        gate, sources = Gate.of(config), Sources(config.expert_roots)
        observer = Observer(RayRecorder())
        generations = Generations(config.bank, config.generations_folder)
        if config.expert_roots:
            await asyncio.to_thread(generations.make_folder)
        self._sharing = Sharing(generations, config.generations_poll_s, observer.recorder)
        bank = await self._sharing.join()
        tokenizer = await asyncio.to_thread(open_tokenizer, config, bank)
        residency = Residency.of(bank, config.ep)
        self._world = await World.launch(config, residency, get_current_placement_group(), self.member)
        self.service = TextService(self._world, tokenizer, Catalog(bank.manifest), config.limits, gate, observer)
        self.experts = ExpertAdmin(self._world, self.service, generations, bank)
        self._sharing.serve(self.experts)
        self.admin = AdminService(self.experts, self._sharing, sources)
        meter = RankMeter(observer.recorder, config.mesh, config.max_expert_labels)
        self._rounds = Rounds(self._world, self.service, meter, self._serving, config.metrics_interval_s)
        self._rounds.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP application; Serve calls this after the constructor."""
        return create_api(self.service, self.admin, self._playground)

    def _serving(self) -> Serving:
        newest = max(self._sharing.published, self.experts.serving)
        return Serving(self.experts.manifest, newest, self._world.residency)

    async def check_health(self) -> None:
        """Raises when lost ranks could not be rebuilt, with the cause: Serve then replaces this replica."""
        if self._world.failure is not None:
            raise EngineUnavailable(self._world.failure)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new calls, and waits for those under way; whether all ended in time.

        For who stops the whole service at once: Serve itself waits when it stops a replica, and sends it no calls.
        """
        return await self.service.gate.drain(timeout_s)


def open_model(config: ServiceConfig) -> tuple[Bank, TextTokenizer]:
    """The newest generation of the bank, checked against its base model, and the model's tokenizer.

    Raises:
        CheckpointError: One of them cannot be used.
    """
    bank = Generations(config.bank, config.generations_folder).open()
    return bank, open_tokenizer(config, bank)


def open_tokenizer(config: ServiceConfig, bank: Bank) -> TextTokenizer:
    """The tokenizer of the base model, which must be that of the bank; raises CheckpointError."""
    bank.check_base(config.model)
    return TextTokenizer.open(config.model)
