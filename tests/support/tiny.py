"""A tiny random Llama, random adapters written by PEFT itself, and a bank of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from meteora_dist.bank import Bank, Routers, write_bank

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS, HIDDEN, MLP, VOCABULARY = 2, 32, 48, 260
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Spec:
    """What a random adapter looks like."""

    rank: int
    alpha: int
    rslora: bool = False
    targets: tuple[str, ...] = ALL_LINEARS


SPECS = {
    "plain": Spec(4, 8),
    "wide": Spec(8, 4),
    "rooted": Spec(4, 3, rslora=True),
    "partial": Spec(2, 16, targets=("q_proj", "v_proj", "down_proj")),
}
"""Mixed ranks, alphas, rsLoRA and a missing-modules adapter."""


def write_tiny_llama(folder: Path) -> Path:
    """A random Llama checkpoint with a byte-level tokenizer and a chat template; token 258 begins, 259 ends."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=258,
        eos_token_id=259,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<pad>", "<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def load_tiny_llama(folder: Path) -> PreTrainedModel:
    """The checkpoint in fp32, frozen."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def write_adapter(base: Path, folder: Path, spec: Spec, seed: int) -> Path:
    """A random adapter as PEFT saves it; its deltas are as large as the weights, so no mistake hides."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=list(spec.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_tiny_llama(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def linears(targets: tuple[str, ...] = ALL_LINEARS) -> list[str]:
    """Module paths of the model's linears of these names, in model order."""
    blocks = dict.fromkeys(ALL_LINEARS[:4], "self_attn") | dict.fromkeys(ALL_LINEARS[4:], "mlp")
    return [f"model.layers.{i}.{blocks[leaf]}.{leaf}" for i in range(LAYERS) for leaf in ALL_LINEARS if leaf in targets]


def random_gates(experts: int, seed: int = 11) -> dict[str, torch.Tensor]:
    """Gates of all linears whose choices differ from linear to linear."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: MLP if name.endswith("down_proj") else HIDDEN for name in linears()}
    return {name: torch.randn(experts, width, generator=generator) for name, width in widths.items()}


def random_routers(experts: int, seed: int = 12) -> dict[str, torch.Tensor]:
    """Routers of all layers whose choices differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{layer}": torch.randn(experts, HIDDEN, generator=generator) for layer in range(LAYERS)}


def write_tiny_bank(
    base: Path, folder: Path, specs: Mapping[str, Spec] = SPECS, routers: Routers | None = None
) -> Bank:
    """A bank of random adapters and gates in ``folder/bank``."""
    adapters = {
        name: write_adapter(base, folder / "adapters" / name, spec, seed)
        for seed, (name, spec) in enumerate(specs.items())
    }
    return write_bank(folder / "bank", base, "tiny-llama", adapters, random_gates(len(specs)), routers=routers)
