"""Both fuzzers against the administration, over the real engine: other experts stay as they are."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.serving.grpc_api import CallFailed
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.proto.meteora.v1 import admin_pb2 as pb
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.administered import ADMIN, Site, administered, write_adapters
from tests.serving.asking import Context
from tests.serving.conformance.fuzzing import QUESTIONS, at_rest, leaks_nothing
from tests.serving.conformance.messages import messages, mutants
from tests.serving.conformance.schemes import OnLoop, fuzz
from tests.serving.conformance.ways import Http, Outcome

CONTEXT = 128
AT_ONCE = 4
RPCS: dict[str, type[Message]] = {
    **dict.fromkeys(["AddExpert", "ReplaceExpert", "ValidateExpert"], pb.PutExpertRequest),
    "RemoveExpert": pb.RemoveExpertRequest,
    "DescribeExperts": pb.DescribeExpertsRequest,
    "Rebalance": pb.RebalanceRequest,
}
FAULTS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED}
KEYS = {
    "the-admin": FAULTS,
    "a-user": {grpc.StatusCode.PERMISSION_DENIED},
    None: {grpc.StatusCode.UNAUTHENTICATED},
}
"""How a call with this key may fail."""


@dataclass(frozen=True)
class Call:
    """A call of one RPC.

    Attributes:
        rpc: Its name.
        message: None when the bytes cannot be read: then gRPC itself answers, and the service sees nothing.
        key: Of the caller.
        patience: Hundredths of a second after which the caller leaves; None for never.
    """

    rpc: str
    message: Any
    key: str | None
    patience: int | None


def calls_of(rpc: str) -> st.SearchStrategy[Call]:
    kind = RPCS[rpc]
    content = st.one_of(messages(kind), messages(kind), mutants(kind))
    keys = st.sampled_from([*["the-admin"] * 8, "a-user", None])
    return st.builds(Call, st.just(rpc), content, keys, st.sampled_from([None, None, None, 0, 3]))


CALLS = st.sampled_from([*RPCS, "AddExpert", "ReplaceExpert", "RemoveExpert"]).flatmap(calls_of)


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_bank: Bank) -> Iterator[RankEngine]:
    engine = RankEngine(EngineConfig(model=tiny_base, bank=tiny_bank.path, max_model_len=CONTEXT, kv_cache_tokens=8192))
    yield engine
    engine.stop()


@dataclass
class Setting:
    """A service with administrators, and an event loop of its own, since hypothesis calls from outside of one."""

    runner: asyncio.Runner
    site: Site
    engine: RankEngine

    def replies(self) -> list[Outcome]:
        """Of the experts that no fuzzer changes."""
        way = Http(self.site.http, False)
        return [self.runner.run(way.ask(question)) for question in QUESTIONS]

    def free(self) -> int | float:
        return self.runner.run(at_rest(self.site.methods.service, self.engine))


@pytest.fixture
def setting(
    engine: RankEngine,
    tiny_base: Path,
    tiny_bank: Bank,
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> Iterator[Setting]:
    root = write_adapters(tiny_base, tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("outside"))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        site = runner.run(stack.enter_async_context(administered(engine, tiny_bank.path, tokenizer, root, tmp_path)))
        site.http.headers.update(ADMIN)
        yield Setting(runner, site, engine)
        runner.run(stack.aclose())


LENGTHS = pytest.mark.parametrize(
    ("examples", "requests"),
    [(30, 90), pytest.param(600, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["quick", "long"],
)


@LENGTHS
def test_no_message_breaks_the_administration(setting: Setting, examples: int, requests: int) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(CALLS, min_size=AT_ONCE, max_size=AT_ONCE))
    def ask(calls: list[Call]) -> None:
        setting.runner.run(together(setting.site, calls, seen))

    before, free = setting.replies(), setting.free()
    ask()
    print(dict(sorted(seen.items())))
    assert seen.total() - seen["unreadable"] >= requests, seen
    # A run that is refused at the door tests no more than the door.
    assert min(seen["answered"], seen["INVALID_ARGUMENT"]) >= requests // 5, seen
    assert min(seen[kind] for kind in ("left", "NOT_FOUND", "ABORTED", "PERMISSION_DENIED", "UNAUTHENTICATED")), seen
    setting.runner.run(setting.site.clear())
    assert setting.replies() == before
    assert setting.free() == free


async def together(site: Site, calls: list[Call], seen: Counter[str]) -> None:
    async with asyncio.timeout(60):
        seen.update(await asyncio.gather(*(outcome(site, call) for call in calls)))


async def outcome(site: Site, call: Call) -> str:
    """How a call ended."""
    if call.message is None:
        return "unreadable"
    context = Context(call.key)
    asking = asyncio.ensure_future(getattr(site.methods, call.rpc)(call.message, context))
    if call.patience is not None:
        await asyncio.wait([asking], timeout=0.01 * call.patience)
        asking.cancel()
    try:
        answer = await asking
    except asyncio.CancelledError:
        return "left"
    except CallFailed:
        assert context.code in KEYS[call.key], (context, call)
        leaks_nothing(context.details)
        return context.code.name
    assert call.key == "the-admin"
    leaks_nothing(str(type(answer).FromString(answer.SerializeToString())))
    return "answered"


@LENGTHS
def test_no_request_breaks_the_administration(setting: Setting, examples: int, requests: int) -> None:
    def steer(draw: st.DrawFn, case: Case) -> None:
        if isinstance(case.body, dict):
            names = {"name": draw(st.sampled_from(["new", "more", "plain"]))} if "name" in case.body else {}
            case.body = {"adapter": draw(st.sampled_from(["team/good", "other", "lying", "../x", "dora"]))} | names
        if "name" in case.path_parameters:
            case.path_parameters = {"name": draw(st.sampled_from(["new", "more", "nobody", "a b"]))}

    before, free = setting.replies(), setting.free()
    operations = ("listExperts", "addExpert", "validateExpert", "replaceExpert", "removeExpert", "rebalance")
    api = OnLoop(create_api(setting.site.methods.service, setting.site.methods.admin), setting.runner.get_loop())
    counts = dict.fromkeys(operations, examples // 3)
    seen = setting.runner.run(asyncio.to_thread(fuzz, api, counts, steer, ADMIN))
    print(dict(sorted(seen.items())))
    assert min(seen[200] + seen[201], seen[400], seen[404]) >= examples // 10, seen
    setting.runner.run(setting.site.clear())
    assert setting.replies() == before
    assert setting.free() == free
    bad = setting.runner.run(setting.site.http.delete("/admin/experts/new?generation=soon"))
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "generation")
