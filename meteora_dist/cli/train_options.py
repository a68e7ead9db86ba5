"""Options of training: a YAML file, and ``NAME=VALUE`` pairs that go before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from meteora_dist.config import faults
from meteora_dist.errors import TrainingError
from meteora_dist.training.settings import LoopSettings

Settings = TypeVar("Settings", bound=BaseModel)


def read_options(path: Path | None, pairs: Sequence[str], kind: type[Settings]) -> tuple[LoopSettings, Settings]:
    """The options of the loop and of an objective; an option's name is in one of them only.

    Args:
        path: YAML file with a mapping of options; None for none.
        pairs: ``NAME=VALUE``, each before what the file says.
        kind: Settings of the objective.

    Raises:
        TrainingError: An option is unknown or wrong, or the file cannot be read.
    """
    found = {**_file(path), **dict(_pair(pair) for pair in pairs)}
    known = {*LoopSettings.model_fields, *kind.model_fields}
    if unknown := [name for name in found if name not in known]:
        raise TrainingError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return _settings(LoopSettings, found), _settings(kind, found)


def _settings(kind: type[Settings], found: dict[str, Any]) -> Settings:
    try:
        return kind.model_validate({name: value for name, value in found.items() if name in kind.model_fields})
    except ValidationError as error:
        raise TrainingError(faults(error)) from None


def _file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise TrainingError(f"{path}: must be a mapping from options to values, such as steps: 500")
    return content


def _pair(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise TrainingError(f"--set {pair!r} must be NAME=VALUE, such as steps=500")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value
