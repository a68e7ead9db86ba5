"""The equivalence matrix: every layout of the mesh gives the logits and the greedy tokens of one process (oracle 3).

(2, 1)  ranks 0 | 1          two groups, whole base models, half of the experts each
(1, 2)  ranks 0 1            one group, base and experts split over two ranks
(2, 2)  ranks 0 1 | 2 3      two groups of two
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.bank import Bank, Routers
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.lockstep import join
from meteora_dist.engine.rank import RankEngine, load_routed
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routers import Span, pool
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from tests.support.ranks import meet, rendezvous, run_ranks
from tests.support.tiny import SPECS, VOCABULARY, Spec, load_tiny_llama, random_routers, write_tiny_bank

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (3, 1)]
BANK = SPECS | {"odd": Spec(3, 6, targets=("k_proj", "o_proj", "up_proj")), "one": Spec(1, 2)}
"""Six experts: ranks that no tp divides, modules missing here and there, a number of experts that 4 does not divide."""
EXPERTS = len(BANK)
BLEND = RoutingChoice(mode="fixed", experts=((3, 0.6), (4, 0.4)))
MIXED = [RoutingChoice(), BASE, named(4), BLEND]
CASES = [([RoutingChoice(top_k=k)], tokens, k) for tokens in (1, 8, 64) for k in (1, 2, 4)] + [(MIXED, 64, 2)]
REQUESTS = [
    GenerationRequest(f"r{i}", tuple(range(3 + 5 * i, 20 + 14 * i)), 5 + i, routing=choice, trace=True)
    for i, choice in enumerate([*MIXED, RoutingChoice(top_k=4), RoutingChoice(top_k=1)])
]
"""Up to 62 prompt tokens, where a pass takes 32: they are split, and prefill shares passes with decoding."""
BALLOTS = [
    GenerationRequest(f"v{i}", tuple(range(3 + 5 * i, 20 + 14 * i)), 1, routing=BASE, vote="routers") for i in range(6)
]


Served = dict[str, list[tuple[int, tuple[float, ...]]]]
"""(token, shares) of every token of a request."""


class Answers(NamedTuple):
    """What one rank saw: logits and shares of every case, its group's requests, spread or all on one group, votes."""

    forward: list[Tensor]
    spread: Served
    lone: Served
    votes: list[tuple[int, ...] | None]


Worlds = dict[tuple[int, int], list[Answers]]


def prompt(tokens: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def forward(routed: RoutedModel, ids_1L: Tensor, choices: list[RoutingChoice], slots: int) -> Tensor:
    share = ids_1L.shape[1] // len(choices)
    step = plan_step(choices, [share] * len(choices), EXPERTS, slots, trace=True)
    with torch.no_grad(), routed.context.routed(step):
        logits = routed.model(ids_1L, use_cache=False).logits
    assert step.shares_TE is not None
    return torch.cat([logits[0], step.shares_TE], dim=-1)


def own_prompt(group: int) -> Tensor:
    return prompt(4 + 30 * group, group)


def forward_cases(routed: RoutedModel, group: int) -> list[Tensor]:
    """The same tokens on all groups, then other tokens on each, then tokens on the first group alone."""
    answers = [forward(routed, prompt(tokens, 2), choices, slots) for choices, tokens, slots in CASES]
    answers.append(forward(routed, own_prompt(group), [RoutingChoice()], 2))
    if group == 0:
        answers.append(forward(routed, prompt(5, 4), [RoutingChoice()], 2))
    else:
        with torch.no_grad():
            routed.serve(2)
    return answers


def own_requests(group: int, groups: int) -> list[GenerationRequest]:
    """Uneven: every group has one, and the first all the others."""
    return [request for i, request in enumerate(REQUESTS) if min(i, groups - 1) == groups - 1 - group]


async def together(engine: RankEngine, requests: list[GenerationRequest]) -> Served:
    async def one(request: GenerationRequest) -> list[tuple[int, tuple[float, ...]]]:
        return [(event.token_id, event.shares or ()) async for event in engine.generate(request)]

    answers = await asyncio.gather(*map(one, requests))
    return {request.request_id: answer for request, answer in zip(requests, answers, strict=True)}


async def votes(engine: RankEngine) -> list[tuple[int, ...] | None]:
    """Of the routers, while another request decodes with the experts of all groups."""

    async def one(request: GenerationRequest) -> tuple[int, ...] | None:
        (event,) = [event async for event in engine.generate(request)]
        return event.votes

    *outcomes, _ = await asyncio.gather(*map(one, BALLOTS), together(engine, REQUESTS[-1:]))
    return outcomes


def run_layout(rank: int, config: EngineConfig, folder: Path) -> Answers:
    mesh = config.mesh
    group, driver = mesh.ep_rank(rank), rank in mesh.drivers
    join(rank, mesh.size, rendezvous(folder, "first", rank))
    answers = forward_cases(load_routed(config, rank), group)
    if mesh.size > 1:
        dist.destroy_process_group()
    engine = RankEngine(config, rank, rendezvous(folder, "second", rank))
    if not driver:
        with pytest.raises(ValueError, match="takes no requests"):
            asyncio.run(together(engine, REQUESTS[:1]))
    spread = asyncio.run(together(engine, own_requests(group, mesh.ep))) if driver else {}
    meet(folder, "spread", rank, mesh.size)
    # Now only the first group has any, and the others serve their experts without a forward pass of their own.
    lone = asyncio.run(together(engine, REQUESTS)) if rank == 0 else {}
    meet(folder, "lone", rank, mesh.size)
    voted = asyncio.run(votes(engine)) if driver else []
    meet(folder, "voted", rank, mesh.size)
    engine.stop()
    return Answers(answers, spread, lone, voted)


def run_all(rank: int, configs: list[EngineConfig], folder: Path) -> list[Answers | None]:
    """Every layout in turn, in the processes that are there; None where this rank has no part in one."""
    answers: list[Answers | None] = []
    for number, config in enumerate(configs):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        answers.append(run_layout(rank, config, place) if rank < config.mesh.size else None)
    return answers


@pytest.fixture(scope="module")
def bank(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    routers = Routers(random_routers(EXPERTS), "mean")
    return write_tiny_bank(tiny_base, tmp_path_factory.mktemp("layout-bank"), BANK, routers)


@pytest.fixture(scope="module")
def worlds(tiny_base: Path, bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """What every rank of every layout saw."""
    configs = [
        EngineConfig(model=tiny_base, bank=bank.path, ep=ep, tp=tp, max_batch_tokens=32, kv_cache_tokens=4096)
        for ep, tp in LAYOUTS
    ]
    by_rank = run_ranks(4, run_all, configs, tmp_path_factory.mktemp("meet"), join=False)
    return {
        layout: [answers[number] for answers in by_rank[: layout[0] * layout[1]]]
        for number, layout in enumerate(LAYOUTS)
    }


@pytest.fixture(scope="module")
def alone(tiny_base: Path, bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(tiny_base), bank, torch.float32)


@pytest.fixture(scope="module")
def greedy(alone: RoutedModel) -> dict[str, list[int]]:
    """Greedy tokens of every request from whole forward passes, one request at a time, without a cache."""
    return {request.request_id: plain_loop(alone, request) for request in REQUESTS}


def plain_loop(routed: RoutedModel, request: GenerationRequest) -> list[int]:
    ids = list(request.prompt_ids)
    while len(ids) < len(request.prompt_ids) + request.max_tokens:
        logits = forward(routed, torch.tensor([ids]), [request.routing], max(1, request.routing.slots))
        ids.append(int(logits[-1, :VOCABULARY].argmax()))
        if ids[-1] == 259:
            break
    return ids[len(request.prompt_ids) :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_shares(worlds: Worlds, alone: RoutedModel, layout: tuple[int, int]) -> None:
    common = [forward(alone, prompt(tokens, 2), choices, slots) for choices, tokens, slots in CASES]
    first_only = forward(alone, prompt(5, 4), [RoutingChoice()], 2)
    for rank, answers in enumerate(worlds[layout]):
        group = rank // layout[1]
        expected = [*common, forward(alone, own_prompt(group), [RoutingChoice()], 2)]
        for answer, wanted in zip(answers.forward, [*expected, first_only][: len(answers.forward)], strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert len(answers.forward) == len(expected) + (group == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_tp_group_agree_to_the_bit(worlds: Worlds, layout: tuple[int, int]) -> None:
    ranks = worlds[layout]
    for rank, answers in enumerate(ranks):
        driver = ranks[rank - rank % layout[1]]
        assert all(map(torch.equal, answers.forward, driver.forward))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens(worlds: Worlds, greedy: dict[str, list[int]], layout: tuple[int, int]) -> None:
    spread = {name: events for answers in worlds[layout] for name, events in answers.spread.items()}
    for served in (spread, worlds[layout][0].lone):
        assert {name: [token for token, _ in events] for name, events in served.items()} == greedy
        for request in REQUESTS:
            total = 0.0 if request.routing.mode == "base" else 1.0
            for _, shares in served[request.request_id]:
                assert len(shares) == EXPERTS
                assert sum(shares) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_vote_alike(worlds: Worlds, alone: RoutedModel, layout: tuple[int, int]) -> None:
    expected = []
    for ballot in BALLOTS:
        with torch.no_grad():
            states = alone.model(torch.tensor([ballot.prompt_ids]), output_hidden_states=True).hidden_states
        span = Span(0, len(ballot.prompt_ids), "mean")
        pooled_LH = torch.cat([pool(hidden[0], [span]) for hidden in states[:-1]])
        expected.append(alone.routers[1].votes(pooled_LH))
    assert len(set(expected)) > 2
    drivers = worlds[layout][:: layout[1]]
    assert [answers.votes for answers in drivers] == [expected] * layout[0]


def test_the_requests_reach_what_they_are_meant_to(greedy: dict[str, list[int]]) -> None:
    assert max(len(request.prompt_ids) for request in REQUESTS) > 32
    assert [len(own_requests(group, 4)) for group in range(4)] == [3, 1, 1, 1]
    assert [len(own_requests(group, 2)) for group in range(2)] == [5, 1]
    assert len({tuple(tokens) for tokens in greedy.values()}) == len(REQUESTS)
    assert min(map(len, greedy.values())) > 1
