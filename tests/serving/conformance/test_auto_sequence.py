"""``auto-sequence`` over a bank with routers: which expert they pick, for whom, and what callers see of the vote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_dist.bank import Bank, Routers
from meteora_dist.moe.routers import Span, pool
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conformance.conftest import serving, ways_of
from tests.serving.conformance.ways import Grpc, Http, Refused, Told
from tests.support.tiny import LAYERS, SPECS, load_tiny_llama, write_tiny_bank

Way = Http | Grpc
EXPERTS = tuple(SPECS)
PROMPTS = [[1, 2, 3, 4], [50, 60, 70], [200, 9, 17, 33, 120], [99] * 6]
"""The first layer's router takes prompt i for expert i, the last layer's for expert i + 1."""
SEQUENCE: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "model": "auto-sequence"}


def forced_routers(base: Path) -> Routers:
    """In every layer, row i answers to what prompt i looks like there, and to none of the other prompts."""
    model, weights = load_tiny_llama(base), {}
    states = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states for prompt in PROMPTS]
    for layer in range(LAYERS):
        seen_EH = torch.cat(
            [
                pool(hidden[layer][0], [Span(0, len(prompt), "last")])
                for hidden, prompt in zip(states, PROMPTS, strict=True)
            ]
        )
        rows_EH = torch.linalg.pinv(seen_EH).T
        weights[f"model.layers.{layer}"] = (rows_EH.roll(1, 0) if layer == LAYERS - 1 else rows_EH).contiguous()
    return Routers(weights)


@pytest.fixture(scope="module")
def routed_bank(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return write_tiny_bank(tiny_base, tmp_path_factory.mktemp("routed"), routers=forced_routers(tiny_base))


@pytest.fixture(scope="module")
def routed(tiny_base: Path, routed_bank: Bank, tokenizer: TextTokenizer) -> Iterator[TextService]:
    yield from serving(tiny_base, routed_bank, tokenizer)


@pytest.fixture(params=range(4), ids=["http", "http_stream", "grpc", "grpc_stream"])
def routed_way(request: pytest.FixtureRequest, routed: TextService) -> Way:
    return ways_of(routed)[request.param]


async def told(way: Way, prompt: object, **routing: object) -> Told:
    (answer,) = (await way.ask(SEQUENCE | {"prompt": prompt, "routing": {"trace": True, **routing}})).answers
    return answer


def counts(*votes: int) -> tuple[int, ...]:
    return tuple(votes.count(expert) for expert in range(len(EXPERTS)))


async def test_routers_pick_the_expert_of_the_whole_answer(routed_way: Way) -> None:
    for expert, prompt in enumerate(PROMPTS):
        # One vote each: the tie goes to the deeper layer's expert.
        picked = (expert + 1) % len(EXPERTS)
        answer = await told(routed_way, prompt)
        assert answer.dominating == EXPERTS[picked]
        assert set(answer.shares) == {tuple(float(name == EXPERTS[picked]) for name in EXPERTS)}
        assert answer.votes == counts(expert, picked)
        by_name = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "model": EXPERTS[picked]}
        assert answer.text == (await routed_way.ask(by_name)).text


async def test_each_prompt_of_a_call_has_its_own_vote(routed_way: Way) -> None:
    question = SEQUENCE | {"prompt": PROMPTS, "n": 2, "routing": {"trace": True, "vote": "last"}}
    answers = (await routed_way.ask(question)).answers
    assert [one.dominating for one in answers] == [EXPERTS[(i // 2 + 1) % 4] for i in range(8)]


async def test_votes_are_shown_to_those_who_trace_auto_sequence(routed_way: Way) -> None:
    assert (await told(routed_way, PROMPTS[0], trace=False)).votes == ()
    by_name = {"prompt": PROMPTS[0], "max_tokens": 2, "model": "plain", "routing": {"trace": True}}
    assert (await routed_way.ask(by_name)).answers[0].votes == ()


@pytest.mark.parametrize(
    ("model", "vote", "reason"),
    [
        ("auto", "last", "routing.vote is for mode auto-sequence, and this is auto"),
        ("plain", "majority", "routing.vote is for mode auto-sequence, and this is named"),
    ],
    ids=["auto", "named"],
)
async def test_a_vote_is_for_auto_sequence(routed_way: Way, model: str, vote: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        await routed_way.ask({"prompt": "x", "model": model, "routing": {"vote": vote}})
    assert refused.value.status == 400


async def test_a_bank_without_routers_refuses_to_be_told_how_they_vote(way: Way) -> None:
    with pytest.raises(Refused, match="is for a bank with routers, and this one has none; its gates vote") as refused:
        await way.ask(SEQUENCE | {"prompt": "x", "routing": {"vote": "last"}})
    assert refused.value.status == 400
    answer = await told(way, PROMPTS[0])
    assert (answer.votes, answer.dominating in EXPERTS) == ((), True)


async def test_an_unknown_rule_is_refused(routed: TextService) -> None:
    http, _, grpc, _ = ways_of(routed)
    with pytest.raises(Refused, match=r"routing\.vote is 'first', but must be one of majority, last"):
        await http.ask(SEQUENCE | {"prompt": "x", "routing": {"vote": "first"}})
    with pytest.raises(Refused, match=r"routing\.vote is 'number 7', but must be one of majority, last"):
        await grpc.ask(SEQUENCE | {"prompt": "x", "routing": {"vote": 7}})
