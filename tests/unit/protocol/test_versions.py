"""Which dnb it is, in sentences."""

import msgspec
import pytest

from dnb.protocol.client_messages import Control
from dnb.protocol.pool import Process
from dnb.protocol.versions import POOL_FORMAT, VERSION, RecordHeader, explain_unreadable, name_dnb, name_this_dnb


def test_a_version_is_named_with_its_format():
    assert name_dnb("0.2.0", 3) == "dnb 0.2.0 (format 3)"
    assert name_this_dnb() == f"dnb {VERSION} (format {POOL_FORMAT})"


@pytest.mark.parametrize("version", ["", "1.0\n<b>", "9" * 100], ids=["none", "other text", "long"])
def test_a_dnb_that_does_not_say_its_version_or_says_what_is_none_is_named_as_unknown(version):
    assert name_dnb(version, 1) == "dnb of an unknown version (format 1)"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (b'{"host": "a", "pid": 1, "create_time": 0.0, "zone": 1}', Process, "the field 'zone' is not known"),
        (b'{"host": "a", "pid": 1}', Process, "the field 'create_time' is missing"),
        (b'{"type": "GetWeather"}', Control, "'GetWeather' is not known"),
        (b'{"host": 1}', Process, "Expected `str`, got `int` - at `$.host`"),
    ],
)
def test_why_a_record_cannot_be_read_is_said_in_words(text, kind, said):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text, type=kind)
    assert explain_unreadable(caught.value) == said


def test_the_reason_is_short_and_one_line_whatever_the_decoder_says():
    assert explain_unreadable(ValueError("a\nb " + "c" * 5000)) == "a b " + "c" * 196


def test_the_header_of_a_record_is_read_whatever_else_is_in_it():
    text = b'{"format": 7, "version": "9.0", "hosts": ["a"], "supervisor": {"zone": 1}}'
    assert msgspec.json.decode(text, type=RecordHeader) == RecordHeader(format=7, version="9.0")
    assert msgspec.json.decode(b"{}", type=RecordHeader) == RecordHeader(format=1, version="")
