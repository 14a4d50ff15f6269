"""Videos inside tar archives: the same features as unpacked, and nothing a hostile one can do.

pytest tests/preprocess/decode/test_archive.py
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from preprocess.decode.archive import Archive, Unpacker
from preprocess.decode.scan import VideoError
from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.sources.find import FindOptions, find_clips
from preprocess.sources.members import archive_members
from preprocess.sources.skips import Why, report
from shards.errors import UserError
from shards.format.plan import ClipSource, cut_units
from shards.read.bank import Bank


def pack(archive: Path, folder: Path) -> Path:
    """Make an archive with GNU tar, in an order of its own."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    Random(1).shuffle(names)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for number, name in enumerate(names):
                packed.write(
                    folder / name, name, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
                )
        return archive
    options = {".tar": "", ".gz": "z", ".tgz": "z", ".xz": "J", ".tbz2": "j"}
    option = f"-c{options[archive.suffix]}f"
    if archive.name.endswith(".appended.tar"):
        parts = []
        for some in (names[:2], names[2:]):
            subprocess.run(["tar", option, archive, "-C", folder, *some], check=True)
            parts.append(archive.read_bytes())
        archive.write_bytes(b"".join(parts))
        return archive
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


@pytest.mark.parametrize(
    "suffix",
    [
        *(".tar", ".tgz", ".zip", ".appended.tar"),
        *(pytest.param(s, marks=pytest.mark.slow) for s in (".tar.gz", ".tar.xz", ".tbz2")),
    ],
)
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
    order = [member.name for member in archive_members(archive)[0]]
    if suffix == ".appended.tar":
        assert len(order) == 9
        listed = subprocess.run(
            ["tar", "-tif", archive], capture_output=True, text=True, check=True
        )
        assert listed.stdout.split() == order
    elif suffix != ".zip":
        with tarfile.open(archive) as tar:
            assert [info.name for info in tar] == order
    assert Bank.open(tmp_path / "bank").ids == order
    assert encode([str(archive)], tmp_path / "bank", options).skipped == 9


def test_a_gz_is_read_once_from_its_start(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "videos.tar.gz", toy / "videos")
    clips = find_clips([str(archive)]).clips
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


ODD: dict[str, tuple[list[tuple[str, bytes | None, dict[str, object]]], Why]] = {
    "above": ([("../../out.mp4", b"x", {})], Why.OUTSIDE),
    "above, on a way": ([("a/../../out.mp4", b"x", {})], Why.OUTSIDE),
    "absolute": ([("/tmp/out.mp4", b"x", {})], Why.OUTSIDE),
    "link": (
        [("a.mp4", None, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})],
        Why.MEMBER_LINK,
    ),
    "hard link": (
        [("a.mp4", None, {"type": tarfile.LNKTYPE, "linkname": "b.mp4"})],
        Why.MEMBER_LINK,
    ),
    "pipe": ([("a.mp4", None, {"type": tarfile.FIFOTYPE})], Why.SPECIAL),
    "device": ([("a.mp4", None, {"type": tarfile.CHRTYPE})], Why.SPECIAL),
    "twice": ([("good.mp4", b"x", {})], Why.REPLACED),
    "text": ([("a.txt", b"x", {})], Why.UNKNOWN),
    "records": ([("a.json", b"{}", {})], Why.UNKNOWN),
    "picture": ([("a.jpg", b"x", {})], Why.ARCHIVED_PICTURE),
    "junk": ([("__MACOSX/._a.mp4", b"x", {})], Why.SYSTEM),
    "not UTF-8": ([("caf\udce9.mp4", b"x", {})], Why.NAME),
    "no ending, no video": ([("LICENSE", b"x", {})], Why.UNKNOWN),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_clip_is_skipped_by_name_and_nothing_of_it_is_read(
    tmp_path: Path, odd: str
) -> None:
    infos, why = ODD[odd]
    folder = tmp_path / "in"
    folder.mkdir()
    archive = tar_of(folder / "bad.tar", *infos, ("./good.mp4", b"the last", {}))
    found = find_clips([str(archive)])
    assert [(clip.id, clip.nbytes) for clip in found.clips] == [("good.mp4", 8)]
    (skip,) = found.skips
    assert skip.reason is why
    assert skip.where.startswith(f"{archive}: ")
    (line,) = report(found.skips)
    assert line.encode().isascii()
    if odd != "twice":
        alone = tar_of(folder / "bad.tar", *infos)
        with pytest.raises(UserError, match=r"no video files in this archive; skipped: 1 "):
            find_clips([str(alone)])
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "bad.tar"]


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
        ("a.tar", lambda raw: raw + b"x" * 512),
        ("a.tar.xz", cut),
        ("a.tbz2", cut),
        ("a.zip", cut),
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
    assert len(archive_members(archive)[0]) == 3
    archive.write_bytes(spoil(archive.read_bytes()))
    with pytest.raises(UserError, match=r"cut off or damaged after [0123] videos") as error:
        archive_members(archive)[0]
    assert "fetch it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_changed_since_the_plan_is_noticed(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "v.tar", toy / "videos" / "test")
    first, *_ = archive_members(archive)[0]
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


def test_shards_that_count_anew_are_refused_in_one_line_or_told_apart_by_name(
    toy: Path, toy_options: EncodeOptions, tmp_path: Path
) -> None:
    videos = sorted((toy / "videos").rglob("*.mp4"))[:4]
    shards = []
    for shard in range(2):
        members: list[tuple[str, bytes | None, dict[str, object]]] = []
        for k in range(2):
            members.append((f"{k}.mp4", videos[2 * shard + k].read_bytes(), {}))
            members.append((f"{k}.json", b"{}", {}))
        shards.append(str(tar_of(tmp_path / f"00{shard}.tar", *members)))
    with pytest.raises(UserError) as error:
        find_clips(shards)
    assert str(error.value) == (
        f"{shards[1]}: has the id '0.mp4', as {shards[0]} has, and 1 more; --archive-ids makes them "
        "001.tar/0.mp4 and so on, else encode them into two banks"
    )
    options = replace(toy_options, find=FindOptions(archive_ids=True))
    assert encode(shards, tmp_path / "bank", options).clips == 4
    ids = [f"00{shard}.tar/{k}.mp4" for shard in range(2) for k in range(2)]
    assert Bank.open(tmp_path / "bank").ids == ids
    found = find_clips(shards, options.find)
    assert len(found.skips) == 4
    assert encode(shards, tmp_path / "bank", options).skipped == 4
    for id_, video in zip(ids, videos, strict=True):
        assert metas(tmp_path / "bank")[id_]["size"] == video.stat().st_size


def test_two_archives_of_one_name_are_not_told_to_take_it_as_their_ids(tmp_path: Path) -> None:
    shards = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shards.append(str(tar_of(tmp_path / folder / "00.tar", ("0.mp4", folder.encode(), {}))))
    with pytest.raises(UserError) as error:
        find_clips(shards, FindOptions(archive_ids=True))
    assert str(error.value) == (
        f"{shards[1]}: has the id '00.tar/0.mp4', as {shards[0]} has; name one of the archives by a "
        "link of another name (ln -s)"
    )
    (tmp_path / "b.tar").symlink_to(shards[1])
    clips = find_clips([shards[0], str(tmp_path / "b.tar")], FindOptions(archive_ids=True)).clips
    assert [clip.id for clip in clips] == ["00.tar/0.mp4", "b.tar/0.mp4"]


@pytest.mark.parametrize("format_", ["gnu", "posix"])
def test_a_member_with_holes_is_told_as_packed_in_its_own_way(tmp_path: Path, format_: str) -> None:
    with open(tmp_path / "v.mp4", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    archive = tmp_path / "v.tar"
    words = ["tar", "-C", tmp_path, "--sparse", f"--format={format_}", "-cf", archive, "v.mp4"]
    subprocess.run(words, check=True)
    assert [skip.reason for skip in archive_members(archive)[1]] == [Why.METHOD]


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_of_more_than_8_gib_is_found_again(tmp_path: Path, format_: int) -> None:
    info = tarfile.TarInfo("long.mp4")
    info.size = (8 << 30) + 5
    archive = tmp_path / "v.tar"
    with open(archive, "wb") as file:
        header = info.tobuf(format_)
        file.write(header)
        file.truncate(len(header) + info.size + 512 + 1024)  # a hole: it takes no place on the disk
    (member,), skips = archive_members(archive)
    assert (member.nbytes, skips) == (info.size, [])
    with Archive(archive) as opened, opened.member(member.offset, member.nbytes) as (file, begin):
        assert begin == len(header)
    with (
        Archive(archive) as opened,
        pytest.raises(tarfile.ReadError, match="not the one that was planned"),
        opened.member(member.offset, 7),
    ):
        pass


def test_a_zip_tells_what_it_cannot_give_and_its_names_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("ü.mp4", b"x")
        link = zipfile.ZipInfo("link.mp4")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
        packed.writestr("locked.mp4", b"x")
        packed.writestr("folder/", b"")
    raw = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for head in re.finditer(re.escape(magic), bytes(raw)):
            raw[head.start() + flags + 1] &= ~8  # no word on UTF-8
    raw[raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"locked.mp4")) + 8] |= 1
    path.write_bytes(raw)
    members, skips = archive_members(path)
    assert [member.name for member in members] == ["ü.mp4"]
    assert [(skip.reason, skip.where) for skip in skips] == [
        (Why.MEMBER_LINK, f"{path}: link.mp4"),
        (Why.LOCKED, f"{path}: locked.mp4"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "a.7z",
            b"7z\xbc\xaf\x27\x1c" + bytes(99),
            "this is a 7-Zip archive, not a video; unpack it",
        ),
        ("a.rar", b"Rar!\x1a\x07" + bytes(99), "this is a RAR archive, not a video; unpack it"),
        (
            "a.tar.zst",
            b"\x28\xb5\x2f\xfd" + bytes(99),
            "with zstandard, not a video; unpack it: unzstd",
        ),
        (
            "a.mp4.gz",
            gzip.compress(b"x", mtime=0),
            "this is compressed with gzip, not a video; unpack it: gunzip",
        ),
        ("a.bin", b"PK\x03\x04" + bytes(99), "this is a ZIP archive, not a video; unpack it"),
    ],
)
def test_an_archive_that_is_not_read_says_which_and_the_way_out(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        find_clips([str(tmp_path / name)])
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert said in str(error.value)


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
