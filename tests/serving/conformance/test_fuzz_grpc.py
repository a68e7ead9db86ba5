"""A mutation fuzzer of gRPC requests, several at once, some of them cancelled, over the real engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.service import TextService
from tests.serving.conformance.fuzzing import at_rest, leaks_nothing, replies
from tests.serving.conformance.messages import messages, mutants
from tests.serving.conformance.ways import Context, Grpc, Http

ALLOWED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
AT_ONCE = 4


@dataclass(frozen=True)
class Call:
    """A message and how it is asked.

    Attributes:
        message: None when the bytes cannot be read: then gRPC itself answers, and the service sees nothing.
        stream: Whether by ``GenerateStream``.
        patience: Seconds, whole, or messages of a stream after which the caller leaves; None for never.
    """

    message: pb.GenerateRequest | None
    stream: bool
    patience: int | None


CALLS = st.builds(
    Call,
    st.one_of(messages(), messages(), mutants()),
    st.booleans(),
    st.sampled_from([None, None, 0, 1, 3]),
)


@pytest.mark.parametrize(
    ("examples", "requests"),
    [(40, 100), pytest.param(900, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["quick", "long"],
)
def test_no_message_breaks_the_service(
    service: TextService, ways: Sequence[Http | Grpc], examples: int, requests: int
) -> None:
    seen: Counter[str] = Counter()
    with asyncio.Runner() as runner:

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
            runner.run(together(service, calls, seen))

        before, free = runner.run(replies(ways)), runner.run(at_rest(service))
        ask()
        assert seen.total() - seen["unreadable"] >= requests, seen
        # A run that is refused at the door tests no more than the door.
        assert min(seen["answered"] + seen["left"], seen["INVALID_ARGUMENT"]) >= requests // 5, seen
        assert seen["answered"], seen
        assert runner.run(replies(ways)) == before
        assert runner.run(at_rest(service)) == free


async def together(service: TextService, calls: list[Call], seen: Counter[str]) -> None:
    methods = GrpcMethods()
    methods.service = service
    async with asyncio.timeout(60):
        seen.update(await asyncio.gather(*(outcome(methods, call) for call in calls)))


async def outcome(methods: GrpcMethods, call: Call) -> str:
    """How a call ended."""
    if call.message is None:
        return "unreadable"
    context = Context()
    asking = asyncio.ensure_future(read(methods, call, call.message, context))
    if call.patience is not None and not call.stream:
        await asyncio.wait([asking], timeout=0.01 * call.patience)
        asking.cancel()
    try:
        return await asking
    except asyncio.CancelledError:
        return "left"
    except CallFailed:
        assert context.code in ALLOWED, (context, call.message)
        leaks_nothing(context.details)
        return context.code.name


async def read(methods: GrpcMethods, call: Call, message: pb.GenerateRequest, context: Context) -> str:
    if not call.stream:
        pb.GenerateResponse.FromString((await methods.Generate(message, context)).SerializeToString())
        return "answered"
    count = 0
    async with aclosing(methods.GenerateStream(message, context)) as parts:
        async for part in parts:
            part.SerializeToString()
            if count == call.patience:
                return "left"
            count += 1
    return "answered"
