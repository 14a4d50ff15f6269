"""Bring a bank of an older format up to date: nothing is encoded, features are copied as they are.

migrate(Path("bank"), correcting)     # the files that were written; none of a bank of today

A bank of format 1 may lack what was added while the number stayed 1:

    plan.json      how, calibration, quality, pruned; full_digest of clips is kept no more
    .done          crc32c; of each sample nbytes and crc32c; underflowed, provenance
    bank.json      catalogue, codec, superseded, calibration

What a plan lacks was not there to be chosen, so that today's default is what was meant. What a
commit record lacks is read off its shard, which the record's sha256 proves. Catalogue and bank.json
are made from the rest, as at the end of every run.

Formats 1 and 2 also say of every sample that the tower saw its whole crop (`covered`), though patches
that do not divide it leave a rest; their `flags` are a list. The shards are written again, with the
features of the old ones. A unit of which no clip could be banked had an empty shard, and has none now.
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
    """Rewrite what an older format has otherwise; return the names of the files below the bank.

    correcting: what gives the descriptions of a plan's samples their right `covered`. Whoever is
    killed in the middle does it again. Raises UserError, one line, where the plan lacks what cannot be
    filled in.
    """
    plan_json, manifest = _signed(bank / "plan.json"), _signed(bank / "bank.json")
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
        resume_move(shard, fingerprint)
        sha256 = listed.get(shard.name, {}).get("sha256")
        commit = _commit(shard, unit, fingerprint, sha256)
        if not commit:
            continue
        if not commit.samples:
            commit = commit_nothing(shard, commit)
        revised = revise(shard, commit, correct) if shard.exists() else commit
        if revised != commit:
            written += [f"shards/{path.name}" for path in (shard, index_path(shard))]
        write_commit(shard, revised)
        written.append(f"shards/{done_path(shard).name}")
    write_plan(bank, plan)
    written.append("plan.json")
    if (bank / "bank.json").exists():
        try:
            commits = read_commits(bank, plan)
            finish(bank, plan, TowerFacts.of(plan, commits), commits=commits)
            written += ["index.zarr", "bank.json"]
        except (UserError, FileNotFoundError):  # repair writes it when the shards are whole again
            (bank / "bank.json").unlink()
    return written


def _signed(path: Path) -> Json | None:
    """Return what a signed file holds, None where it is lost or damaged."""
    try:
        return read_signed_json(path)
    except (FileNotFoundError, UserError):
        return None


def _plan(bank: Path, old: Json, manifest: Json) -> Plan:
    """Return the plan of an older plan.json."""
    if not is_older(old):
        return Plan.from_json(old, bank)
    features, tower = old.get("features"), old.get("tower", {})
    how = {"batch_frames": tower.get("batch_frames"), "tower_threads": tower.get("threads")}
    how = {name: value for name, value in how.items() if value is not None}
    how |= {"tower": tower["name"]} if "name" in tower else {}
    how |= old.get("how", {})
    today = TowerSettings()
    filled = {
        "format_version": FORMAT_VERSION,
        "features": features and features | {"format_version": FORMAT_VERSION},
        "units": old.get("units") and [[_clip(clip) for clip in unit] for unit in old["units"]],
        "calibration": old.get("calibration"),
        "quality": old.get("quality"),
        "pruned": old.get("pruned", []),
        "decoder": old.get("decoder", READER),
        "tower": {
            "name": how.get("tower", manifest.get("provenance", {}).get("tower", today.name)),
            "batch_frames": how.get("batch_frames", today.batch_frames),
            "threads": how.get("tower_threads", today.threads),
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
    """Return a clip of an older plan without the hash of all its bytes, which is kept no more."""
    return {name: value for name, value in old.items() if name != "full_digest"}


def _commit(
    shard: Path, unit: int, fingerprint: str, listed_sha256: str | None
) -> CommitRecord | None:
    """Return today's record of a shard; None where nothing proves what the shard is."""
    old: Json = {"underflowed": None, "provenance": {}} | (_signed(done_path(shard)) or {})
    try:
        return CommitRecord.from_json(old | {"fingerprint": fingerprint}, str(done_path(shard)))
    except UserError:  # it lacks what older ones did not have
        pass
    sha256 = old.get("sha256", listed_sha256)
    if sha256 is None or not shard.exists() or file_sha256(shard) != sha256:
        return None
    return commit_of(shard, unit, fingerprint, old["underflowed"], old["provenance"])
