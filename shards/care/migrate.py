"""Migrate a bank of an older format to the current one: features are copied, nothing is encoded.

migrate(Path("bank"), correcting)     # the files that were written; none for a current bank

A bank of format 1 may lack fields that were added while the number stayed 1:

    plan.json      how, calibration, quality, pruned; full_digest of clips is dropped
    .done          crc32c; of each sample nbytes and crc32c; underflowed, provenance
    bank.json      catalogue, codec, superseded, calibration

A setting that a plan lacks could not be chosen then, so the current default is right for it. A field that
a commit record lacks is computed from its shard, if the shard has the recorded sha256. Catalogue and
bank.json are rebuilt, as at the end of every run.

Formats 1 and 2 also state that the tower saw the whole crop of every sample (`covered`), although patches
that do not divide the crop leave a margin; their `flags` are a list. Such shards are rewritten with the
same features. A unit without a banked clip had an empty shard, and has none in format 3.
"""

from collections.abc import Callable
from pathlib import Path

from shards.care.revise import Correct, resume_move, revise
from shards.care.tar_scan import commit_of
from shards.errors import UserError
from shards.format.commits import (
    CommitRecord,
    done_path,
    index_path,
    read_commits,
    shard_path,
    write_commit,
)
from shards.format.features import FORMAT_VERSION
from shards.format.manifest import TowerFacts
from shards.format.plan import READER, Plan, TowerSettings, write_plan
from shards.format.version import is_older
from shards.signed import Json, file_sha256, read_signed_json
from shards.write.finish import finish
from shards.write.shard import commit_nothing


def migrate(bank: Path, correcting: Callable[[Plan], Correct]) -> list[str]:
    """Rewrite the files of an older format; return their paths below the bank.

    correcting: returns, for a plan, a function that corrects `covered` in a sample's json. After a kill
    it can be repeated. Raises UserError if the plan lacks a field that has no default.
    """
    plan_json, manifest = _signed(bank / "plan.json"), _signed(bank / "bank.json")
    # either: a migration that was killed has a new plan and an old manifest
    if not any(record and is_older(record) for record in (plan_json, manifest)):
        return []
    if plan_json is None:
        raise UserError(
            f"{bank}: a bank of an older format cannot be brought up to date without its plan.json; "
            "restore it from a copy, or encode again into another folder"
        )
    plan = _plan(bank, plan_json, manifest or {})
    listed = {entry.get("name"): entry for entry in (manifest or {}).get("shards", ())}
    correct, fingerprint = correcting(plan), plan.features.fingerprint
    written = []
    for unit in range(len(plan.units)):
        shard = shard_path(bank, unit)
        # first, since a killed migration may have left a revised shard half in its place
        resume_move(shard, fingerprint)
        sha256 = listed.get(shard.name, {}).get("sha256")
        commit = _commit(shard, unit, fingerprint, sha256)
        # a shard that nothing proves keeps its old record: verify names it, and repair encodes its clips
        if not commit:
            continue
        if not commit.samples:
            commit = commit_nothing(shard, commit)
        revised = revise(shard, commit, correct) if shard.exists() else commit
        if revised != commit:
            written += [f"shards/{path.name}" for path in (shard, index_path(shard))]
        write_commit(shard, revised)
        written.append(f"shards/{done_path(shard).name}")
    # after the shards: until then the old plan says that there is still something to migrate
    write_plan(bank, plan)
    written.append("plan.json")
    if (bank / "bank.json").exists():
        try:
            commits = read_commits(bank, plan)
            finish(bank, plan, TowerFacts.of(plan, commits), commits=commits)
            written += ["index.zarr", "bank.json"]
        except (UserError, FileNotFoundError):  # repair writes it after it has repaired the shards
            # an old one beside new shards is refused by every reader; without one the bank is
            # unfinished, as it is
            (bank / "bank.json").unlink()
    return written


def _signed(path: Path) -> Json | None:
    """Return the record in a signed file; None if it is lost or damaged."""
    try:
        return read_signed_json(path)
    except (FileNotFoundError, UserError):
        return None


def _plan(bank: Path, old: Json, manifest: Json) -> Plan:
    """Return the plan from an older plan.json."""
    if not is_older(old):
        return Plan.from_json(old, bank)
    features, tower = old.get("features"), old.get("tower", {})
    how = {"batch_frames": tower.get("batch_frames"), "tower_threads": tower.get("threads")}
    how = {name: value for name, value in how.items() if value is not None}
    how |= {"tower": tower["name"]} if "name" in tower else {}
    # what format 1 wrote under `how` wins: the rest is put together from other fields
    how |= old.get("how", {})
    default = TowerSettings()
    filled = {
        "format_version": FORMAT_VERSION,
        "features": features and features | {"format_version": FORMAT_VERSION},
        "units": old.get("units") and [[_clip(clip) for clip in unit] for unit in old["units"]],
        "calibration": old.get("calibration"),
        "quality": old.get("quality"),
        "pruned": old.get("pruned", []),
        "decoder": old.get("decoder", READER),
        "tower": {
            "name": how.get("tower", manifest.get("provenance", {}).get("tower", default.name)),
            "batch_frames": how.get("batch_frames", default.batch_frames),
            "threads": how.get("tower_threads", default.threads),
        },
    }
    try:
        return Plan.from_json(filled, bank)
    except UserError as error:
        raise UserError(
            f"{bank}: its plan.json of an older format cannot be brought up to date: {error.what}; "
            "restore it from a copy, or encode again into another folder"
        ) from None


def _clip(old: Json) -> Json:
    """Return a clip of an older plan without the hash of all its bytes, which is no longer kept."""
    return {name: value for name, value in old.items() if name != "full_digest"}


def _commit(
    shard: Path, unit: int, fingerprint: str, listed_sha256: str | None
) -> CommitRecord | None:
    """Return a shard's commit record in the current format; None if no sha256 proves the shard."""
    old: Json = {"underflowed": None, "provenance": {}} | (_signed(done_path(shard)) or {})
    try:
        return CommitRecord.from_json(old | {"fingerprint": fingerprint}, str(done_path(shard)))
    except UserError:  # it lacks fields that were added later
        pass
    sha256 = old.get("sha256", listed_sha256)
    # offsets computed from a damaged shard would look as good as any
    if sha256 is None or not shard.exists() or file_sha256(shard) != sha256:
        return None
    return commit_of(shard, unit, fingerprint, old["underflowed"], old["provenance"])
