"""A source that gives no clip is told by what it is, not by what a reader stumbled over.

pytest tests/preprocess/decode/test_verdict.py
"""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from PIL import Image

from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.request import ReadRequest
from preprocess.decode.source import Outcome, SourceReader
from preprocess.toyworld import write_video
from shards.format.features import Sampling
from shards.format.plan import ClipSource

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def element(id_: int, body: bytes) -> bytes:
    """Return an element of EBML."""
    size = len(body) | 1 << 28
    return id_.to_bytes((id_.bit_length() + 7) // 8) + size.to_bytes(4) + body


def nested(body: bytes, *ids: int) -> bytes:
    for id_ in reversed(ids):
        body = element(id_, body)
    return body


EBML = element(0x1A45DFA3, element(0x4282, b"webm"))
TRACKS = (0x18538067, 0x1654AE6B, 0xAE, 0x6D80, 0x6240)
TOLD: dict[str, tuple[bytes, str]] = {
    "a.mp4": (b"", "empty; get it again"),
    "b.mp4": (bytes(9000), "nothing but zeros, no video or picture; its download was not finished"),
    "c.mp4": (LFS, "a Git LFS pointer for a file of 123 bytes, not the file; run `git lfs pull`"),
    "d.mp4": (b"<!DOCTYPE html><title>404</title>", "a web page ('404'), no video or picture; the"),
    "e.mkv": (b"<?xml version='1.0'?><Error/>", "XML, no video or picture"),
    "f.avi": (b'{"error": "gone"}', "text, no video or picture"),
    "g.mp4": (b"PK\x03\x04" + bytes(90), "a ZIP archive, no video or picture; unpack it"),
    "h.jpg": (LFS, "a Git LFS pointer"),
    "i.heic": (
        b"\0\0\0\x18ftypheic" + bytes(99),
        "a HEIC picture, for which Pillow needs a plugin",
    ),
    "j.mp4": (Random(0).randbytes(9000), "not a readable video (Invalid data found"),
    "k.webm": (EBML + nested(element(0x5035, b""), *TRACKS), "encrypted; decrypt it"),
    "l.webm": (EBML + nested(element(0x5034, b""), *TRACKS), "not a readable video"),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceReader]:
    with SourceReader(DecodeChild(), tmp_path_factory.mktemp("copies")) as opened:
        yield opened


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)


def read(reader: SourceReader, path: Path, **fields: bool) -> Outcome:
    source = ClipSource(path.name, path.name, str(path), path.name)
    return reader.read(source, ReadRequest(path, Sampling(num_frames=4), **fields))


@pytest.mark.parametrize("name", TOLD)
def test_a_file_that_is_none_is_told_by_what_it_is(
    reader: SourceReader, tmp_path: Path, name: str
) -> None:
    data, said = TOLD[name]
    (tmp_path / name).write_bytes(data)
    error = read(reader, tmp_path / name).error
    assert error
    assert str(error).startswith(f"{tmp_path / name}: {said}")
    assert "None" not in str(error)


def test_a_pipe_and_a_device_are_told_and_not_waited_for(
    reader: SourceReader, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    for path in (tmp_path / "a.mp4", Path("/dev/null")):
        outcome = read(reader, path)
        assert str(outcome.error).startswith(f"{path}: a pipe, socket or device, not a file")
        assert outcome.seconds < 20


def test_a_picture_of_a_folder_is_told_by_its_own_name(
    reader: SourceReader, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(LFS)
    error = read(reader, tmp_path).error
    assert str(error).startswith(f"{tmp_path / '2.png'}: a Git LFS pointer")


def test_a_file_cut_before_its_index_says_how_much_is_there(
    reader: SourceReader, tmp_path: Path, frames: np.ndarray
) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, frames, 8)
    whole = path.read_bytes()
    assert whole.index(b"moov") > len(whole) // 2
    path.write_bytes(whole[: len(whole) // 2])
    error = str(read(reader, path).error)
    assert f"cut short: it has {len(whole) // 2:,} bytes of at least " in error
    path.write_bytes(whole[: whole.index(b"moov") - 4])
    assert "bytes, and no index (moov)" in str(read(reader, path).error)


def remuxed(source: Path, to: Path, **options: str) -> Path:
    with av.open(str(source)) as old, av.open(str(to), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return to


def test_an_encrypted_mp4_is_never_decoded(
    reader: SourceReader, tmp_path: Path, frames: np.ndarray
) -> None:
    write_video(tmp_path / "a.mp4", frames, 8)
    keys = {"encryption_key": "76a6c65c5ea762046bd749a2e632ccbb", "encryption_kid": "a7" * 16}
    path = remuxed(tmp_path / "a.mp4", tmp_path / "b.mp4", encryption_scheme="cenc-aes-ctr", **keys)
    assert read(reader, tmp_path / "a.mp4").clip
    for allow in (False, True):
        outcome = read(reader, path, allow_truncated=allow)
        assert outcome.error
        assert outcome.error.reason == "encrypted"


def test_a_scrambled_transport_stream_is_told(
    reader: SourceReader, tmp_path: Path, frames: np.ndarray
) -> None:
    write_video(tmp_path / "a.mp4", frames, 8)
    path = remuxed(tmp_path / "a.mp4", tmp_path / "a.ts")
    assert read(reader, path).clip
    data, random = bytearray(path.read_bytes()), Random(0)
    for at in range(0, len(data), 188):
        if data[at + 1] & 0x1F:  # of the video, not of the tables
            data[at + 3] |= 0x80
            data[at + 4 : at + 188] = random.randbytes(184)
    path.write_bytes(data)
    error = read(reader, path).error
    assert error
    assert error.reason == "encrypted"


def test_heic_is_read_where_its_plugin_is_installed(reader: SourceReader, tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    for k in range(2):
        Image.new("RGB", (64, 48), (200, 40 * k, 0)).save(tmp_path / f"{k}.heic")
    clip = read(reader, tmp_path).clip
    assert clip
    assert clip.frames.shape == (2, 48, 64, 3)
    assert abs(clip.frames[..., 0].astype(int) - 200).max() <= 8
