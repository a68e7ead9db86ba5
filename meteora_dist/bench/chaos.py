"""Streams while ranks are killed, stopped or made to fail: what callers lose, and how long they wait."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from meteora_cluster.member import free_port
from meteora_dist.bench.chaos_callers import Callers, Question, Stream, connected
from meteora_dist.bench.chaos_ranks import Fault, harm
from meteora_dist.bench.chaos_server import FragileServer
from meteora_dist.bench.findable import Found, ranks
from meteora_dist.errors import EngineUnavailable
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import Endpoints, running_service

PROMPTS = (
    "The capital of France is",
    "I have a peach, two trumpets and an apple. How many fruits do I have?",
    "Determine whether the given sequence of parentheses is properly matched.\n[ ( ) ]",
    "A long way from the village, behind the hills, there is an old mill. " * 12,
)
_RECOVERY_S = 300.0


@dataclass(frozen=True, slots=True)
class ChaosPlan:
    """What is done.

    Attributes:
        faults: Kinds of fault, one after the other.
        injections: Faults of each kind.
        callers: Streams at a time, half of them over gRPC; each caller asks its own question again and again.
        tokens: Most tokens of an answer.
        pause_s: Shortest and longest time between a recovery and the next fault, in seconds.
        seed: Of the choice of times and ranks.
    """

    faults: tuple[Fault, ...] = ("kill", "stop", "raise")
    injections: int = 3
    callers: int = 16
    tokens: int = 64
    pause_s: tuple[float, float] = (1.0, 4.0)
    seed: int = 0

    def questions(self, models: list[str]) -> list[Question]:
        """One for each caller: both transports, every model, prompts of several lengths."""
        return [
            Question(("http", "grpc")[i % 2], models[(i // 2) % len(models)], PROMPTS[i % len(PROMPTS)], self.tokens)
            for i in range(self.callers)
        ]


@dataclass(frozen=True, slots=True)
class ChaosRow:
    """What one kind of fault did.

    Attributes:
        fault: Its kind.
        requests: Answers that were asked for meanwhile.
        failed: Answers that ended with an error.
        changed_tokens: Tokens missing, added or different, compared with the undisturbed run; an answer with all its
            tokens but another text, reason or count adds one.
        faults_injected: Faults.
        recovery_s_max: Longest time any stream had to wait for a token after a fault, or after it was asked for if that
            came later, in seconds. A wait that the next fault falls into counts for that one from then on.
    """

    fault: str
    requests: int
    failed: int
    changed_tokens: int
    faults_injected: int
    recovery_s_max: float


def measure_chaos(config: ServiceConfig, plan: ChaosPlan, say: Callable[[str], None]) -> list[ChaosRow]:
    """Runs a service of its own on this machine, first undisturbed, then under each kind of fault.

    Args:
        config: The service.
        plan: What is done to it.
        say: Told what is under way.

    Raises:
        EngineUnavailable: The service did not start, failed undisturbed, or never recovered.
    """
    with running_service(config, free_port(), free_port(), server=FragileServer) as endpoints:
        return asyncio.run(_all_faults(endpoints, plan, say))


async def _all_faults(endpoints: Endpoints, plan: ChaosPlan, say: Callable[[str], None]) -> list[ChaosRow]:
    dice = random.Random(plan.seed)
    async with connected(endpoints) as callers:
        questions = plan.questions(await callers.models())
        say(f"{len(questions)} streams, undisturbed")
        expected = [Stream() for _ in questions]
        await asyncio.gather(*map(callers.ask, questions, expected))
        if failures := [stream.failure for stream in expected if stream.failure]:
            raise EngineUnavailable(f"a stream failed without any fault: {failures[0]}")
        return [await _one_fault(callers, questions, expected, fault, plan, dice, say) for fault in plan.faults]


async def _one_fault(
    callers: Callers,
    questions: list[Question],
    expected: list[Stream],
    fault: Fault,
    plan: ChaosPlan,
    dice: random.Random,
    say: Callable[[str], None],
) -> ChaosRow:
    load = _Load(callers, questions)
    asking = asyncio.gather(*map(load.keep_asking, range(len(questions))))
    injected: list[float] = []
    try:
        for number in range(plan.injections):
            await asyncio.sleep(dice.uniform(*plan.pause_s))
            target = dice.choice(await ranks())
            say(f"{fault} {number + 1} of {plan.injections}: rank {target.rank}")
            injected.append(time.monotonic())
            await harm(target, fault)
            await asyncio.wait_for(_recovered(load, target), _RECOVERY_S)
    except TimeoutError:
        raise EngineUnavailable(f"no recovery within {_RECOVERY_S:.0f} s of a fault ({fault})") from None
    finally:
        load.over = True
        await asking
    ends = [*injected[1:], time.monotonic()]
    pauses = [stream.pause_s(*span) for span in zip(injected, ends, strict=True) for stream in load.all_streams()]
    return ChaosRow(
        fault=fault,
        requests=len(load.all_streams()),
        failed=sum(stream.failure is not None for stream in load.all_streams()),
        changed_tokens=sum(
            _changed(stream, right) for streams, right in zip(load.streams, expected, strict=True) for stream in streams
        ),
        faults_injected=len(injected),
        recovery_s_max=round(max(pauses), 2),
    )


@dataclass(slots=True)
class _Load:
    """Callers that ask until it is over; ``streams`` has each one's answers, the one under way included."""

    callers: Callers
    questions: list[Question]
    over: bool = False
    streams: list[list[Stream]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = [[] for _ in self.questions]

    async def keep_asking(self, caller: int) -> None:
        while not self.over:
            self.streams[caller].append(Stream())
            await self.callers.ask(self.questions[caller], self.streams[caller][-1])
            if self.streams[caller][-1].failure:
                # As a caller would who is told to come back later.
                await asyncio.sleep(1.0)

    def all_streams(self) -> list[Stream]:
        return [stream for streams in self.streams for stream in streams]


async def _recovered(load: _Load, harmed: Found) -> None:
    """Returns once the harmed rank has a successor, and every caller a token that came after it."""
    while any((target.pid, target.start) == (harmed.pid, harmed.start) for target in await ranks()):
        await asyncio.sleep(0.2)
    back = time.monotonic()
    while not all(any(stream.has_token_after(back) for stream in streams[-2:]) for streams in load.streams):
        await asyncio.sleep(0.2)


def _changed(stream: Stream, right: Stream) -> int:
    if stream.failure is not None:
        # What came of it must be right all the same.
        return sum(token != other for token, other in zip(stream.tokens, right.tokens, strict=False))
    tokens = sum(token != other for token, other in zip_longest(stream.tokens, right.tokens))
    return tokens or int((stream.text, stream.ending) != (right.text, right.ending))
