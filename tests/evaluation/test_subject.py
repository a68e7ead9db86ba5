"""A bank as evaluation uses it: answers in order, elections, prompts that are too long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank, Routers
from meteora_dist.engine.config import EngineConfig
from meteora_dist.evaluation.subject import Answer, Subject
from meteora_dist.moe.routers import LayerRouters, Span, elect, pool
from meteora_dist.moe.routing import BASE, RoutingChoice, named
from tests.support.tiny import SPECS, load_tiny_llama, random_routers, write_tiny_bank

PROMPTS = [tuple((7 * i + k * (i + 1)) % 250 for k in range(length)) for i, length in enumerate((3, 20, 9))]


def subject_of(base: Path, bank: Bank) -> Subject:
    return Subject(EngineConfig(model=base, bank=bank.path, max_model_len=64, kv_cache_tokens=4096))


@pytest.fixture(scope="module")
def subject(tiny_base: Path, tiny_bank: Bank) -> Iterator[Subject]:
    made = subject_of(tiny_base, tiny_bank)
    yield made
    made.close()


@torch.no_grad()
def greedy(base: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The base model's most probable continuation, without a cache."""
    model, ids = load_tiny_llama(base), list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 259:
            break
    return tuple(ids[len(prompt) :])


def test_answers_come_in_order_and_are_the_models(subject: Subject, tiny_base: Path) -> None:
    answers = subject.answers(PROMPTS, BASE, max_tokens=4, vote=False)
    assert [one and one.ids for one in answers] == [greedy(tiny_base, prompt, 4) for prompt in PROMPTS]
    assert all(one and not any(one.shares) for one in answers)


def test_what_does_not_fit_has_no_answer(subject: Subject) -> None:
    long = tuple(range(61))
    first, second = subject.answers([long, PROMPTS[0]], named(1), max_tokens=4, vote=False)
    assert first is None
    assert second is not None
    assert second.shares == pytest.approx((0, 1, 0, 0))


def test_gates_elect_the_expert_with_most_weight(subject: Subject) -> None:
    choice = RoutingChoice()
    voted = subject.answers(PROMPTS, choice, max_tokens=3, vote=True)
    for prompt, one in zip(PROMPTS, voted, strict=True):
        assert one is not None
        elected = one.shares.index(max(one.shares))
        assert subject.answers([prompt], named(elected), max_tokens=3, vote=False) == [one]


def test_routers_elect_where_there_are_some(tiny_base: Path, tmp_path: Path) -> None:
    weights = random_routers(len(SPECS))
    routers = LayerRouters(torch.stack(list(weights.values())), torch.ones(len(SPECS), dtype=torch.bool), "last")
    subject = subject_of(tiny_base, write_tiny_bank(tiny_base, tmp_path, routers=Routers(weights, "last")))
    try:
        expected: list[Answer | None] = []
        for prompt in PROMPTS:
            with torch.no_grad():
                states = load_tiny_llama(tiny_base)(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            pooled_LH = torch.cat([pool(hidden[0], [Span(0, len(prompt), "last")]) for hidden in states[:-1]])
            elected = elect(routers.votes(pooled_LH), "majority")
            expected += subject.answers([prompt], named(elected), max_tokens=3, vote=False)
        assert subject.answers(PROMPTS, RoutingChoice(), max_tokens=3, vote=True) == expected
    finally:
        subject.close()


def test_engine_and_plain_passes_take_turns(subject: Subject) -> None:
    before = subject.answers(PROMPTS[:1], BASE, max_tokens=2, vote=False)
    assert subject.routed.num_experts == len(SPECS)
    assert subject.answers(PROMPTS[:1], BASE, max_tokens=2, vote=False) == before
