"""A checkpoint as MeteoRA's authors released it, taken apart into a bank.

One file, or shards with their index, holds base model, gates and all experts. For each targeted linear it has
``base_model.model.<linear>.{base_layer,moe_gate,lora_A,lora_B}.weight``: the gate [E, H], A [E*R, H] with rows e*R to
(e+1)*R of expert e, B [O, E*R] with its columns likewise; one rank and one alpha for all.

Shapes: E experts, R rank, H input features, O output features.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meteora_dist.adapters import read_adapter
from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, pair_names
from meteora_dist.adapters.header import Header, read_header
from meteora_dist.adapters.tensors import Block, is_floating, read_blocks
from meteora_dist.bank.bank import Bank
from meteora_dist.bank.fingerprint import fingerprint, weight_files
from meteora_dist.bank.gates import model_order
from meteora_dist.bank.manifest import RoutingDefaults
from meteora_dist.bank.write import Draft, check_new, place
from meteora_dist.errors import BankError, InvalidRequest

REFERENCE_EXPERTS = (
    *("abstract_narrative_understanding", "alpaca", "cnn_dailymail", "contextual_parametric_knowledge_conflicts"),
    *("cs_algorithms", "disfl_qa", "elementary_math_qa", "epistemic_reasoning"),
    *("formal_fallacies_syllogisms_negation", "goal_step_wikihow", "gsm8k", "language_identification"),
    *("linguistics_puzzles", "logical_deduction", "news_commentary_de", "news_commentary_es", "news_commentary_it"),
    *("object_counting", "paragraph_segmentation", "play_dialog_same_or_different", "question_selection"),
    *("reasoning_about_colored_objects", "strategyqa", "topical_chat", "tracking_shuffled_objects"),
    *("unit_conversion", "vitaminc_fact_verification", "winowhy"),
)
"""The 28 tasks of the released checkpoints, in the order of their gates' rows."""

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<linear>.+)\.(?P<part>moe_gate|lora_A|lora_B)\.weight")
_PARTS = ("moe_gate", "lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """What the headers say.

    Attributes:
        path: Its folder or file.
        headers: Of its files.
        files: Of every tensor.
        experts: E.
        rank: R.
        linears: Those with a gate, in model order.
    """

    path: Path
    headers: Mapping[Path, Header]
    files: Mapping[str, Path]
    experts: int
    rank: int
    linears: tuple[str, ...]

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        file = self.files[name]
        return read_blocks(file, self.headers[file], [Block(name, rows, columns)], BankError)[0]


def import_reference(
    checkpoint: Path,
    path: Path,
    base: Path,
    base_id: str,
    names: Sequence[str] = (),
    alpha: float = 16.0,
    routing: RoutingDefaults | None = None,
    imported: Callable[[int, int], None] = lambda done, of: None,
) -> Bank:
    """Writes the bank that is in a released checkpoint, and opens it; matrices and gates keep values and dtypes.

    Args:
        checkpoint: Folder with model.safetensors, or shards and their index; or the file itself.
        path: Where the bank goes; nothing may be there yet.
        base: Folder of the base model. The checkpoint's own copy of it has to be the same in a row of every tensor.
        base_id: Its name, for people.
        names: Of the experts in the order of the gates' rows; none for the 28 tasks.
        alpha: lora_alpha of all experts; the checkpoint does not say. Theirs is 16.
        routing: Defaults of requests; None for top-2 ``auto``.
        imported: Told how many of how many experts are written, after each.

    Raises:
        BankError: The checkpoint is damaged or of another layout, holds another base model, or ``path`` exists.
        InvalidRequest: There are more or fewer names than experts.
        ModelError: The base model's files are missing or damaged.
    """
    found = _open(checkpoint)
    names = _names(found, names)
    check_new(path, names)
    _check_base(found, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as workshop:
        for expert, name in enumerate(names):
            _write_adapter(found, expert, alpha, base_id, Path(workshop) / name)
            imported(expert + 1, len(names))
        draft = Draft(
            base_id=base_id,
            base_fingerprint=fingerprint(base),
            experts={name: read_adapter(Path(workshop) / name) for name in names},
            gates={linear: found.read(_key(linear, "moe_gate")) for linear in found.linears},
            routing=routing or RoutingDefaults(),
            generation=1,
            linked=frozenset(names),
        )
        return place(path, draft)


def _open(checkpoint: Path) -> _Checkpoint:
    shards = [checkpoint] if checkpoint.is_file() else weight_files(checkpoint)
    headers = {shard: read_header(shard, BankError) for shard in shards}
    files = {name: shard for shard, header in headers.items() for name in header.tensors}
    if foreign := [name for name in files if not name.startswith(_PREFIX)]:
        raise BankError(checkpoint, f"has the tensor {foreign[0]!r}; all names must begin with {_PREFIX}")
    matches = (_PART.fullmatch(name.removeprefix(_PREFIX)) for name in files)
    linears = model_order({match["linear"] for match in matches if match})
    if not linears:
        raise BankError(checkpoint, "has no moe_gate, lora_A and lora_B: it is no MeteoRA checkpoint")
    if lacking := [key for one in linears for part in _PARTS if (key := _key(one, part)) not in files]:
        raise BankError(checkpoint, f"lacks {lacking[0]}")
    shapes = {name: header.tensors[name].shape for header in headers.values() for name in header.tensors}
    for key in (_key(linear, part) for linear in linears for part in _PARTS):
        if len(shapes[key]) != 2 or 0 in shapes[key]:
            raise BankError(checkpoint, f"{key} is {list(shapes[key])}; it must be a matrix with no size zero")
    experts = shapes[_key(linears[0], "moe_gate")][0]
    rank, rest = divmod(shapes[_key(linears[0], "lora_A")][0], experts)
    if rest or not rank:
        raise BankError(checkpoint, f"lora_A of {linears[0]} has no equal part for each of {experts} experts")
    opened = _Checkpoint(checkpoint, headers, files, experts, rank, linears)
    for linear in linears:
        _check_shapes(opened, linear, *(shapes[_key(linear, part)] for part in _PARTS))
    return opened


def _check_shapes(
    found: _Checkpoint, linear: str, gate: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    rows = found.experts * found.rank
    for part, shape, wanted in (
        ("moe_gate", gate, (found.experts, gate[-1])),
        ("lora_A", a, (rows, gate[-1])),
        ("lora_B", b, (b[0], rows)),
    ):
        if shape != wanted:
            raise BankError(
                found.path,
                f"{part} of {linear} is {list(shape)}; with {found.experts} experts of rank {found.rank} it must be "
                f"{list(wanted)}",
            )


def _names(found: _Checkpoint, names: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(names) or REFERENCE_EXPERTS
    if len(chosen) != found.experts:
        what = f"{len(names)} names were given" if names else "the released ones have 28, whose names are known"
        raise InvalidRequest(f"{found.path} has {found.experts} experts; {what}; name them all, in the gates' order")
    if twice := sorted({name for name in chosen if chosen.count(name) > 1}):
        raise InvalidRequest(f"the experts need names of their own; {twice[0]!r} is given more than once")
    return chosen


def _check_base(found: _Checkpoint, base: Path) -> None:
    """Holds every tensor that is no gate and no expert against the base model's: name, shape, and the first row."""
    headers = {shard: read_header(shard, BankError) for shard in weight_files(base)}
    owners = {name: shard for shard, header in headers.items() for name in header.tensors}
    for key, file in found.files.items():
        name = key.removeprefix(_PREFIX)
        if _PART.fullmatch(name):
            continue
        name = name.replace(".base_layer.", ".")
        if name not in owners:
            raise BankError(found.path, f"has {key}, which has no place: it is no gate, no expert, and not in {base}")
        info, own = found.headers[file].tensors[key], headers[owners[name]].tensors[name]
        if info.shape != own.shape or not is_floating(info.dtype) or not is_floating(own.dtype):
            raise BankError(found.path, f"{key} is {info.dtype} {list(info.shape)}; {base} has {own.dtype} {own.shape}")
        first = slice(0, 1)
        row = read_blocks(owners[name], headers[owners[name]], [Block(name, first)], BankError)[0]
        if not torch.equal(found.read(key, first), row.to(found.read(key, first).dtype)):
            raise BankError(found.path, f"{key} has other numbers than in {base}: it was made on another base model")


def _write_adapter(found: _Checkpoint, expert: int, alpha: float, base_id: str, folder: Path) -> None:
    own = slice(expert * found.rank, (expert + 1) * found.rank)
    tensors = {}
    for linear in found.linears:
        name_a, name_b = pair_names(linear)
        tensors[name_a] = found.read(_key(linear, "lora_A"), rows=own)
        tensors[name_b] = found.read(_key(linear, "lora_B"), columns=own)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "inference_mode": True,
        "r": found.rank,
        "lora_alpha": alpha,
        "target_modules": sorted({linear.rpartition(".")[2] for linear in found.linears}),
    }
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def _key(linear: str, part: str) -> str:
    return f"{_PREFIX}{linear}.{part}.weight"
