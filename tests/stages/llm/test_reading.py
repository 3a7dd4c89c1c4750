"""Streaming text: whole characters, stop strings."""

from hypothesis import given
from hypothesis import strategies as st

from stages.llm.reading import TextReader


def decode(tokens: list[int]) -> str:
    """Tokens that are single bytes, as a byte tokenizer has them."""
    return bytes(tokens).decode(errors="replace")


def read(tokens: list[int], stop: list[str], sizes: list[int]) -> tuple[TextReader, list[str]]:
    """Push `tokens` in pieces of `sizes`, until a stop string is met."""
    reader, pieces = TextReader(decode, stop), []
    while tokens and not reader.stopped:
        size = sizes.pop() if sizes else 1
        pieces.append(reader.push(tokens[:size]))
        tokens = tokens[size:]
    return reader, [*pieces, reader.finish()]


@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=10))
def test_text_is_streamed_in_whole_characters(text: str, sizes: list[int]) -> None:
    text = text.replace("\ufffd", "")
    reader, pieces = read(list(text.encode()), [], sizes)
    assert "".join(pieces) == reader.text == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.binary(max_size=40), st.lists(st.integers(1, 5), max_size=10))
def test_any_bytes_give_the_text_that_decoding_at_once_gives(data: bytes, sizes: list[int]) -> None:
    reader, pieces = read(list(data), [], sizes)
    assert "".join(pieces) == reader.text == decode(list(data))


@given(
    st.text("ab\u00e9", max_size=30),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=8),
)
def test_stop_strings_are_cut_off_and_never_shown(text: str, stop: list[str], sizes: list[int]) -> None:
    found = [text.find(one) for one in stop if one in text]
    expected = text[: min(found)] if found else text
    reader, pieces = read(list(text.encode()), stop, sizes)
    assert "".join(pieces) == reader.text
    assert reader.stopped == bool(found)
    if len(stop) == 1 or not found:
        assert reader.text == expected
    else:  # the stop string that is complete first ends the text, even inside a longer one that begins earlier
        assert text.startswith(reader.text)
    assert not any(one in reader.text for one in stop)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    reader = TextReader(decode, ["END"])
    assert [reader.push([byte]) for byte in b"aENbEN"] == ["a", "", "", "ENb", "", ""]
    assert reader.push(list(b"D more")) == ""
    assert reader.stopped
    assert reader.text == "aENb"


def test_nothing_follows_a_stop_string() -> None:
    reader = TextReader(decode, ["."])
    assert reader.push(list(b"one. two")) == "one"
    assert reader.push(list(b"three")) == reader.finish() == ""
    assert reader.text == "one"
