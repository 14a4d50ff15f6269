"""`preprocess repair`: put right what `verify --deep` finds, and encode again only what must be.

    repaired = repair(Path("bank"))
    repaired.remaining        # damages that are left, and why in `repaired.notes`

A shard is written anew beside the old one: samples whose bytes are there are copied, wherever they
were found, the others are decoded and encoded again, in the old order. On the machine that made the
bank that gives the old bytes. Index, commit record, catalogue and manifest come from the shards.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np

from model.tower.tower import FeatureRangeError, Tower
from preprocess.decode.child import DecodeChild
from preprocess.decode.source import SourceReader
from preprocess.encode.features import (
    EncodeOptions,
    describe,
    encode_frames,
    feature_config,
    load_tower,
    plan_codec,
    provenance,
)
from preprocess.sources.find import clips_under
from shards.care.inventory import Books, Damage, read_books
from shards.care.tar_scan import Sight, Tally, Tar, fault_of_json, layout, records
from shards.care.verify import expected_keys, proven_samples, verify
from shards.errors import UserError
from shards.format.commits import done_path, index_path, shard_name
from shards.format.plan import ClipSource, Plan, read_plan, refuse_other_features
from shards.format.samples import SampleMeta
from shards.signed import Json, file_facts, signed_json, write_atomic
from shards.write.finish import finish
from shards.write.lock import BankLock
from shards.write.shard import ShardWriter, index_bytes


@dataclass
class Repaired:
    """What a repair found and did."""

    damages: list[Damage] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    """Keys of the samples that went through decoder and tower."""
    files: list[str] = field(default_factory=list)
    """Below the bank, what was written anew."""
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Keys of samples that are gone with their records; `preprocess encode` banks their videos."""
    remaining: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class TowerFacts:
    """What the manifest says of a tower."""

    name: str
    width: int


@dataclass(frozen=True)
class Features:
    """A clip that was encoded again."""

    meta: SampleMeta
    arrays: dict[int, np.ndarray]


def repair(
    bank: Path,
    tower: str | None = None,
    device: str = "cpu",
    video_roots: Sequence[str] = (),
    seen: Callable[[int], object] = lambda nbytes: None,
) -> Repaired:
    """Repair a bank; returns what was done, and what could not be.

    tower: where it lies now, if not where it lay; another one is refused, and none is loaded where
    nothing has to be encoded. video_roots: where to look for videos that are not where they were.
    """
    with BankLock(bank, "preprocess repair"):
        done = Repaired(damages=verify(bank, deep=True, seen=seen))
        books = read_books(bank)
        if not done.damages:
            return done
        if books.plan is None:
            done.remaining = done.damages
            done.notes.append("nothing can be repaired without plan.json; restore it from a copy")
            return done
        plan = read_plan(bank)
        assert plan
        spoilt = {damage.file for damage in done.damages}
        to_encode = {damage.file for damage in done.damages if damage.remedy == "encode"}
        with Again(bank, plan, tower, device, video_roots) as again:
            # What needs no tower first: it is done even where there is none.
            mends = [
                Mend(books, unit, plan, again, done)
                for unit in range(len(plan.units))
                if shard_name(unit) in books.commits
            ]
            for mend in sorted(mends, key=lambda mend: f"shards/{mend.name}" in to_encode):
                if mend.files() & spoilt:
                    mend.run()
        books = read_books(bank)
        _rewrite_derived(books, plan, done, spoilt)
        done.remaining = verify(bank, deep=True)
        return done


class Again:
    """Encodes single clips of a bank, with a tower that is loaded for the first of them."""

    def __init__(
        self, bank: Path, plan: Plan, tower: str | None, device: str, video_roots: Sequence[str]
    ) -> None:
        self.bank, self.plan = bank, plan
        self.video_roots = video_roots
        self.options = EncodeOptions.of_plan(
            plan,
            tower=tower or plan.how.tower,
            device=device,
            allow_truncated=True,  # what is asked for was banked once
        )
        self.tower: Tower | None = None
        self._reader: SourceReader | None = None

    def __enter__(self) -> "Again":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._reader:
            self._reader.__exit__(kind, error, at)

    def encode(
        self, clip: ClipSource, old: Json | None, how: Mapping[str, object]
    ) -> Features | str:
        """Return the features of a clip, or why there are none.

        old: the sample's json, where it is there. how: the provenance of its shard.
        """
        tower = self._load()
        known = ("batch_frames", "tower_threads")
        numbers = {name: int(str(how[name])) for name in known if name in how}
        options = replace(self.options, **numbers)  # type: ignore[arg-type]
        self._reader = self._reader or SourceReader(DecodeChild(), self.bank)
        (clip,) = clips_under([clip], self.video_roots)
        request = options.request(clip, tower.pixels)
        if old and old["decoder"].startswith("pyav"):
            request = replace(request, decoder="pyav")
        outcome = self._reader.read(clip, request)
        if outcome.clip is None:
            return str(outcome.error)
        digest = clip.digest or (old or {}).get("digest")
        if digest and outcome.digest != digest:
            return (
                f"{clip.where}: is not the video that was banked; `preprocess encode` banks the new "
                "one"
            )
        try:
            arrays, _ = encode_frames(tower, outcome.clip.frames, options)
        except FeatureRangeError as error:
            return f"{clip.where}: {error}"
        return Features(describe(clip, outcome, outcome.clip, tower, arrays), arrays)

    def facts(self, old: Mapping[str, object]) -> Json:
        """Return the provenance of a shard that was written in part today."""
        return provenance(self._load(), self.options) | {
            name: old[name] for name in ("batch_frames", "tower_threads") if name in old
        }

    def _load(self) -> Tower:
        if self.tower is None:
            self.tower = load_tower(self.options)
            asked = feature_config(self.tower, self.options)
            refuse_other_features(self.bank, asked, self.plan.features)
        return self.tower


class Mend:
    """One shard, and what is to be done with it."""

    def __init__(self, books: Books, unit: int, plan: Plan, again: Again, done: Repaired) -> None:
        self.books, self.unit, self.plan, self.again, self.done = books, unit, plan, again, done
        self.name = shard_name(unit)
        self.path = books.bank / "shards" / self.name
        self.commit = books.commits[self.name]
        self.encoded: list[str] = []

    def files(self) -> set[str]:
        paths = (self.path, index_path(self.path), done_path(self.path))
        return {f"shards/{path.name}" for path in paths}

    def run(self) -> None:
        """Make tar, index and commit record what they were."""
        spoilt = {damage.file for damage in self.done.damages}
        whole = f"shards/{self.name}" not in spoilt and self.path.exists()
        if not whole:
            self._write_anew()
        else:
            with Tar(self.path) as tar:
                samples = self.commit["samples"] if self.commit else records(tar)
            if self.commit is None:
                self._write(done_path(self.path), signed_json(self._record_of(samples)))
            self._write_index(samples)

    def _write_anew(self, trusting: bool = True) -> None:
        """Write the shard beside its place, and move it there.

        Of a kill between the renames a new repair finds whole samples, and goes on from them.
        trusting: where the commit record is lost, copy what the catalogue bears out. It does not
        hold every word of the descriptions: if the shard is then not what it was, all is encoded.
        """
        folder = self.path.parent / ".repair"
        shutil.rmtree(folder, ignore_errors=True)
        fingerprint = self.plan.features.fingerprint
        codec = plan_codec(self.plan)
        refused: dict[str, Json] = {}
        copied, lost, notes = 0, list[str](), list[str]()
        self.encoded = []
        with (
            Tar(self.path if self.path.exists() else Path(os.devnull)) as tar,
            ShardWriter(folder / self.name, self.unit, fingerprint, codec) as writer,
        ):
            tally = Tally(tar)
            for key, sample in self._wanted(tar).items():
                sight = tally.look(sample) if sample else Sight(None)
                if sample and sight.blob is not None and trusting:
                    writer.copy(sight.blob, sample)
                    copied += 1
                    continue
                features = self._encode(key, sample, sight)
                if isinstance(features, Features):
                    writer.write(key, features.meta, features.arrays)
                    self.encoded.append(key)
                    continue
                notes.append(f"{self.name}: {key}: {features}")
                if sample and sight.blob is not None:
                    writer.copy(sight.blob, sample)
                elif self.plan.served().get(key) != self.unit:
                    continue  # nobody reads it
                elif sample:
                    rest = {"crc32c": google_crc32c.value(sight.rest)}
                    writer.copy(sight.rest, sample | rest)
                    refused[key] = sample
                else:
                    lost.append(key)
            record = writer.commit(**self._facts())
        listed = self.books.listed.get(self.name)
        proven = listed is None or listed["sha256"] == record["sha256"]
        if self.commit is None and copied and trusting and not proven:
            self._write_anew(trusting=False)
            return
        self.done.encoded += self.encoded
        self.done.notes += notes
        self.done.lost += lost
        self._move(folder, record, refused)

    def _wanted(self, tar: Tar) -> dict[str, Json | None]:
        """Return the samples that the shard should hold in their order, None of lost records."""
        if self.commit:
            return {sample["key"]: sample for sample in self.commit["samples"]}
        there = records(tar)
        proven = proven_samples(self.books, self.name, tar, there)
        wanted = {sample["key"] for sample in there} | expected_keys(self.books, self.name)
        keys = [clip.key for clip in self.plan.units[self.unit]]
        return {key: proven.get(key) for key in keys if key in wanted}

    def _encode(self, key: str, sample: Json | None, sight: Sight) -> Features | str:
        clip = next((clip for clip in self.plan.units[self.unit] if clip.key == key), None)
        if clip is None:
            return "is not in the plan"
        if self.plan.served().get(key) != self.unit:
            return "is served no more, and left out"
        old = _json_of(sample, sight) if sample else None
        how = self.commit["provenance"] if self.commit else {}
        return self.again.encode(clip, old, how)

    def _facts(self) -> Json:
        if self.commit:
            return {name: self.commit[name] for name in ("underflowed", "provenance")}
        return self._lost_facts()

    def _lost_facts(self) -> Json:
        """Return what a lost commit record said beside its samples, from the manifest's sums."""
        others = [c for name, c in self.books.commits.items() if c and name != self.name]
        told = (self.books.manifest or {}).get("provenance", {})
        rest = told.get("underflowed", 0) - sum(commit["underflowed"] for commit in others)
        known = [commit["provenance"] for commit in others]
        encoded = told.get("encoded", known)
        new = [facts for facts in encoded if facts not in known]
        return {"underflowed": max(rest, 0), "provenance": (new or encoded or [{}])[0]}

    def _record_of(self, samples: Sequence[Json]) -> Json:
        """Return the commit record of a shard that is whole."""
        return {
            **self._lost_facts(),
            "shard": self.name,
            "unit": self.unit,
            "fingerprint": self.plan.features.fingerprint,
            **file_facts(self.path),
            "samples": list(samples),
        }

    def _move(self, folder: Path, record: Json, refused: Mapping[str, Json]) -> None:
        """Put the new shard in the old one's place; keep the record where it holds for the new."""
        for sample in record["samples"]:
            if sample["key"] in refused:  # the checksum of what should be there
                sample["crc32c"] = refused[sample["key"]]["crc32c"]
        record.pop("self_hash", None)
        same = self.commit is not None and record["samples"] == self.commit["samples"]
        if not same:
            listed = self.books.listed.get(self.name)
            if self.encoded and not (listed and listed["sha256"] == record["sha256"]):
                record["provenance"] = self.again.facts(record["provenance"])
            write_atomic(done_path(folder / self.name), signed_json(record))
            if self.encoded and self.commit:
                self.done.notes.append(
                    f"{self.name}: is not byte for byte what it was, as another machine or library "
                    f"made it; that these clips are the same cannot be proven: "
                    f"{', '.join(self.encoded)}"
                )
        for at in (lambda p: p, index_path, *([] if same else [done_path])):
            os.replace(at(folder / self.name), at(self.path))
            self.done.files.append(f"shards/{at(self.path).name}")
        shutil.rmtree(folder)

    def _write_index(self, samples: Sequence[Json]) -> None:
        last = samples[-1] if samples else {"offset": 0, "nbytes": 0}
        content = index_bytes(list(samples), last["offset"] + last["nbytes"])
        path = index_path(self.path)
        if not path.exists() or path.read_bytes() != content:
            self._write(path, content)

    def _write(self, path: Path, data: bytes) -> None:
        write_atomic(path, data)
        self.done.files.append(f"shards/{path.name}")


def _json_of(sample: Json, sight: Sight) -> Json | None:
    """Return a damaged sample's json, where that is whole."""
    member = layout(sample)["json"]
    begin = member.data - sample["offset"]
    data = sight.rest[begin : begin + member.nbytes]
    if fault_of_json(sample["key"], data):
        return None
    meta: Json = json.loads(data)
    return meta


def _rewrite_derived(books: Books, plan: Plan, done: Repaired, spoilt: set[str]) -> None:
    """Write catalogue and manifest where they are damaged, or tell of other shards than there are."""
    commits = books.sound_commits()
    sums = {commit["shard"]: commit["sha256"] for commit in commits}
    stale = any(entry["sha256"] != sums.get(name) for name, entry in books.listed.items())
    if not stale and not spoilt & {"bank.json", "index.zarr"}:
        return
    if None in books.commits.values():
        done.notes.append("catalogue and bank.json wait for the shards that are not repaired")
        return
    try:
        finish(books.bank, plan, tower_facts(books, plan))
    except UserError as error:
        done.notes.append(f"catalogue and bank.json are not written: {error}")
        return
    done.files += ["index.zarr", "bank.json"]


def tower_facts(books: Books, plan: Plan) -> TowerFacts:
    if books.manifest:
        return TowerFacts(books.manifest["provenance"]["tower"], books.manifest["tower_width"])
    commit = next(commit for commit in books.sound_commits() if commit["samples"])
    stream = next(iter(commit["samples"][0]["streams"].values()))
    return TowerFacts(plan.how.tower, stream["shape"][-1])
