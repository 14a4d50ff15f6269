"""Shards are the same for any number of processes that decode, with slow and bad clips in between.

pytest tests/preprocess/encode/test_decoders.py
"""

import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from model.tower.tower import Tower
from preprocess.decode.archive import Archive, Unpacker
from preprocess.encode.features import EncodeOptions, feature_config
from preprocess.encode.pipeline.decoders import Decoders
from preprocess.encode.unit import Encoder
from preprocess.sources.find import FindOptions, find_clips
from shards.format.commits import shard_path
from shards.format.plan import ClipSource
from shards.signed import read_signed_json
from shards.write.lease import Leases

COUNTS = (1, 2, 4)


def draw(path: Path, frames: int, side: int = 64) -> Path:
    """Write a clip whose frames differ; a larger one takes longer."""
    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = side
        for _ in range(frames):
            picture = rng.integers(0, 256, (side, side, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def unit(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ClipSource]:
    """Slow, quick and bad clips, parts of one file, members of a compressed archive."""
    folder = tmp_path_factory.mktemp("unit")
    videos = folder / "videos"
    videos.mkdir()
    draw(videos / "a-slow.mp4", 250, 96)
    for k, path in enumerate(sorted((toy / "videos" / "train").glob("*.mp4"))):
        (videos / f"b{k}-quick.mp4").write_bytes(path.read_bytes())
        (videos / f"b{k}-bad.mp4").write_text("no video")
    raw = (videos / "a-slow.mp4").read_bytes()
    (videos / "c-cut.mp4").write_bytes(raw[: len(raw) // 2])
    draw(videos / "d-slow.mp4", 100, 160)
    with tarfile.open(folder / "more.tar.gz", "w:gz") as tar:
        tar.add(toy / "videos" / "test", "more")
        tar.add(videos / "b0-bad.mp4", "more/bad.mp4")
    records = folder / "records.json"
    parts = [f'{{"video": "a-slow.mp4", "start": {k}, "end": {k + 2}}}' for k in range(9)]
    records.write_text(f"[{', '.join(parts)}]")
    clips = find_clips([str(videos), str(folder / "more.tar.gz")]).clips
    clips += find_clips([str(records)], FindOptions(video_roots=(str(videos),))).clips
    return sorted(clips, key=lambda clip: clip.place)


def encode(
    out: Path, tower: Tower, options: EncodeOptions, unit: list[ClipSource], decoders: int
) -> dict[str, Any]:
    """Return the commit record of the unit's shard, without the seconds that its failures took."""
    out.mkdir()
    features = feature_config(tower, options)
    with (
        Encoder(out, features, tower, options, decoders=decoders) as encoder,
        Leases(out, "a test") as leases,
    ):
        lease = leases.take(0)
        assert lease
        assert encoder.encode_unit(lease, unit)
    record = read_signed_json(shard_path(out, 0).with_suffix(".done"))
    for failure in record["failures"]:
        failure["seconds"] = 0
    assert set(encoder.summary.shares) == {"decode", "tower", "write"}
    assert sum(encoder.summary.shares.values()) == pytest.approx(1)
    return record


def test_a_shard_is_the_same_for_any_number_of_decoders(
    tower: Tower, toy_options: EncodeOptions, unit: list[ClipSource], tmp_path: Path
) -> None:
    options = replace(toy_options, tower_threads=1)
    records = {n: encode(tmp_path / str(n), tower, options, unit, n) for n in COUNTS}
    keys = [sample["key"] for sample in records[1]["samples"]]
    good = [clip.key for clip in unit if "bad" not in clip.id and "cut" not in clip.id]
    assert keys == good
    assert len(records[1]["failures"]) == 8
    tars = {n: shard_path(tmp_path / str(n), 0).read_bytes() for n in COUNTS}
    assert records[1] == records[2] == records[4]
    assert tars[1] == tars[2] == tars[4]


def test_a_compressed_archive_is_read_once_and_parts_of_a_file_by_one_process(
    tower: Tower,
    toy_options: EncodeOptions,
    unit: list[ClipSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Path] = []

    class Counted(Archive):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr("preprocess.decode.archive.Archive", Counted)
    archived = [clip for clip in unit if clip.offset is not None]
    assert len(archived) == 4
    jobs = [(clip, toy_options.request(clip, tower.pixels)) for clip in archived]
    with (
        Decoders(3, Unpacker(tmp_path)) as decoders,
        closing(decoders.events(jobs, 16)) as events,
    ):
        seen = list(dict.fromkeys(source.id for source, _ in events))
    assert seen == [clip.id for clip in archived]
    assert len(opened) == 1
