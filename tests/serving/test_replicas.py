"""What replicas say of themselves, and when the others take them for gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_dist.errors import BankError
from meteora_dist.serving.replicas import GONE_AFTER_LOOKS, Replicas, ReplicaState


def state(replica: str, beat: int = 1) -> ReplicaState:
    return ReplicaState(replica=replica, beat=beat, generation=7, live=(6, 7), state="serving")


def test_a_replica_is_there_for_as_long_as_its_beat_goes_on(tmp_path: Path) -> None:
    watcher = Replicas(tmp_path)
    for beat in range(2 * GONE_AFTER_LOOKS):
        Replicas(tmp_path).tell(state("other", beat))
        Replicas(tmp_path).tell(state("me", beat))
        assert watcher.others("me") == (state("other", beat),)
    for _ in range(GONE_AFTER_LOOKS - 1):
        assert watcher.others("me") == (state("other", beat),)
    assert watcher.others("me") == ()
    assert [path.name for path in tmp_path.iterdir()] == ["replica-me.json"]
    # One that was only held up comes back.
    Replicas(tmp_path).tell(state("other", beat + 1))
    assert watcher.others("me") == (state("other", beat + 1),)


def test_who_looks_for_the_first_time_takes_nobody_for_gone(tmp_path: Path) -> None:
    Replicas(tmp_path).tell(state("other"))
    assert Replicas(tmp_path).others("me") == (state("other"),)


def test_a_later_version_may_say_more(tmp_path: Path) -> None:
    (tmp_path / "replica-new.json").write_text(json.dumps(state("new").model_dump() | {"mood": "good"}))
    assert Replicas(tmp_path).others("me") == (state("new"),)


@pytest.mark.parametrize("text", ["", "{}", '{"replica": 5}'])
def test_what_cannot_be_understood_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "replica-odd.json").write_text(text)
    with pytest.raises(BankError, match=r"replica-odd\.json: is not what a replica says of itself"):
        Replicas(tmp_path).others("me")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="cannot be written"):
        Replicas(tmp_path / "none").tell(state("me"))
