"""Fast layers and paged attention against transformers' own model, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from meteora_dist.model.fast_layers import FastLayer, speed_up
from meteora_dist.model.packed import MOST_ROWS, PackedLinear, product_rows
from meteora_dist.model.paged_attention import plan_attention, serves

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
PAGE = 1000
KINDS = {
    "llama": LlamaConfig(**SIZES),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
}


class Rows:
    """A cache of one allocator: keys and values of every layer in rows, as transformers' pages hold them."""

    def __init__(self) -> None:
        self.layer_to_allocator = dict.fromkeys(range(3), self)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.full((9 * PAGE, *key.shape[1:]), float("nan"), dtype=key.dtype)
        rows = self._rows.setdefault(layer, (nothing, nothing.clone()))
        for held, new in zip(rows, (key, value), strict=True):
            held[write] = new
        return (rows[0][read], rows[1][read]) if read.numel() else (key, value)


def logits_of_pass(model: PreTrainedModel, cache: Rows, chunks: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Logits of all tokens of a pass; each chunk is (request, tokens of it seen before, its tokens in this pass)."""
    seen = [before + len(ids) for _, before, ids in chunks]
    fresh = all(before == 0 for _, before, _ in chunks)
    rows = [
        torch.arange(request * PAGE, request * PAGE + total)
        for (request, _, _), total in zip(chunks, seen, strict=True)
    ]
    with torch.no_grad():
        return model(
            input_ids=torch.cat([ids for _, _, ids in chunks])[None],
            position_ids=torch.cat([torch.arange(before, before + len(ids)) for _, before, ids in chunks])[None],
            cu_seq_lens_q=torch.tensor([0, *(len(ids) for _, _, ids in chunks)]).cumsum(0),
            cu_seq_lens_k={"full_attention": torch.tensor([0, *seen]).cumsum(0)},
            read_index=[torch.empty(0, dtype=torch.long) if fresh else torch.cat(rows)],
            write_index=[torch.cat([row[before:] for row, (_, before, _) in zip(rows, chunks, strict=True)])],
            cache=cache,
            use_cache=False,
        ).logits[0]


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            weight.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_mixed_passes_has_the_logits_of_its_request_alone(kind: str) -> None:
    ids = [torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 700, 12)]
    model = model_of(KINDS[kind])
    with torch.no_grad():
        alone = [model(request[None], use_cache=False).logits[0] for request in ids]
    speed_up(model)
    assert isinstance(model.get_decoder().layers[0], FastLayer)
    cache = Rows()
    # Prompts begin; then prompts go on, in pieces and by single tokens, while others decode and another one begins.
    passes = [
        [(0, 0, 3), (2, 0, 600), (1, 0, 1)],
        [(1, 1, 1), (2, 600, 99), (0, 3, 1), (3, 0, 1)],
        [(3, 1, 1), (0, 4, 1), (2, 699, 1), (1, 2, 1)],
        [(1, 3, 6), (3, 2, 9)],
    ]
    for chunks in passes:
        pieces = [(request, before, ids[request][before : before + length]) for request, before, length in chunks]
        expected = torch.cat([alone[request][before : before + length] for request, before, length in chunks])
        torch.testing.assert_close(logits_of_pass(model, cache, pieces), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_as_close_to_fp32_as_the_twin_does() -> None:
    ids = torch.arange(40) * 7 % 97
    exact = model_of(KINDS["llama"])(ids[None], use_cache=False).logits[0]
    twin = model_of(KINDS["llama"]).bfloat16()
    off = (twin(ids[None], use_cache=False).logits[0].float() - exact).norm()
    speed_up(twin)
    ours = logits_of_pass(twin, Rows(), [(0, 0, ids)])
    assert (ours.float() - exact).norm() < 1.2 * off


def test_requests_of_like_length_decode_together() -> None:
    seen = [30, 1900, 31, 2000, 29]
    parts, read = plan_attention([1] * 5, seen, torch.arange(sum(seen)))
    assert [part.requests for part in parts] == [2, 3]
    assert [torch.as_tensor(part.rows).tolist() for part in parts] == [[1, 3], [0, 2, 4]]
    # 2 x 2000 and 3 x 31 rows; what is beyond a request's end is masked.
    assert len(read) == 4093
    mask = parts[1].mask
    assert mask is not None
    assert (mask == 0).sum(-1).flatten().tolist() == [30, 31, 29]


def test_a_prompt_that_begins_reads_nothing_from_the_cache() -> None:
    parts, read = plan_attention([4, 1], [4, 1], torch.empty(0, dtype=torch.long))
    assert [(part.rows, part.reads, part.mask) for part in parts] == [
        (slice(0, 4), None, None),
        (slice(4, 5), None, None),
    ]
    assert read.numel() == 0


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 16, 17, 128, 129, 300])
def test_any_number_of_rows_is_multiplied(rows: int) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 40), torch.randn(rows, 24)
    torch.testing.assert_close(PackedLinear([linear])(x), linear(x))


def test_products_come_in_few_sizes() -> None:
    # 1 to 8, then 16, 32, ... 128
    assert len({product_rows(rows) for rows in range(1, MOST_ROWS + 1)}) == 16


def test_packed_linears_are_the_linears_side_by_side() -> None:
    torch.manual_seed(0)
    linears = [torch.nn.Linear(24, 10), torch.nn.Linear(24, 6, bias=False)]
    packed = PackedLinear(linears)
    for rows in (1, 7, 200):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(packed(x), torch.cat([linear(x) for linear in linears], dim=1))


def test_models_with_sliding_windows_keep_their_layers() -> None:
    assert not serves(MistralConfig(**SIZES, sliding_window=8))
    model = model_of(MistralConfig(**SIZES, sliding_window=8))
    before = dict(model.named_modules())
    speed_up(model)
    assert dict(model.named_modules()) == before
    assert model.config._attn_implementation == "sdpa"


def test_other_models_attend_the_same_way() -> None:
    from transformers import Qwen3Config

    model = model_of(Qwen3Config(**SIZES, head_dim=16))
    ids = torch.arange(20)
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    speed_up(model)
    cache = Rows()
    first = logits_of_pass(model, cache, [(0, 0, ids[:12]), (1, 0, ids[:5])])
    later = logits_of_pass(model, cache, [(0, 12, ids[12:]), (1, 5, ids[5:6])])
    torch.testing.assert_close(torch.cat((first[:12], later[:8])), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat((first[12:], later[8:])), expected[:6], rtol=1e-4, atol=1e-5)
