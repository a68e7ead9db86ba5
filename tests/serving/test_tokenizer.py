"""Text to tokens and back, one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from meteora_dist.errors import InvalidRequest, ModelError
from meteora_dist.serving.request import Turn
from meteora_dist.serving.tokenizer import TextTokenizer


def pieces(tokenizer: TextTokenizer, tokens: list[int], prompt: str = "Hi") -> list[str]:
    detokenizer = tokenizer.detokenizer(tokenizer.encode(prompt))
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def test_a_conversation_goes_through_the_models_own_template(tokenizer: TextTokenizer) -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"))
    assert tokenizer.encode(turns) == tokenizer.encode("<system>Be brief.\n<user>Hi\n<assistant>")


def test_a_character_of_four_tokens_comes_out_whole(tokenizer: TextTokenizer) -> None:
    tokens = list(tokenizer.encode("a🦙b"))
    assert len(tokens) == 6
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "🦙", "b", ""]


def test_an_unfinished_character_at_the_end_is_dropped(tokenizer: TextTokenizer) -> None:
    assert pieces(tokenizer, list(tokenizer.encode("a🦙"))[:-1]) == ["a", "", "", "", ""]


def test_text_after_a_broken_character_is_not_lost(tokenizer: TextTokenizer) -> None:
    broken = list(tokenizer.encode("🦙"))[:2]
    assert "".join(pieces(tokenizer, [*broken, *tokenizer.encode("ok")])).endswith("ok")


def test_special_tokens_have_no_text(tokenizer: TextTokenizer) -> None:
    assert pieces(tokenizer, [258, *tokenizer.encode("x"), 259]) == ["", "x", "", ""]


@pytest.mark.parametrize("prompt", ["caf", "caf\ufffd", "🦙🦙🦙"])
def test_nothing_of_the_prompt_is_repeated(tokenizer: TextTokenizer, prompt: str) -> None:
    assert pieces(tokenizer, list(tokenizer.encode("é!")), prompt) == ["", "é", "!", ""]


def test_a_model_without_a_chat_template_says_so(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        TextTokenizer.open(tmp_path).encode((Turn("user", "Hi"),))
    assert caught.value.param == "messages"


def test_a_template_that_stumbles_says_nothing_of_itself(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ 1 // (messages | length - 1) }}")
    with pytest.raises(InvalidRequest, match="template cannot be used for this conversation"):
        TextTokenizer.open(tmp_path).encode((Turn("user", "Hi"),))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        TextTokenizer.open(tmp_path)
