"""Mp3 files with and without a count of their frames."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from data2vec.core.errors import SampleError
from data2vec.speech.audio import decode, native_decoder, read_header, soundfile_decoder
from data2vec.speech.containers import complete
from data2vec.speech.mpeg import with_count

NOISE = np.random.default_rng(0).normal(size=(24_000, 2)).clip(-4, 4) / 5
RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000]


def counted(rate: int = 16_000, channels: int = 1, mode: str = "CONSTANT", level: float = 0.5) -> bytes:
    file = io.BytesIO()
    x = NOISE[:, :channels] * np.linspace(0, 1, len(NOISE))[:, None] ** 4  # frames of different size
    soundfile.write(file, x, rate, format="MP3", bitrate_mode=mode, compression_level=level)
    return file.getvalue()


def bare(data: bytes) -> bytes:
    """Without the frame that counts the others, as streams and many programs write it."""
    return data[data.index(data[:2], 4) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_a_file_without_a_count_gets_one(rate: int, channels: int, mode: str) -> None:
    whole = counted(rate, channels, mode)
    assert complete(whole) is whole
    assert read_header(whole).frames == len(NOISE)
    data = complete(bare(whole))
    assert data.endswith(bare(whole))
    assert complete(data) is data
    header = read_header(bare(whole))
    assert 0 <= header.frames - len(NOISE) < 3_000  # what fills the first and the last frame
    for decoder in (native_decoder(), soundfile_decoder()):
        assert decoder(data).shape == (header.frames, channels)
    assert np.array_equal(native_decoder()(data), soundfile_decoder()(data))
    assert len(decode(bare(whole))) == header.length


def test_the_sound_is_the_same_and_behind_tags_too() -> None:
    whole = counted()
    expected, data = decode(whole), bare(whole)
    tag = b"ID3\x03\0\0\0\0\x07\x68" + bytes(1000)
    for tagged in (data, tag + data, tag + tag + data, data + b"TAG" + bytes(125)):
        sound = decode(tagged)
        shift = max(range(2_000), key=lambda start: float(np.dot(sound[start : start + 20_000], expected[:20_000])))
        assert np.abs(sound[shift : shift + len(expected)] - expected).max() < 1e-3
    assert complete(tag + data).startswith(tag)
    uncounted = bytearray(whole)
    at = min(place for name in (b"Xing", b"Info") if (place := whole.find(name)) >= 0)
    uncounted[at + 7] = 0
    assert read_header(bytes(uncounted)).length == len(decode(bytes(uncounted)))


def test_cut_files_and_several_in_a_row_are_named() -> None:
    whole = counted()
    for cut in (bare(whole)[:-1], bare(whole)[:-50], bare(whole)[: len(whole) // 2 + 5]):
        for read in (read_header, decode):
            with pytest.raises(SampleError, match=f"its {len(cut)} bytes end within a frame of mp3"):
                read(cut)
    with pytest.raises(SampleError, match="several mp3 files in a row"):
        read_header(whole + whole)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xfeh\0i\0", b"ID3", b"ID3\3\0\0\x7f\x7f\x7f\x7f", b"\xff\xfb\0\0"]
)
def test_what_is_no_mp3_is_left_alone(data: bytes) -> None:
    assert with_count(data) is data


def test_millions_of_frames_are_not_counted() -> None:
    frame = bytes([0xFF, 0xF3, 0x14, 0xC0]) + bytes(20)  # 8 kbit/s at 24 kHz
    assert len(with_count(frame * 100)) > 2_400
    with pytest.raises(SampleError, match="cut recordings into clips"):
        read_header(frame * 300_000)
