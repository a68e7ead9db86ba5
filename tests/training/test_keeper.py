"""Metrics files, the folder of a run, and the names that metrics have in Prometheus."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from meteora_dist.errors import TrainingError
from meteora_dist.training.fleet import prometheus_name
from meteora_dist.training.keeper import METRICS_FILE, MetricsWriter
from meteora_dist.training.run_folder import claim


def test_a_run_that_goes_on_forgets_what_it_makes_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    again = MetricsWriter(tmp_path)
    again.resumed(2)
    again.write(3, {"loss": 30.0, "gate_ce/layer/0": 1.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0]
    (events,) = (tmp_path / "tensorboard").glob("*.2")
    assert scalars(events) == {("loss", 3): 30.0, ("gate_ce/layer/0", 3): 1.0}


def scalars(path: Path) -> dict[tuple[str, int], float]:
    """What an events file holds: records of a length of 8 bytes, a checksum of 4, an event, and a checksum of 4."""
    content, found = path.read_bytes(), {}
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    return found


def test_names_in_prometheus() -> None:
    assert prometheus_name("loss") == ("meteora_train_loss", {"rows": "training", "part": "all"})
    held_out = {"rows": "held_out", "part": "layer/3"}
    assert prometheus_name("held_out/gate_ce/layer/3") == ("meteora_train_gate_ce", held_out)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="no run"):
        claim(tmp_path, {"steps": 1})
    claim(tmp_path / "run", {"steps": 1})
    claim(tmp_path / "run", {"steps": 1})
    claim(tmp_path / "other", {"loop": {"steps": 1}})
    with pytest.raises(TrainingError, match=r"loop\.steps"):
        claim(tmp_path / "other", {"loop": {"steps": 2}})


def test_a_run_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = (
        "from pathlib import Path; from meteora_dist.training.run_folder import claim\n"
        f"mine = claim(Path({str(folder)!r}), {{'steps': 1}}); print('mine', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(TrainingError, match="another process trains in"):
            claim(folder, {"steps": 1})
        process.kill()
    # Nothing has to be cleaned up after a process that was killed.
    mine = claim(folder, {"steps": 1})
    assert mine.is_locked
    assert claim(folder, {"steps": 1}).is_locked


def test_a_place_that_cannot_hold_a_run_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        claim(file, {"steps": 1})
    with pytest.raises(TrainingError, match="cannot hold a run: Not a directory"):
        claim(file / "run", {"steps": 1})
