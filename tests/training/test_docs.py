"""docs/training.md names every option with its default, and every metric's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meteora_dist.cli.train_options import read_options
from meteora_dist.errors import TrainingError
from meteora_dist.training.settings import DataSettings, GateSettings, LoopSettings, MoaSettings

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_has_every_option_and_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w.-]+) \| ", PAGE, re.MULTILINE))
    fields = GateSettings.model_fields | LoopSettings.model_fields
    assert len(fields) == len(GateSettings.model_fields) + len(LoopSettings.model_fields)
    assert table == {name: shown(field.default) for name, field in fields.items()}


def test_the_page_on_routers_has_their_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "auto-sequence.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w.-]+) \| ", page, re.MULTILINE))
    own = {name: field for name, field in MoaSettings.model_fields.items() if name not in DataSettings.model_fields}
    assert table == {name: shown(field.default) for name, field in own.items()}
    pairs = re.findall(r"--set (\S+)", page.split("```")[1])
    assert read_options(None, pairs, MoaSettings)[0].micro_batch == 8


def test_the_example_is_accepted() -> None:
    pairs = re.findall(r"--set (\S+)", PAGE.split("```")[1])
    loop, gates = read_options(None, pairs, GateSettings)
    assert (loop.steps, gates.objective) == (240, "local")


def test_a_file_of_options_and_pairs_that_go_before_it(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("steps: 7\nbeta: 2.5\nlora_learning_rate: null\n")
    loop, gates = read_options(path, ["steps=8", "lm=false", "learning_rate=1e-3"], GateSettings)
    assert (loop.steps, loop.learning_rate, gates.beta, gates.lm) == (8, 1e-3, 2.5, False)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stepz=5", "no option 'stepz'.*steps"),
        ("steps", "NAME=VALUE"),
        ("steps=-1", "steps: .*greater than 0"),
        ("zero_stage=4", "zero_stage: .*1, 2 or 3"),
        ("objective=local", "lm off"),
    ],
    ids=lambda value: value.split("=")[0],
)
def test_options_that_are_wrong(pair: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        read_options(None, [pair], GateSettings)


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("- steps\n")
    with pytest.raises(TrainingError, match=r"options\.yaml: must be a mapping"):
        read_options(path, [], GateSettings)
    with pytest.raises(TrainingError, match="nothing"):
        read_options(tmp_path / "nothing.yaml", [], GateSettings)
