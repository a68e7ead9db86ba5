"""A GGUF file as an ordinary checkpoint folder: safetensors weights, config, tokenizer, chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from meteora_dist.errors import ModelError

QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model in a GGUF file, dequantised to bfloat16, as a checkpoint that ``from_pretrained`` reads offline.

    A process of its own does it: its gigabytes and its libraries' chatter end with it.

    Args:
        gguf: The file.
        folder: Where the checkpoint goes; made if missing.

    Raises:
        ModelError: The conversion failed; the message ends with the last line the process wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(gguf), str(folder)],
        env={**os.environ, **QUIET},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stdout.strip().splitlines() or ["it wrote nothing"]
        raise ModelError(gguf, f"could not be converted (exit code {done.returncode}): {lines[-1]}")


def _convert_here(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # the tokenizer's end-of-turn token is what ends an answer, whatever the file's own metadata say
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(ends)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_traces(folder / "tokenizer_config.json")


def _drop_traces(path: Path) -> None:
    """Removes what says how the file was read rather than what the tokenizer is."""
    config = json.loads(path.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
