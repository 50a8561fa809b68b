"""Files whose header and content disagree: cut ones are refused, unknown lengths found, in every container."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.errors import SampleError
from data2vec.speech.audio import CONTAINERS, decode, read_header
from data2vec.speech.containers import complete

NOISE = np.random.default_rng(0).normal(size=30_000).clip(-4, 4) / 5
MEMBERS = ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "OPUS", "MP3", "IMA_ADPCM"]
OTHERS = ["AIFF", "AU", "CAF", "W64", "NIST"]
W64_HEAD = b"riff\x2e\x91\xcf\x11" + bytes(32)
KINDS = {"OPUS": ("OGG", "OPUS"), "IMA_ADPCM": ("WAV", "IMA_ADPCM")}


def encoded(kind: str, length: int = 24_000, rate: int = 16_000, channels: int = 1) -> bytes:
    container, subtype = KINDS.get(kind, (kind, None))
    file = io.BytesIO()
    soundfile.write(file, np.stack([NOISE[:length]] * channels, 1), rate, format=container, subtype=subtype)
    return file.getvalue()


def sized(wav: bytes, data: int, riff: int | None = None) -> bytes:
    """A wav file whose header says another length."""
    changed = bytearray(wav)
    at = wav.index(b"data") + 4
    changed[at : at + 4] = struct.pack("<I", data)
    if riff is not None:
        changed[4:8] = struct.pack("<I", riff)
    return bytes(changed)


@given(
    st.sampled_from(MEMBERS + OTHERS),
    st.integers(400, 30_000),
    st.sampled_from([8_000, 16_000, 48_000]),
    st.integers(1, 2),
)
def test_the_headers_length_is_that_of_the_audio(kind: str, length: int, rate: int, channels: int) -> None:
    data = encoded(kind, length, rate, channels)
    assert complete(data) is data
    header = read_header(data, converted=True)
    assert header.length == len(decode(data, converted=True))
    if kind != "IMA_ADPCM":  # of whole blocks
        assert header.frames == length


@pytest.mark.parametrize("kind", MEMBERS + OTHERS)
@pytest.mark.parametrize("lost", [1, 100, 0.5])
def test_a_cut_file_is_never_taken_for_whole(kind: str, lost: float) -> None:
    data = encoded(kind)
    cut = data[: len(data) - int(lost if lost >= 1 else lost * len(data))]
    with pytest.raises(SampleError, match="cut short"):
        decode(cut, converted=True)
    if kind != "FLAC":  # whose header does not say how many bytes there are
        with pytest.raises(SampleError, match="cut short"):
            read_header(cut, converted=True)


@pytest.mark.parametrize("said", [0, 0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000])
@pytest.mark.parametrize("riff", [None, 0, 0xFFFF_FFFF])
def test_a_wav_of_unknown_length_is_read_to_its_end(said: int, riff: int | None) -> None:
    whole = encoded("WAV")
    open_ended = sized(whole, said, riff)
    assert read_header(open_ended).frames == 24_000
    assert np.array_equal(decode(open_ended), decode(whole))
    info = soundfile.info(io.BytesIO(complete(open_ended)))  # what any other program sees
    assert info.frames == 24_000
    shorter = open_ended[:-20_001]
    assert len(decode(shorter)) == read_header(shorter).length == 24_000 - 10_001


def test_an_empty_recording_stays_empty() -> None:
    empty = encoded("WAV", 0)
    for data in (empty, empty + b"LIST\x04\0\0\0INFO"):
        with pytest.raises(SampleError, match="holds no audio"):
            read_header(data)


def test_flac_from_a_pipe_has_its_samples_counted() -> None:
    whole = encoded("FLAC")
    stream = bytearray(whole)
    stream[21] &= 0xF0
    stream[22:26] = bytes(4)
    assert complete(bytes(stream)) == whole
    assert np.array_equal(decode(bytes(stream)), decode(whole))
    for lost in (1, 5_000, len(whole) // 2):
        with pytest.raises(SampleError, match="bytes of flac are damaged or cut short"):
            read_header(bytes(stream[:-lost]))


@pytest.mark.parametrize("head", [b"RIFF\0\0\0\0WAVE", b"FORM\0\0\0\0AIFF", b"caff\0\1\0\0", W64_HEAD])
def test_millions_of_empty_chunks_are_not_walked(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    unpack = struct.unpack_from
    monkeypatch.setattr(struct, "unpack_from", lambda *given: looked.append(1) or unpack(*given))
    empty = b"x" * 16 + struct.pack("<Q", 24) if head == W64_HEAD else bytes(8)
    data = head + empty * 20_000
    assert complete(data) is data
    assert 0 < len(looked) < 10_000
    with pytest.raises(SampleError, match="no usable audio"):
        read_header(data)


def test_ogg_files_in_a_row_are_named() -> None:
    with pytest.raises(SampleError, match="several ogg files in a row"):
        read_header(encoded("OGG") + encoded("OGG"))


@pytest.mark.parametrize("kind", OTHERS)
def test_no_other_decoder_runs_on_members(kind: str) -> None:
    assert kind not in CONTAINERS
    with pytest.raises(SampleError, match=f"bytes are {kind}; give flac, wav, ogg, opus or mp3$"):
        decode(encoded(kind))


@pytest.mark.parametrize("kind", ["VOC", "IRCAM", "AVR"])
def test_containers_whose_length_nothing_checks_are_not_read(kind: str) -> None:
    for read in (read_header, decode):
        with pytest.raises(SampleError, match=rf"bytes are {kind}; give flac, .* or mp3 \(aiff, au, caf, w64, nist\)"):
            read(encoded(kind), converted=True)


@given(st.sampled_from(MEMBERS + OTHERS), st.integers(0, 2_000), st.binary(max_size=8), st.integers(0, 24_000))
def test_damage_is_one_error(kind: str, at: int, patch: bytes, lost: int) -> None:
    data = bytearray(encoded(kind, 2_000))
    data[at : at + len(patch)] = patch
    file = bytes(data[: len(data) - lost])
    message = ""
    try:
        length = read_header(file, converted=True).length
        assert len(decode(file, converted=True)) == length
    except SampleError as error:
        message = str(error)
    assert " object at " not in message
