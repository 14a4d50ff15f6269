"""`preprocess repair`: repair the damages that `verify --deep` finds, encoding as few clips as possible.

    repaired = repair(Path("bank"))
    repaired.remaining        # damages that are left; `repaired.notes` says why

A new shard is written beside the old one: undamaged samples are copied, others are decoded and encoded
once more, in the old order. On the machine that made the bank this gives the same bytes. Index, catalogue
and manifest are rebuilt from the shards; so is a lost commit record, if bank.json has the shard's sha256.
A bank of an older format is migrated, with its features unchanged.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np

from model.tower.pooling import FeatureRangeError
from model.tower.tower import Tower
from preprocess.care.covered import corrected
from preprocess.decode.decode_child import DecodeChild
from preprocess.decode.read_decord import decord_trouble
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
from shards.care.inventory import Damage, Inventory, read_inventory, refuse_no_bank
from shards.care.migrate import migrate
from shards.care.revise import move_rewritten, resume_rewritten
from shards.care.tar_scan import SampleState, ShardScan, Tar, commit_of, fault_of_json, layout
from shards.care.verify import is_as_listed, verify
from shards.errors import UserError, disk_errors
from shards.format.commits import (
    CommitRecord,
    SampleRecord,
    done_path,
    index_path,
    shard_name,
    write_commit,
)
from shards.format.manifest import TowerFacts
from shards.format.plan import ClipSource, Plan, read_plan, refuse_derived, refuse_other_features
from shards.format.quarantine import read_quarantine
from shards.format.samples import SampleMeta
from shards.signed import Json, write_atomic
from shards.write.finish import finish
from shards.write.lock import folder_lock
from shards.write.shard import ShardWriter, index_bytes


@dataclass
class Repaired:
    """The result of a repair."""

    damages: list[Damage] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    """Keys of the samples that were encoded."""
    files: list[str] = field(default_factory=list)
    """Paths below the bank of the files that were written."""
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Keys of samples lost with their commit record; `preprocess encode` banks their videos."""
    remaining: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class Features:
    """The features of a clip that was encoded once more."""

    meta: SampleMeta
    arrays: dict[int, np.ndarray]
    underflowed: int


def repair(
    bank: Path,
    tower: str | None = None,
    device: str = "cpu",
    video_roots: Sequence[str] = (),
    seen: Callable[[int], object] = lambda nbytes: None,
) -> Repaired:
    """Repair a bank; return what was done and what could not be.

    tower: its current path or name, if it was moved; another tower is refused, and none is loaded unless
    a clip must be encoded. video_roots: folders to search for videos that were moved. seen: called with
    the bytes of each shard when it is verified.
    """
    refuse_no_bank(bank)
    with disk_errors(bank), folder_lock(bank, "preprocess repair"):
        # -- an older format first: the checks below read the present one
        migrated = migrate(
            bank,
            lambda plan: corrected(
                bank, plan, ClipEncoder(bank, plan, tower, device, video_roots).load
            ),
        )
        moved = resume_rewritten(bank / "shards")
        done = Repaired(damages=verify(bank, deep=True, seen=seen), files=migrated + moved)
        if migrated:
            done.notes.append(
                "a bank of an older format: its metadata is rewritten, its features are as they were"
            )
        inventory = read_inventory(bank)
        if not done.damages:
            return done
        # which clips a shard should hold is said nowhere else
        if inventory.plan is None:
            done.remaining = done.damages
            done.notes.append("nothing can be repaired without plan.json; restore it from a copy")
            return done
        plan = read_plan(bank)
        assert plan
        damaged = {damage.file for damage in done.damages}
        to_encode = {damage.file for damage in done.damages if damage.remedy == "encode"}
        with ClipEncoder(bank, plan, tower, device, video_roots) as encoder:
            # First the shards that need no tower, so that they are repaired even if it cannot be loaded.
            shards = [
                ShardRepair(inventory, unit, plan, encoder, done)
                for unit in range(len(plan.units))
                if shard_name(unit) in inventory.commits
            ]
            for shard in sorted(shards, key=lambda shard: f"shards/{shard.name}" in to_encode):
                if f"shards/{shard.name}" in to_encode:
                    refuse_derived(
                        bank, plan.features, "remove damaged shards, each with its .done"
                    )
                if shard.files() & damaged:
                    shard.run()
        inventory = read_inventory(bank)
        _rewrite_derived(inventory, plan, done, damaged)
        # not what was meant to be repaired, but what is damaged now
        done.remaining = verify(bank, deep=True)
        return done


class ClipEncoder:
    """Encodes single clips of a bank; loads the tower for the first of them."""

    def __init__(
        self, bank: Path, plan: Plan, tower: str | None, device: str, video_roots: Sequence[str]
    ) -> None:
        self.bank, self.plan = bank, plan
        self.video_roots = video_roots
        self.options = EncodeOptions.of_plan(
            plan,
            tower=tower or plan.tower.name,
            device=device,
            allow_truncated=True,  # every clip here was banked before
        )
        self.tower: Tower | None = None
        self._reader: SourceReader | None = None
        self._open = ExitStack()

    def __enter__(self) -> "ClipEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def encode(
        self, clip: ClipSource, old: Json | None, provenance: Mapping[str, object]
    ) -> Features | str:
        """Return the features of a clip, or the reason why it cannot be encoded.

        old: the sample's json, if it is undamaged. provenance: of its shard.
        """
        tower = self.load()
        known = ("batch_frames", "tower_threads")
        # the batch shape of that shard: another one would round otherwise
        numbers = {name: int(str(provenance[name])) for name in known if name in provenance}
        options = replace(self.options, **numbers)  # type: ignore[arg-type]
        if self._reader is None:
            self._reader = self._open.enter_context(SourceReader(DecodeChild(), self.bank))
        (clip,) = clips_under([clip], self.video_roots)
        request = options.request(clip, tower.pixels)
        if old and old["decoder"] == "decord" and not decord_trouble():
            # Readers differ in the last bits, so a clip is repaired with the reader that first read it.
            request = replace(request, decoder="decord")
        outcome = self._reader.read(clip, request)
        if outcome.clip is None:
            return str(outcome.error)
        digest = clip.digest or (old or {}).get("digest")
        # Features of another video under the same path would be a silent replacement.
        if digest and outcome.digest != digest:
            return (
                f"{clip.where}: is not the video that was banked; `preprocess encode` banks the new "
                "one"
            )
        try:
            arrays, underflowed = encode_frames(tower, outcome.clip.frames, options)
        except FeatureRangeError as error:
            return f"{clip.where}: {error}"
        meta = describe(clip, outcome, outcome.clip, tower, arrays)
        return Features(meta, arrays, underflowed)

    def provenance(self, old: Mapping[str, object]) -> Json:
        """Return the provenance of a shard that was partly encoded in this run."""
        return provenance(self.load(), self.options) | {
            name: old[name] for name in ("batch_frames", "tower_threads") if name in old
        }

    def load(self) -> Tower:
        """Return the bank's tower; raises UserError for another one."""
        if self.tower is None:
            self.tower = load_tower(self.options)
            asked = feature_config(self.tower, self.options)
            refuse_other_features(self.bank, asked, self.plan.features)
        return self.tower


class ShardRepair:
    """The repair of one shard."""

    def __init__(
        self, inventory: Inventory, unit: int, plan: Plan, encoder: ClipEncoder, done: Repaired
    ) -> None:
        self.inventory, self.unit, self.plan = inventory, unit, plan
        self.encoder, self.done = encoder, done
        self.name = shard_name(unit)
        self.path = inventory.bank / "shards" / self.name
        self.commit = inventory.commits[self.name]
        self.encoded: list[str] = []

    def files(self) -> set[str]:
        paths = (self.path, index_path(self.path), done_path(self.path))
        return {f"shards/{path.name}" for path in paths}

    def run(self) -> None:
        """Restore tar, index and commit record."""
        damaged = any(damage.file == f"shards/{self.name}" for damage in self.done.damages)
        # bank.json has the shard's checksum, and it is right: what is lost is the record alone
        if self.commit is None and is_as_listed(self.inventory, self.name):
            fingerprint = self.plan.features.fingerprint
            self._write_small_files(commit_of(self.path, self.unit, fingerprint, None, {}))
        elif self.commit is None or damaged or not self.path.exists():
            self._rewrite()
        else:
            self._write_small_files(self.commit)

    def _write_small_files(self, record: CommitRecord) -> None:
        if record != self.commit:
            write_commit(self.path, record)
            self.done.files.append(f"shards/{done_path(self.path).name}")
        if not record.samples:
            return
        index, content = index_path(self.path), index_bytes(record.samples)
        if not index.exists() or index.read_bytes() != content:
            write_atomic(index, content)
            self.done.files.append(f"shards/{index.name}")

    def _rewrite(self) -> None:
        """Write the shard into `.repair`, and move it into place."""
        # beside the old shard, so that the move is a renaming on one disk
        folder = self.path.parent / ".repair"
        shutil.rmtree(folder, ignore_errors=True)
        fingerprint = self.plan.features.fingerprint
        refused: dict[str, SampleRecord] = {}
        with (
            # an empty file has no samples: everything is encoded
            Tar(self.path if self.path.exists() else Path(os.devnull)) as tar,
            ShardWriter(
                folder / self.name, self.unit, fingerprint, plan_codec(self.plan)
            ) as writer,
        ):
            scan = ShardScan(tar)
            for key, sample in self._wanted().items():
                state = scan.state(sample) if sample else None
                # copied, never encoded once more: a copy is right on any machine
                if sample and state and state.sound:
                    writer.copy(state.blob, sample)
                    continue
                features = self._encode(key, sample, state)
                if isinstance(features, Features):
                    writer.write(key, features.meta, features.arrays, features.underflowed)
                    self.encoded.append(key)
                    continue
                self.done.notes.append(f"{self.name}: {key}: {features}")
                if self.plan.served().get(key) != self.unit:
                    continue  # it is not served
                if sample and state:  # keep the damaged sample, so that it stays listed as damaged
                    crc32c = google_crc32c.value(state.blob)
                    writer.copy(state.blob, replace(sample, crc32c=crc32c))
                    refused[key] = sample
                else:
                    self.done.lost.append(key)
            record = writer.commit(self.commit.provenance if self.commit else None)
        self.done.encoded += self.encoded
        self._move(record, refused)

    def _wanted(self) -> dict[str, SampleRecord | None]:
        """Return the samples that the shard should have, in order; None for lost records."""
        if self.commit:
            return {sample.key: sample for sample in self.commit.samples}
        failed = {entry.key for entry in read_quarantine(self.inventory.bank)}
        # without the record: every clip of the unit that has not failed
        return {clip.key: None for clip in self.plan.work()[self.unit] if clip.key not in failed}

    def _encode(
        self, key: str, sample: SampleRecord | None, state: SampleState | None
    ) -> Features | str:
        clip = next((clip for clip in self.plan.units[self.unit] if clip.key == key), None)
        if clip is None:
            return "is not in the plan"
        if self.plan.served().get(key) != self.unit:
            return "is no longer served, and left out"
        old = _json_of(sample, state) if sample and state else None
        return self.encoder.encode(clip, old, self.commit.provenance if self.commit else {})

    def _move(self, record: CommitRecord, refused: Mapping[str, SampleRecord]) -> None:
        """Replace the old shard by the new one; keep the commit record if it still holds."""
        # A sample that could not be repaired keeps the checksum of its undamaged bytes.
        samples = [
            replace(one, crc32c=refused[one.key].crc32c) if one.key in refused else one
            for one in record.samples
        ]
        if self.commit:
            old = self.commit
            record = replace(record, underflowed=old.underflowed, failures=old.failures)
        record = replace(record, samples=samples)
        proven = self.commit is not None and samples == self.commit.samples
        # a shard that was damaged when its descriptions were revised is known by its samples alone
        same = proven and (bool(refused) or record == self.commit)
        if not same:
            if self.encoded and not proven:
                record = replace(record, provenance=self.encoder.provenance(record.provenance))
            if self.encoded and self.commit and not proven:
                self.done.notes.append(
                    f"{self.name}: its bytes differ from the old ones, since another machine or library "
                    f"made them; that these clips are the same cannot be proven: "
                    f"{', '.join(self.encoded)}"
                )
        # of the same samples the old record stays, which may have more about them
        final = self.commit if same and self.commit else record
        self.done.files += move_rewritten(self.path, final)


def _json_of(sample: SampleRecord, state: SampleState) -> Json | None:
    """Return a damaged sample's json; None if the json itself is damaged."""
    member = layout(sample)["json"]
    begin = member.data - sample.offset
    data = state.blob[begin : begin + member.nbytes]
    if fault_of_json(sample.key, data):
        return None
    meta: Json = json.loads(data)
    return meta


def _rewrite_derived(inventory: Inventory, plan: Plan, done: Repaired, damaged: set[str]) -> None:
    """Rewrite catalogue and manifest if they are damaged, or do not match the shards."""
    commits = inventory.sound_commits()
    sums = {commit.shard: commit.sha256 for commit in commits}
    stale = any(entry.sha256 != sums.get(name) for name, entry in inventory.listed.items())
    if not stale and not damaged & {"bank.json", "index.zarr"}:
        return
    # a manifest of whole shards alone would make readers take them for all
    if None in inventory.commits.values():
        done.notes.append("catalogue and bank.json wait for the shards that are not repaired")
        return
    tower, manifest = TowerFacts.of(plan, commits), inventory.manifest
    if manifest:
        tower = TowerFacts(manifest.provenance.tower, manifest.tower_width)
    try:
        finish(inventory.bank, plan, tower)
    except UserError as error:
        done.notes.append(f"catalogue and bank.json are not written: {error}")
        return
    done.files += ["index.zarr", "bank.json"]
