"""The projection equals its twin over odd sizes, in planes or whole, and does not depend on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meteora_kernels.launch import Launch
from meteora_kernels.projection.kernel import gate_logits, launch_project
from meteora_kernels.projection.reference import project_reference, split_length

FEW = Launch(1, 16, 4, 4, inputs=16, project_columns=16, outputs=32, pairs=16, warps=4, stages=1)
MANY = replace(FEW, rows=16, project_rows=32, planes=1)


@pytest.mark.parametrize(("tokens", "width", "gates", "columns"), [(1, 37, 3, 5), (17, 64, 0, 33), (63, 100, 28, 0)])
def test_kernel_equals_the_twin(tokens: int, width: int, gates: int, columns: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, width, generator=g)
    gate_PH = torch.randn(gates, width, generator=g) if gates else None
    a_CH = torch.randn(columns, width, generator=g) if columns else None
    planes = launch_project(x_TH, gate_PH, a_CH, FEW)
    length = split_length(width, FEW.splits, FEW.inputs)
    torch.testing.assert_close(planes, project_reference(x_TH, gate_PH, a_CH, FEW.splits, length), rtol=1e-4, atol=1e-4)
    whole = launch_project(x_TH, gate_PH, a_CH, MANY)
    # Bit for bit: who adds up the parts makes no difference.
    assert torch.equal(whole[0], ((planes[0] + planes[1]) + planes[2]) + planes[3])


def test_half_precision_inputs_meet_fp32_gates() -> None:
    g = torch.Generator().manual_seed(0)
    x_TH, gate_PH = torch.randn(5, 40, generator=g).half(), torch.randn(7, 40, generator=g)
    a_CH = torch.randn(6, 40, generator=g).half()
    whole = launch_project(x_TH, gate_PH, a_CH, MANY)[0]
    torch.testing.assert_close(whole[:, :7], x_TH.float() @ gate_PH.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[:, 7:], x_TH.float() @ a_CH.float().T, rtol=1e-3, atol=1e-3)


def test_a_row_does_not_depend_on_its_batch() -> None:
    g = torch.Generator().manual_seed(1)
    x_TH, gate_PH = torch.randn(40, 50, generator=g), torch.randn(9, 50, generator=g)
    together = launch_project(x_TH, gate_PH, None, MANY)
    alone = launch_project(x_TH[33:34], gate_PH, None, MANY)
    assert torch.equal(together[:, 33:34], alone)


def test_no_tokens_give_no_rows() -> None:
    assert launch_project(torch.empty(0, 8), torch.ones(3, 8), None, FEW).shape == (4, 0, 3)


def test_gradients_reach_input_and_gates() -> None:
    g = torch.Generator().manual_seed(2)
    x_TH, gate_PH = torch.randn(5, 20, generator=g), torch.randn(3, 20, generator=g)
    grads = []
    for logits in (lambda x, gate: gate_logits(x, gate, MANY), lambda x, gate: x @ gate.T):
        ours = x_TH.clone().requires_grad_(), gate_PH.clone().requires_grad_()
        logits(*ours).square().sum().backward()
        grads.append([leaf.grad for leaf in ours])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
