"""P18: each entry of an input is banked, quarantined with a reason, or counted as skipped with one.

Random folders, archives and lists of good, bad, odd, unreadable and linked entries are written, each
entry with what must become of it, and encoded together; then every entry is looked for.

pytest tests/promises/test_p18_nothing_lost.py
pytest tests/promises/test_p18_nothing_lost.py -m slow      a hundred of them
"""

import ctypes
import io
import json
import os
import socket
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from preprocess.encode.features import EncodeOptions
from preprocess.encode.run import encode
from preprocess.sources.find import FindOptions
from preprocess.toyworld import write_video
from shards.format.features import Sampling
from shards.format.plan import read_plan
from shards.format.quarantine import read_entries
from shards.read.bank import Bank

BANKED, QUARANTINED, SKIPPED = "banked", "quarantined", "skipped"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
HTML = b"<!doctype html><title>404</title>"


class Files:
    """The contents that entries have."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 255, (4, 48, 64, 3), np.uint8)
        write_video(folder / "good.mp4", frames, 8)
        self.video = (folder / "good.mp4").read_bytes()
        images = [Image.fromarray(frame) for frame in frames[:2]]
        self.pictures = {}
        for ending in ("png", "jpg", "webp", "avif"):
            images[0].save(folder / f"x.{ending}")
            self.pictures[ending] = (folder / f"x.{ending}").read_bytes()
        self.animations = {}
        for ending in ("gif", "webp", "png"):
            path = folder / f"moves.{ending}"
            images[0].save(path, save_all=True, append_images=images[1:], duration=100)
            self.animations[ending] = path.read_bytes()


@dataclass
class World:
    """Inputs, and what must become of each of their entries."""

    root: Path
    rng: Random
    files: Files
    follow: bool
    expected: dict[str, str] = field(default_factory=dict)
    """By path, `archive: member` or `file:line`."""
    inputs: list[str] = field(default_factory=list)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return self.rng.choice(["v{}", "clip {}", "ü-{}", "a.b.{}", "Ω{}"]).format(self.count)

    def put(self, path: Path, data: bytes, outcome: str) -> None:
        path.write_bytes(data)
        self.expected[str(path)] = outcome


# Entries of a folder.


def put_plain(world: World, folder: Path) -> None:
    """A file that is what its name says, or is not."""
    files = world.files
    kinds: list[tuple[str, bytes, str]] = [
        *((ending, files.video, BANKED) for ending in (".mp4", ".MKV", ".mts", ".vob", "")),
        *((f".{ending}", data, BANKED) for ending, data in files.animations.items()),
        *((".mp4", data, QUARANTINED) for data in (b"", HTML, LFS, b"text", bytes(9000))),
        (".mp4", files.video[:700], QUARANTINED),
        *((ending, b"words", SKIPPED) for ending in (".txt", ".srt", ".ts", ".mod", "", ".xyz")),
        (".json", b"[]", SKIPPED),
        (".tar.gz", b"", SKIPPED),
    ]
    ending, data, outcome = world.rng.choice(kinds)
    name = world.name()
    if not ending:
        name = name.replace(".", "-")
    world.put(folder / f"{name}{ending}", data, outcome)


def put_junk(world: World, folder: Path) -> None:
    name = world.rng.choice(
        [".DS_Store", "Thumbs.db", "desktop.ini", f"._{world.name()}.mp4", ".gitkeep"]
    )
    world.put(folder / name, world.files.video, SKIPPED)


def put_mac_folder(world: World, folder: Path) -> None:
    (folder / "__MACOSX").mkdir(exist_ok=True)
    world.put(folder / "__MACOSX" / f"._{world.name()}.mp4", b"x", SKIPPED)


def put_other_name(world: World, folder: Path) -> None:
    raw = (
        bytes(folder) + b"/caf\xe9 " + world.name().encode() + world.rng.choice([b".mp4", b".txt"])
    )
    world.put(Path(os.fsdecode(raw)), world.files.video, SKIPPED)


def put_special(world: World, folder: Path) -> None:
    path = folder / f"{world.name()}.mp4"
    if world.rng.random() < 0.5 or len(bytes(path)) > 100:
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    world.expected[str(path)] = SKIPPED


def put_link(world: World, folder: Path) -> None:
    path = folder / f"{world.name()}.mp4"
    aim = world.rng.choice(["file", "nothing", "folder", "above"])
    elsewhere = world.root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "far.mp4").write_bytes(world.files.video)
    places = {"file": elsewhere / "far.mp4", "folder": elsewhere, "above": folder}
    path.symlink_to(places.get(aim, elsewhere / "gone.mp4"))
    if aim == "folder" and world.follow:
        world.expected[str(path / "far.mp4")] = BANKED
    else:
        world.expected[str(path)] = BANKED if aim == "file" else SKIPPED


def put_frames(world: World, folder: Path) -> None:
    """A folder of nothing but pictures is one clip; beside other files each picture is a skip."""
    ending = world.rng.choice(list(world.files.pictures))
    inner = folder / world.name()
    inner.mkdir()
    beside, broken = world.rng.random() < 0.3, world.rng.random() < 0.2
    outcome = SKIPPED if beside else QUARANTINED if broken else BANKED
    for k in range(world.rng.randint(1, 3)):
        data = b"no picture" if broken else world.files.pictures[ending]
        world.put(inner / f"{k}.{ending}", data, outcome)
    world.put(inner / "Thumbs.db", b"x", SKIPPED)
    if beside:
        world.put(inner / "notes.txt", b"x", SKIPPED)


def put_locked_folder(world: World, folder: Path) -> None:
    inner = folder / f"locked-{world.name()}"
    inner.mkdir()
    (inner / "a.mp4").write_bytes(world.files.video)
    inner.chmod(0)
    world.expected[str(inner)] = SKIPPED


def put_folder(world: World, folder: Path) -> None:
    inner = folder / world.name()
    inner.mkdir()
    for _ in range(world.rng.randint(0, 4)):
        world.rng.choice(ENTRIES)(world, inner)


ENTRIES: list[Callable[[World, Path], None]] = [
    *[put_plain] * 5,
    *(put_junk, put_mac_folder, put_other_name, put_special, put_link, put_link),
    *(put_frames, put_frames, put_locked_folder, put_folder, put_folder),
]


def add_folder(world: World) -> None:
    root = world.root / "videos"
    root.mkdir()
    world.put(root / "first.mp4", world.files.video, BANKED)
    for _ in range(world.rng.randint(3, 12)):
        world.rng.choice(ENTRIES)(world, root)
    world.inputs.append(str(root))


# Members of an archive.

Member = tuple[str, bytes, bytes]
"""Name, content, type of a tar's member."""


def members_of(world: World, lead: str) -> list[tuple[Member, str]]:
    """Return random members, each with what must become of it."""
    video, plain = world.files.video, tarfile.REGTYPE
    kinds: list[tuple[str, bytes, bytes, str]] = [
        *[("{}.mp4", video, plain, BANKED)] * 4,
        ("{}", video, plain, BANKED),
        ("{}.mp4", b"no video", plain, QUARANTINED),
        ("{}.mp4", b"", plain, QUARANTINED),
        ("{}.txt", b"words", plain, SKIPPED),
        ("{}.json", b"{}", plain, SKIPPED),
        ("{}.jpg", world.files.pictures["jpg"], plain, SKIPPED),
        ("../{}.mp4", video, plain, SKIPPED),
        ("__MACOSX/._{}.mp4", b"x", plain, SKIPPED),
        ("{}.mp4", b"", tarfile.SYMTYPE, SKIPPED),
    ]
    chosen = [kinds[0], *(world.rng.choice(kinds) for _ in range(world.rng.randint(2, 8)))]
    return [
        ((name.format(f"{lead}{world.name().replace('.', '-')}"), data, type_), outcome)
        for name, data, type_, outcome in chosen
    ]


def tar_bytes(members: list[Member], form: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=form) as tar:  # type: ignore[call-overload]
        for name, data, type_ in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), type_, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_bytes(members: list[Member]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for number, (name, data, type_) in enumerate(members):
            info = zipfile.ZipInfo(name)
            info.compress_type = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
            info.external_attr = (0o120777 if type_ == tarfile.SYMTYPE else 0o100644) << 16
            packed.writestr(info, data)
    return out.getvalue()


def add_archive(world: World) -> None:
    found = members_of(world, "m/" if world.rng.random() < 0.5 else "")
    members = [member for member, _ in found]
    form = world.rng.choice(["tar", "tar.gz", "tar.xz", "tar.bz2", "zip", "appended.tar"])
    path = world.root / f"archive.{form}"
    if form == "zip":
        data = zip_bytes(members)
    elif form == "appended.tar":
        cut = world.rng.randint(0, len(members))
        data = tar_bytes(members[:cut], "w:") + tar_bytes(members[cut:], "w:")
    else:
        data = tar_bytes(members, f"w:{form[4:]}")
    path.write_bytes(data)
    world.expected |= {f"{path}: {member[0]}": outcome for member, outcome in found}
    world.inputs.append(str(path))


# Rows of a list.


def add_list(world: World) -> None:
    media, path = world.root / "media", world.root / "list.jsonl"
    media.mkdir()
    decomposed = normalize("NFD", "l-é.mp4")
    for name in ("l1.mp4", "l2.mp4", decomposed):
        (media / name).write_bytes(world.files.video)
    (media / "l-bad.mp4").write_bytes(HTML)
    os.mkfifo(media / "l-pipe.mp4")
    kinds: list[tuple[str, str]] = [
        ('{"video": "l1.mp4"}', BANKED),
        ('{"video": "l2.mp4", "start": 0.1, "end": 0.3}', BANKED),
        ('{"image": "l1.mp4", "question": "?", "answer": "!"}', BANKED),
        (json.dumps({"video": normalize("NFC", decomposed)}, ensure_ascii=False), BANKED),
        ('{"video": "l-bad.mp4"}', QUARANTINED),
        ('{"video": "gone.mp4"}', SKIPPED),
        ('{"video": "l-pipe.mp4"}', SKIPPED),
        ('{"video": "../secret.mp4"}', SKIPPED),
        ('{"video": "l1.mp4", "start": true}', SKIPPED),
        ('{"video": "l1.mp4", "start": 3, "end": 2}', SKIPPED),
        ('{"video": ["l1.mp4", ["l2.mp4"]]}', SKIPPED),
        ('{"video": null}', SKIPPED),
        ('{"video": ', SKIPPED),
        ("[1, 2]", SKIPPED),
        ('{"question": "no medium?", "answer": "none"}', SKIPPED),
    ]
    rows = [kinds[0], *(world.rng.choice(kinds) for _ in range(world.rng.randint(3, 12)))]
    path.write_text("\n".join(row for row, _ in rows), encoding="utf-8")
    world.expected |= {f"{path}:{n}": outcome for n, (_, outcome) in enumerate(rows, 1)}
    world.inputs.append(str(path))


# What became of them.

DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2


class _Head(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def nobody_in_particular() -> Iterator[None]:
    """Let this thread heed the modes of files, root or not."""
    libc, head, sets = ctypes.CDLL(None, use_errno=True), _Head(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(head), sets) == 0
    before = sets[0].effective
    sets[0].effective = before & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(ctypes.byref(head), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(head), sets) == 0


def outcomes(bank: Path, world: World) -> Counter[tuple[str, str]]:
    """Return how often each entry is (banked, quarantined or skipped) by what the bank's files say."""
    plan = read_plan(bank)
    assert plan
    banked, failed = set(Bank.open(bank).ids), read_entries(bank)
    found: Counter[tuple[str, str]] = Counter()
    rows = {line for line in world.expected if "list.jsonl:" in line}
    for clip in plan.clips:
        assert (clip.id in banked) + (clip.id in failed) == 1, clip
        outcome = BANKED if clip.id in banked else QUARANTINED
        assert outcome == BANKED or failed[clip.id].message
        if Path(clip.path).parent == world.root / "media":
            continue  # the rows that name it are looked for below
        wheres = [clip.where]
        if Path(clip.path).is_dir():
            junk = ("Thumbs.db", ".DS_Store", "desktop.ini", ".gitkeep", "._", "__MACOSX")
            inside = [path for path in Path(clip.path).iterdir() if not path.name.startswith(junk)]
            wheres = list(map(str, inside))
        found.update((where, outcome) for where in wheres)
    text = (bank / "skipped.jsonl").read_text() if (bank / "skipped.jsonl").exists() else ""
    skips = [json.loads(line) for line in text.splitlines()]
    assert all(skip["reason"] for skip in skips)
    found.update((skip["where"], SKIPPED) for skip in skips)
    for row in rows - {skip["where"] for skip in skips}:
        file, _, number = row.rpartition(":")
        named = json.loads(Path(file).read_text("utf-8").split("\n")[int(number) - 1])
        ids = {clip_id_of(named)}
        assert ids <= banked | set(failed), row
        found[row, BANKED if ids <= banked else QUARANTINED] += 1
    return found


def clip_id_of(row: dict[str, object]) -> str:
    part = f"#{row['start']}-{row['end']}" if "start" in row else ""
    return f"{row.get('video', row.get('image'))}{part}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    "seed", [pytest.param(k, marks=[] if k < 8 else pytest.mark.slow) for k in range(100)]
)
def test_every_entry_is_banked_quarantined_or_skipped(
    toy: Path, files: Files, tmp_path: Path, seed: int
) -> None:
    rng = Random(seed)
    world = World(tmp_path / "in", rng, files, follow=rng.random() < 0.5)
    world.root.mkdir()
    parts = [add_folder, add_archive, add_list]
    for part in rng.sample(parts, rng.randint(1, 3)):
        part(world)
    find = FindOptions(
        video_roots=(str(world.root / "media"),) if (world.root / "media").exists() else (),
        follow_links=world.follow,
        missing="drop",
        on_bad_record="drop",
    )
    options = EncodeOptions(str(toy / "tower"), (4, 8), Sampling(num_frames=2), find=find)
    with nobody_in_particular():
        encode(world.inputs, tmp_path / "bank", options)
        found = outcomes(tmp_path / "bank", world)
    assert found == Counter(dict.fromkeys(world.expected.items(), 1))
    for path in world.root.rglob("locked-*"):
        path.chmod(0o700)
