"""Stop texts end an answer at the same place however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meteora_dist.serving.stop import StopScanner


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    scanner = StopScanner(stops)
    out = [scanner.push(piece) for piece in pieces]
    return [*out, scanner.flush()], scanner.stopped


def test_without_stop_texts_everything_passes_at_once() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], False)


def test_the_stop_text_and_what_follows_never_come_out() -> None:
    assert run(["END"], ["one END two", "three"]) == (["one ", "", ""], True)


def test_a_stop_text_over_several_pieces_is_held_back() -> None:
    assert run(["\n\n"], ["a\n", "\nb"]) == (["a", "", ""], True)


def test_what_only_looked_like_a_stop_text_is_sent_after_all() -> None:
    assert run(["END"], ["xE", "Nx", "E"]) == (["x", "ENx", "", "E"], False)


def test_overlapping_beginnings_are_found() -> None:
    # a a a b: the stop text starts at the second a
    assert run(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", "", ""], True)


def test_the_stop_text_that_is_complete_first_wins() -> None:
    assert run(["abcd", "c"], ["abcd"]) == (["ab", ""], True)
    assert run(["abcd", "c"], ["a", "b", "c", "d"]) == (["", "", "ab", "", ""], True)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_the_cut_into_pieces_does_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sent, stopped = run(stops, pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    starts = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
    assert "".join(sent) == (text[: min(starts)] if starts else text)
    assert stopped == bool(starts)
