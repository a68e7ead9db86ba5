"""Who gets in: keys, rates, calls at once, and the way out."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meteora_dist.errors import EngineUnavailable, InvalidRequest, KeysError, RateLimited, Unauthenticated
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.gate import KEYS_FILE_VARIABLE, Gate, TokenBucket
from meteora_dist.serving.keys import Keyring, key_digest


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """One caller without limits, one with both; each key is its caller's name."""
    entries = [
        {"name": "free", "sha256": key_digest("free")},
        {"name": "bound", "sha256": key_digest("bound"), "requests_per_minute": 3, "max_live_requests": 2},
    ]
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def name_of(gate: Gate, authorization: str | None) -> str:
    with gate.enter(authorization) as caller:
        return caller.name


@pytest.mark.parametrize("authorization", ["Bearer free", "bearer free", "BEARER  free "])
def test_a_known_key_enters(keys: Path, authorization: str) -> None:
    assert name_of(Gate(Keyring(keys)), authorization) == "free"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "free", "Basic free", "Bearer\tfree"])
def test_without_a_key_nobody_enters(keys: Path, authorization: str | None) -> None:
    with pytest.raises(Unauthenticated, match="an API key is needed"):
        name_of(Gate(Keyring(keys)), authorization)


@pytest.mark.parametrize("authorization", ["Bearer fre", "Bearer free x", "Bearer \N{SNOWMAN}"])
def test_an_unknown_key_does_not_enter(keys: Path, authorization: str) -> None:
    with pytest.raises(Unauthenticated, match="not known"):
        name_of(Gate(Keyring(keys)), authorization)


def test_an_open_service_takes_everybody_and_still_knows_its_keys(keys: Path) -> None:
    assert name_of(Gate(None, anonymous=True), None) == "anonymous"
    gate = Gate(Keyring(keys), anonymous=True)
    assert [name_of(gate, key) for key in (None, "Bearer none", "Bearer bound")] == ["anonymous", "anonymous", "bound"]


def test_the_rate_is_counted_and_the_time_until_the_next_call_is_told(keys: Path) -> None:
    now = [0.0]
    gate = Gate(Keyring(keys), clock=lambda: now[0])
    for _ in range(3):
        name_of(gate, "Bearer bound")
    with pytest.raises(RateLimited, match="requests_per_minute of this API key is 3") as refused:
        name_of(gate, "Bearer bound")
    assert refused.value.retry_after_s == 20
    now[0] = 15.0
    with pytest.raises(RateLimited) as refused:
        name_of(gate, "Bearer bound")
    assert refused.value.retry_after_s == 5
    now[0] = 20.0
    assert name_of(gate, "Bearer bound") == "bound"
    assert {name_of(gate, "Bearer free") for _ in range(100)} == {"free"}


def test_calls_at_once_are_counted_until_they_end(keys: Path) -> None:
    gate = Gate(Keyring(keys))
    with ExitStack() as calls:
        for _ in range(2):
            calls.enter_context(gate.enter("Bearer bound"))
        with pytest.raises(RateLimited, match="max_live_requests of this API key is 2"):
            name_of(gate, "Bearer bound")
        assert (name_of(gate, "Bearer free"), gate.calls) == ("free", 2)
    # The refused one has not been charged: this is the third of three.
    assert (name_of(gate, "Bearer bound"), gate.calls) == ("bound", 0)


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
def test_no_minute_sees_more_than_twice_the_rate(gaps: list[float], rate: int) -> None:
    now, taken = 0.0, []
    bucket = TokenBucket(rate, now)
    for gap in gaps:
        now += gap
        wait_s = bucket.take(now)
        assert 0 <= wait_s <= 60 / rate + 1e-6
        if wait_s == 0:
            taken.append(now)
        else:
            assert len(taken) >= rate
    for start in taken:
        assert sum(start <= time < start + 60 for time in taken) <= 2 * rate


async def test_a_closed_gate_lets_calls_end_and_nobody_in(keys: Path) -> None:
    gate = Gate(Keyring(keys))
    with gate.enter("Bearer free"):
        assert not await gate.drain(0.01)
        with pytest.raises(EngineUnavailable, match="going out of service"):
            name_of(gate, "Bearer free")
        ending = asyncio.ensure_future(gate.drain(5))
        await asyncio.sleep(0)
        assert not ending.done()
    assert await ending


def config(**more: object) -> ServiceConfig:
    return ServiceConfig.model_validate({"model": "m", "bank": "b"} | more)


def test_without_keys_a_service_says_both_ways_and_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_FILE_VARIABLE, raising=False)
    with pytest.raises(InvalidRequest, match=r"keys_file .*METEORA_KEYS_FILE.*access: open"):
        Gate.of(config())
    assert name_of(Gate.of(config(access="open")), None) == "anonymous"


def test_the_keys_come_from_the_configuration_or_the_environment(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS_FILE_VARIABLE, str(keys))
    assert name_of(Gate.of(config()), "Bearer free") == "free"
    with pytest.raises(KeysError, match=r"other\.yaml"):
        Gate.of(config(keys_file=tmp_path / "other.yaml"))
