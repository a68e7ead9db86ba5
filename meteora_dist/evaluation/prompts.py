"""Questions as token ids: in the model's chat template, or in the plain one of MeteoRA's data where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from meteora_dist.errors import ModelError
from meteora_dist.evaluation.tasks import TaskRow


def open_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; ModelError when it cannot be read."""
    if not model.is_dir():
        raise ModelError(model, "there is no such folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(model, f"its tokenizer cannot be read: {error}") from error
    return tokenizer


def prompt_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> str:
    """A conversation up to where its next answer starts; see ``prompt_tokens``.

    Args:
        tokenizer: Of the model.
        turns: User and assistant in turn; the first and the last are the user's. Without a chat template a pair reads
            ``[INST] question [/INST]``, a line break, and the answer, as in the data of arXiv 2405.13053.
    """
    if tokenizer.chat_template is None:
        return "".join(f"{turn}\n" if index % 2 else f"[INST] {turn} [/INST]\n" for index, turn in enumerate(turns))
    messages = [{"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, offsets: bool = False) -> BatchEncoding:
    """The tokens of a ``prompt_text``; a chat template has written its special ones already."""
    special = tokenizer.chat_template is None
    tokens: BatchEncoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets)
    return tokens


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> tuple[int, ...]:
    """Token ids of a conversation up to where its next answer starts; arguments as in ``prompt_text``."""
    return tuple(prompt_tokens(tokenizer, prompt_text(tokenizer, turns)).input_ids)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[int, ...]:
    """Token ids of an answer and its end of turn."""
    eos: int = tokenizer.eos_token_id
    return (*tokenizer(answer, add_special_tokens=False).input_ids, eos)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: bool = False) -> str:
    """The text of tokens; with ``special`` also of those that mark turns and ends."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def encode(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a row's prompt, and of its gold answer with its end of turn."""
    return prompt_ids(tokenizer, [row.prompt]), answer_ids(tokenizer, row.target)
