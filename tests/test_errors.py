"""Errors cross processes whole."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from meteora_dist.errors import BankError, ExpertNotFound, InvalidRequest, MeteoraError, Overloaded, RateLimited


@pytest.mark.parametrize(
    "error",
    [
        BankError(Path("bank"), "is empty"),
        InvalidRequest("too hot", "temperature"),
        ExpertNotFound("no such expert", "model"),
        Overloaded("later"),
        RateLimited("later", 3),
    ],
)
def test_errors_survive_pickling(error: MeteoraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_checkpoint_error_names_its_path() -> None:
    assert str(BankError(Path("bank"), "is empty")) == "bank: is empty"
