"""A checkpoint in the layout of MeteoRA's release becomes a bank with the same numbers, or is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteora_dist.bank import RoutingDefaults
from meteora_dist.bank.reference import REFERENCE_EXPERTS, import_reference
from meteora_dist.errors import BankError, InvalidRequest
from tests.bank.conftest import Parts

NAMES = ("first", "second", "third")
RANK = 2
Q0 = "model.layers.0.self_attn.q_proj"
LINEAR = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight")


def released(base: Path, experts: int = len(NAMES), dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What the authors' class saves of ``base``, with random gates and experts."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for name, weight_OH in load_file(base / "model.safetensors").items():
        if (linear := LINEAR.fullmatch(name)) is None:
            tensors[f"base_model.model.{name}"] = weight_OH.to(dtype)
            continue
        out_features, in_features = weight_OH.shape
        shapes = {
            "moe_gate": (experts, in_features),
            "lora_A": (experts * RANK, in_features),
            "lora_B": (out_features, experts * RANK),
        }
        tensors[f"base_model.model.{linear[1]}.base_layer.weight"] = weight_OH.to(dtype)
        for part, shape in shapes.items():
            tensors[f"base_model.model.{linear[1]}.{part}.weight"] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_number_is_where_it_belongs(parts: Parts, tmp_path: Path) -> None:
    tensors = released(parts.base)
    checkpoint = write(tmp_path / "released", tensors)
    done: list[tuple[int, int]] = []
    bank = import_reference(
        checkpoint,
        tmp_path / "bank",
        parts.base,
        "tiny",
        NAMES,
        alpha=4.0,
        routing=RoutingDefaults(top_k=1),
        imported=lambda *progress: done.append(progress),
    )
    assert (bank.names, bank.manifest.routing.top_k, done) == (NAMES, 1, [(1, 3), (2, 3), (3, 3)])
    assert len(bank.linears) == 14
    bank.check_base(parts.base)
    for linear in bank.linears:
        gate_EH, a_RH, b_OR = (
            tensors[f"base_model.model.{linear}.{part}.weight"] for part in ("moe_gate", "lora_A", "lora_B")
        )
        assert torch.equal(bank.gate(linear), gate_EH.float())
        for expert in range(3):
            pair = bank.pair(linear, expert, dtype=None)
            assert pair is not None
            assert pair.scale == 2.0
            assert torch.equal(pair.a_RH, a_RH[RANK * expert : RANK * (expert + 1)])
            assert torch.equal(pair.b_OR, b_OR[:, RANK * expert : RANK * (expert + 1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "released"]


def test_the_released_ones_need_no_names(parts: Parts, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "released", released(parts.base, experts=28))
    bank = import_reference(checkpoint / "model.safetensors", tmp_path / "bank", parts.base, "tiny")
    assert bank.names == REFERENCE_EXPERTS
    assert len(set(REFERENCE_EXPERTS)) == 28


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q0}.moe_gate.weight": None}, f"lacks base_model.model.{Q0}.moe_gate.weight"),
        ({f"{Q0}.lora_B.weight": torch.zeros(16, 5)}, f"lora_B of {Q0} is [16, 5]"),
        ({f"{Q0}.lora_A.weight": torch.zeros(7)}, "must be a matrix"),
        ({f"{Q0}.base_layer.weight": torch.zeros(16, 16)}, "has other numbers than in"),
        ({f"{Q0}.base_layer.weight": torch.zeros(8, 16)}, "base_layer.weight is F32 [8, 16]"),
        ({f"{Q0}.bias": torch.zeros(16)}, f"has base_model.model.{Q0}.bias, which has no place"),
    ],
    ids=["no-gate", "short-b", "vector", "other-base", "other-shape", "stranger"],
)
def test_what_does_not_fit_is_named(
    parts: Parts, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors: dict[str, Tensor | None] = dict(released(parts.base, dtype=torch.float32))
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in change.items()}
    checkpoint = write(tmp_path / "x", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(BankError, match=re.escape(message)):
        import_reference(checkpoint, tmp_path / "bank", parts.base, "tiny", NAMES)
    assert not (tmp_path / "bank").exists()


def test_names_must_be_as_many_as_experts(parts: Parts, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "x", released(parts.base))
    with pytest.raises(InvalidRequest, match="has 3 experts; the released ones have 28"):
        import_reference(checkpoint, tmp_path / "bank", parts.base, "tiny")
    with pytest.raises(InvalidRequest, match="'a' is given more than once"):
        import_reference(checkpoint, tmp_path / "bank", parts.base, "tiny", ("a", "a", "b"))


def test_another_checkpoint_is_told_apart(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="all names must begin with"):
        import_reference(parts.base, tmp_path / "bank", parts.base, "tiny")
    plain = {"base_model.model.lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(BankError, match="it is no MeteoRA checkpoint"):
        import_reference(write(tmp_path / "x", plain), tmp_path / "bank", parts.base, "tiny")
