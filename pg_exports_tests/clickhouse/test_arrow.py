"""An Arrow stream is complete, or it is an error: every place at which it may end, on streams of real bytes."""

import io
import json
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pytest

from pg_exports.clickhouse.arrow import BATCH_BYTES, END_OF_STREAM, TAIL_BYTES, TruncatedStreamError, batches, together
from pg_exports.models import AS_READ

EXCEPTION = (
    "\r\n__exception__\r\nabcdefghijklmnop\r\n"
    "Code: 241. DB::Exception: Memory limit exceeded: while executing. (MEMORY_LIMIT_EXCEEDED) (version 26.9)\n"
    "110 abcdefghijklmnop\r\n__exception__\r\n"
)


def stream(*words: str) -> bytes:
    """One record batch a word."""
    schema = pa.schema({"word": pa.string()})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for word in words:
            writer.write_batch(pa.record_batch([[word]], schema=schema))
    return sink.getvalue()


def message_boundaries(data: bytes) -> Iterator[int]:
    """The positions between two messages, from before the schema to before the end-of-stream marker."""
    position = 0
    yield position
    for message in pa.ipc.MessageReader.open_stream(data):
        position += len(message.serialize())
        yield position


def words(data: bytes) -> list[str]:
    return [word for batch in batches(io.BytesIO(data)) for word in batch["word"].to_pylist()]


def test_a_complete_stream_gives_every_batch() -> None:
    assert words(stream("one", "two", "three")) == ["one", "two", "three"]


def test_a_complete_stream_without_rows_is_no_error() -> None:
    assert words(stream()) == []


def test_a_stream_that_ends_between_two_messages_is_an_error() -> None:
    data = stream("one", "two", "three")
    boundaries = list(message_boundaries(data))
    assert len(boundaries) == 5
    for boundary in boundaries:
        with pytest.raises(TruncatedStreamError, match="before its end-of-stream marker"):
            words(data[:boundary])


def test_a_stream_that_ends_after_any_other_byte_is_an_error() -> None:
    data = stream("one", "two")
    for length in range(len(data)):
        with pytest.raises(TruncatedStreamError):
            words(data[:length])


@pytest.mark.parametrize("more", [b"\x00", b"\n", END_OF_STREAM, stream("four"), EXCEPTION.encode()])
def test_anything_after_the_marker_is_an_error(more: bytes) -> None:
    with pytest.raises(TruncatedStreamError):
        words(stream("one") + more)


@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_an_exception_that_takes_the_place_of_a_message_is_named(before: bytes) -> None:
    data = stream("one", "two")
    boundary = list(message_boundaries(data))[2]
    with pytest.raises(TruncatedStreamError, match="Memory limit exceeded") as caught:
        words(data[:boundary] + before + EXCEPTION.encode())
    assert caught.value.code == 241
    assert caught.value.text is not None
    assert "__exception__" not in caught.value.text


def test_an_exception_that_takes_the_place_of_a_whole_answer_is_named() -> None:
    with pytest.raises(TruncatedStreamError, match="Memory limit exceeded"):
        words(EXCEPTION.encode())


def test_an_exception_behind_more_than_the_bytes_that_are_kept_is_named() -> None:
    data = stream("one", "x" * 3 * TAIL_BYTES)
    with pytest.raises(TruncatedStreamError, match="Memory limit exceeded"):
        words(data.removesuffix(END_OF_STREAM) + EXCEPTION.encode())


def test_words_about_an_exception_in_the_data_are_data() -> None:
    assert words(stream(EXCEPTION)) == [EXCEPTION]
    with pytest.raises(TruncatedStreamError, match="before its end-of-stream marker"):
        words(stream(EXCEPTION).removesuffix(END_OF_STREAM))


def test_small_batches_are_given_together_and_great_ones_at_once() -> None:
    great = "x" * BATCH_BYTES
    given = [batch["word"].to_pylist() for batch in batches(io.BytesIO(stream("one", "two", great, great, "three")))]
    assert given == [["one", "two", great], [great], ["three"]]


def test_a_great_batch_is_not_copied() -> None:
    great = pa.record_batch({"word": ["x" * BATCH_BYTES]})
    assert [batch is great for batch in together(iter([great, great]))] == [True, True]


def test_rows_before_the_break_are_given_before_the_error() -> None:
    great = "x" * BATCH_BYTES
    data = stream("one", great, "two")
    given = batches(io.BytesIO(data.removesuffix(END_OF_STREAM)))
    assert [next(given)["word"].to_pylist(), next(given)["word"].to_pylist()] == [["one", great], ["two"]]
    with pytest.raises(TruncatedStreamError):
        next(given)


def test_wrong_bytes_become_replacement_characters_beside_what_they_were() -> None:
    text = ["good", None, "4444", "Zo\u00eb", "333é"]
    texts = pa.record_batch({"word": text, "words": [["a", "4444", None], None, [], ["b"], ["c"]], "n": range(5)})
    [batch] = batches(io.BytesIO(spoilt(texts, {b"4444": b"a\xffb\xe2", b"333": b"\xf0\x9f\x98"})))
    assert batch["word"].to_pylist() == ["good", None, "a\ufffdb\ufffd", "Zo\u00eb", "\ufffdé"]
    assert batch["words"].to_pylist() == [["a", "a\ufffdb\ufffd", None], None, [], ["b"], ["c"]]
    assert batch["n"].to_pylist() == list(range(5))
    was = [text and json.loads(text) for text in batch[AS_READ].to_pylist()]
    assert was[1] is was[3] is None
    assert was[0] == {"words": ["a", "a\udcffb\udce2", None]}
    assert was[2] == {"word": "a\udcffb\udce2"}
    assert was[4] == {"word": "\udcf0\udc9f\udc98é"}


def test_a_batch_of_good_text_has_no_column_more() -> None:
    good = pa.record_batch({"word": ["\ufffd", "\x00", "🦔"]})
    [batch] = batches(io.BytesIO(spoilt(good, {})))
    assert batch.equals(good)


def spoilt(batch: pa.RecordBatch, bytes_for: Mapping[bytes, bytes]) -> bytes:
    """A stream of one batch, some of whose texts are other bytes of the same length."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    for text, wrong in bytes_for.items():
        assert len(text) == len(wrong)
        data = data.replace(text, wrong)
    return data
