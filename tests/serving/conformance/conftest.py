"""One engine with the tiny model, in this process, and the four ways to ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import httpx
import pytest

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conformance.ways import Grpc, Http

CONTEXT = 128


class LoneEngine(RankEngine):
    """One whose bank never changes."""

    def using(self, generation: int) -> AbstractContextManager[None]:
        return nullcontext()


def serving(base: Path, bank: Bank, tokenizer: TextTokenizer) -> Iterator[TextService]:
    """A service of ``bank``, until it is closed."""
    engine = LoneEngine(EngineConfig(model=base, bank=bank.path, max_model_len=CONTEXT, kv_cache_tokens=8192))
    limits = Limits(max_model_len=CONTEXT, max_live_requests=64)
    gate = Gate(None, anonymous=True)
    yield TextService(engine, tokenizer, Catalog(bank.manifest), limits, gate)  # type: ignore[arg-type]
    engine.stop()


@pytest.fixture(scope="module")
def service(tiny_base: Path, tiny_bank: Bank, tokenizer: TextTokenizer) -> Iterator[TextService]:
    yield from serving(tiny_base, tiny_bank, tokenizer)


def ways_of(service: TextService) -> list[Http | Grpc]:
    """HTTP and gRPC, each whole and as a stream."""
    transport = httpx.ASGITransport(create_api(service), raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    servicer = GrpcMethods()
    servicer.service = service
    return [Http(client, False), Http(client, True), Grpc(servicer, False), Grpc(servicer, True)]


@pytest.fixture
def ways(service: TextService) -> list[Http | Grpc]:
    return ways_of(service)


@pytest.fixture(params=[0, 3], ids=["http", "grpc_stream"])
def way(request: pytest.FixtureRequest, ways: list[Http | Grpc]) -> Http | Grpc:
    """Two of them, for the many cases."""
    return ways[request.param]
