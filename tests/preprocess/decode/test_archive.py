"""Videos inside tar archives: the same features as unpacked, and nothing a hostile one can do.

pytest tests/preprocess/decode/test_archive.py
"""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from preprocess.decode.archive import Unpacker, archive_members
from preprocess.decode.scan import VideoError
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.sources.find import find_clips
from shards.errors import UserError
from shards.format.plan import ClipSource, cut_units
from shards.read.bank import Bank

MP4 = frozenset((".mp4",))


def pack(archive: Path, folder: Path) -> Path:
    """Make an archive with GNU tar, in an order of its own."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    Random(1).shuffle(names)
    option = "-cf" if archive.suffix == ".tar" else "-czf"
    subprocess.run(["tar", option, archive, "-C", folder, *names], check=True)
    return archive


def tar_of(archive: Path, *infos: tuple[str, bytes | None, dict[str, object]]) -> Path:
    with tarfile.open(archive, "w") as tar:
        for name, data, fields in infos:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return archive


def metas(bank: Path) -> dict[str, dict[str, object]]:
    found = {}
    for tar in sorted((bank / "shards").glob("*.tar")):
        with tarfile.open(tar) as shard:
            for info in shard:
                if info.name.endswith(".json"):
                    file = shard.extractfile(info)
                    assert file
                    meta = json.load(file)
                    found[meta["id"]] = meta
    return found


def samples(bank: Path) -> dict[str, bytes]:
    opened = Bank.open(bank)
    return {
        id_: b"".join(opened.read(row, stride).tobytes() for stride in opened.config.strides)
        for row, id_ in enumerate(opened.ids)
    }


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_an_archive_gives_what_its_unpacked_folder_gives(
    toy: Path, toy_bank: Path, toy_options: EncodeOptions, tmp_path: Path, suffix: str
) -> None:
    archive = pack(tmp_path / f"videos{suffix}", toy / "videos")
    options = replace(toy_options, shard_bytes=3 * 8 * 5 * 64 * 2)  # three clips a shard
    summary = encode([str(archive)], tmp_path / "bank", options)
    assert (summary.clips, summary.failures) == (9, [])
    assert samples(tmp_path / "bank") == samples(toy_bank)
    assert metas(tmp_path / "bank") == metas(toy_bank)
    names = {path.name.split("-")[0].split(".")[0] for path in (tmp_path / "bank").iterdir()}
    assert names == {"bank", "index", "plan", "shards"}, "an unpacked video was left"
    with tarfile.open(archive) as tar:
        order = [info.name for info in tar]
    assert Bank.open(tmp_path / "bank").ids == order
    assert encode([str(archive)], tmp_path / "bank", options).skipped == 9


def test_a_gz_is_read_once_from_its_start(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "videos.tar.gz", toy / "videos")
    clips = find_clips([str(archive)], [])
    rewinds = []
    rewind = gzip.GzipFile.rewind
    monkeypatch.setattr(
        gzip.GzipFile, "rewind", lambda self: (rewinds.append(self.tell()), rewind(self))
    )
    with Unpacker(tmp_path) as unpacker:
        for unit in cut_units(Random(0).sample(clips, len(clips)), 3, lambda clip: 1):
            for clip in unit:
                assert clip.offset is not None
                assert clip.nbytes is not None
                with unpacker.unpacked(archive, clip.offset, clip.nbytes) as path:
                    assert path.read_bytes() == (toy / "videos" / clip.relative).read_bytes()
    assert rewinds == []


def test_ordinary_clips_come_before_archived_ones_and_keep_their_order(tmp_path: Path) -> None:
    plain = [ClipSource(f"v{k}", f"v{k}", f"/v{k}", f"v{k}") for k in range(5)]
    archived = [
        ClipSource(f"m{k}", f"m{k}", "/a.tar", f"m{k}", offset=9000 - k, nbytes=1) for k in range(5)
    ]
    (unit,) = cut_units(Random(3).sample(plain + archived, 10), 100, lambda clip: 1)
    assert unit == plain + archived[::-1]


@pytest.mark.parametrize(
    ("infos", "said"),
    [
        ([("../../out.mp4", b"x", {})], "'../../out.mp4' leads outside"),
        ([("a/../../out.mp4", b"x", {})], "leads outside"),
        ([("/tmp/out.mp4", b"x", {})], "'/tmp/out.mp4' leads outside"),
        ([("a.mp4", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], "is a link"),
        ([("a.mp4", None, {"type": tarfile.LNKTYPE, "linkname": "b.mp4"})], "is a link"),
        ([("a.mp4", None, {"type": tarfile.FIFOTYPE})], "no plain file"),
        ([("a.mp4", b"x", {}), ("./a.mp4", b"y", {})], "'a.mp4' more than once"),
        ([("a.txt", b"x", {})], "no video files in this archive"),
    ],
)
def test_a_hostile_archive_is_refused_by_name_before_anything_is_read(
    tmp_path: Path, infos: list[tuple[str, bytes | None, dict[str, object]]], said: str
) -> None:
    archive = tar_of(tmp_path / "bad.tar", *infos)
    with pytest.raises(UserError, match=r"bad\.tar") as error:
        find_clips([str(archive), "/no/such.mp4"], [])
    problem, other = str(error.value).splitlines()
    assert said in problem
    assert other.startswith("/no/such.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 3]


def flip_header(raw: bytes) -> bytes:
    return raw[:1536] + b"garbage!" + raw[1544:]  # of the second member


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("a.tar", cut),
        ("a.tar", flip_header),
        ("a.tar.gz", cut),
        ("a.tar.gz", lambda raw: raw[:3000] + bytes(100) + raw[3100:]),
        ("a.tar.gz", lambda raw: raw[:-6] + b"crc." + raw[-2:]),
        ("a.tar", lambda raw: b"no archive"),
        ("a.tar", lambda raw: b""),
    ],
)
def test_a_cut_or_damaged_archive_is_refused_by_name(
    tmp_path: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    random = Random(0)
    (tmp_path / "v").mkdir()
    for k in range(3):
        (tmp_path / "v" / f"{k}.mp4").write_bytes(random.randbytes(1000))
    archive = pack(tmp_path / name, tmp_path / "v")
    assert len(archive_members(archive, MP4)) == 3
    archive.write_bytes(spoil(archive.read_bytes()))
    with pytest.raises(UserError, match=r"cut off or damaged after [0123] videos") as error:
        archive_members(archive, MP4)
    assert "fetch it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_changed_since_the_plan_is_noticed(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "v.tar", toy / "videos" / "test")
    first, *_ = archive_members(archive, MP4)
    tar_of(archive, ("x.mp4", b"x" * 100, {}), ("y.mp4", b"y" * 99999, {}))
    with (
        Unpacker(tmp_path) as unpacker,
        pytest.raises(VideoError, match=r"v\.tar") as error,
        unpacker.unpacked(archive, first.offset, first.nbytes),
    ):
        pass
    assert error.value.reason == "cannot-unpack"
    pack(archive, toy / "videos" / "test")
    encode([str(archive)], tmp_path / "bank", toy_options)
    (toy_copy := tmp_path / "copy").mkdir()
    shutil.copy(toy / "videos" / "train" / "clip-00000.mp4", toy_copy / "clip-00000.mp4")
    pack(archive, toy_copy)
    summary = encode([str(archive)], tmp_path / "bank", toy_options)
    assert (summary.clips, summary.failures) == (1, []), "one member is another, two are gone"
    assert set(Bank.open(tmp_path / "bank").ids) == {f"clip-0000{k}.mp4" for k in range(3)}


def test_a_bad_video_in_an_archive_is_quarantined_by_its_name_there(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    folder = shutil.copytree(toy / "videos" / "test", tmp_path / "v")
    (folder / "sub").mkdir()
    (folder / "sub" / "bad.mp4").write_bytes(b"no video")
    archive = pack(tmp_path / "v.tar.gz", folder)
    summary = encode([str(archive)], tmp_path / "bank", toy_options)
    (entry,) = summary.failures
    assert (entry.id, entry.path) == ("sub/bad.mp4", str(archive))
    assert entry.message.startswith(f"{archive}: sub/bad.mp4: ")
    assert "/proc/" not in entry.message
    assert summary.clips == 3
