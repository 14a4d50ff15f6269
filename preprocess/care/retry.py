"""`preprocess retry`: try the clips in a bank's quarantine once more, into new shards.

    summary = retry(Path("bank"), tower=None, device="cuda")

Existing shards are not changed. A clip that succeeds is removed from the quarantine; one that fails
stays, with one more attempt.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocess.encode.features import (
    EncodeOptions,
    feature_config,
    plan_codec,
    predicted_bytes,
)
from preprocess.encode.pipeline.summary import Summary
from preprocess.encode.planning import calibrated
from preprocess.encode.tower import Loading, refuse_other_device
from preprocess.encode.unit import Encoder
from preprocess.sources.find import clips_under
from preprocess.sources.members import archive_members
from preprocess.sources.probe import probe
from shards.errors import UserError, disk_errors
from shards.format.commits import (
    committed,
    read_commits,
    refuse_missing_shards,
    refuse_unplanned_shards,
)
from shards.format.manifest import TowerFacts
from shards.format.plan import (
    ClipSource,
    Plan,
    cut_units,
    planned,
    refuse_derived,
    refuse_other_features,
    refuse_other_reader,
    write_plan,
)
from shards.write.finish import failed_clips, finish, is_finished
from shards.write.lease import Leases, holders
from shards.write.lock import folder_lock


def retry(bank: Path, tower: str | None = None, roots: Sequence[str] = (), **how: Any) -> Summary:
    """Encode the failed clips once more. how: the `EncodeOptions` that are not part of the plan.

    tower: its current path or name, if it was moved; another tower is refused. roots: folders to search
    for videos that were moved.
    """
    planned(bank, "no bank to retry")  # first, because the lock would create a missing folder
    with disk_errors(bank), folder_lock(bank, "preprocess retry"):
        return _retry(bank, tower, roots, how)


def _retry(bank: Path, tower: str | None, roots: Sequence[str], how: dict[str, Any]) -> Summary:
    plan = planned(bank)
    refuse_unplanned_shards(bank, plan)
    commits = read_commits(bank, plan)
    failed = failed_clips(bank, plan, commits)
    # A killed retry leaves an unfinished unit at the plan's end, of clips that are all in the quarantine
    # still: they are put into new units below.
    plan = without_cut_off_retry(bank, plan, set(failed))
    refuse_missing_shards(bank, plan)
    # a unit that is not made is encode's to make: its clips have not failed
    if not all(committed(bank, unit) for unit in range(len(plan.units))):
        raise UserError(
            f"{bank}: its run is not finished; finish `preprocess encode` before a retry"
        )
    refuse_derived(bank, plan.features)
    sources = [clip for clip in plan.clips if clip.id in failed]
    if not sources:
        if not is_finished(bank, plan, commits):
            finish(bank, plan, TowerFacts.of(plan, commits), commits=commits)
        return Summary()
    refuse_other_reader(bank, plan)
    features = plan.features
    if tower:
        how["tower"] = tower
    options = EncodeOptions.of_plan(plan, **how)
    loaded, options = Loading(options).tower()
    refuse_other_features(bank, feature_config(loaded, options), features)
    refuse_other_device(bank, plan, options)
    # probed as new ones: they may have been replaced since they failed
    sources = probe(relocated(clips_under(sources, roots)), {}, features.sampling)
    plan = calibrated(bank, plan, loaded, options)
    codec = plan_codec(plan)
    with (
        Encoder(bank, features, loaded, options, codec, failed=failed, retried=True) as encoder,
        Leases(bank, "preprocess retry") as leases,
    ):
        encoder.bar.total = len(sources)
        for clips in cut_units(sources, options.shard_bytes, predicted_bytes(loaded, options)):
            unit, longer = len(plan.units), replace(plan, units=[*plan.units, clips])
            with closing(leases.left([unit])) as left:
                for lease in left:
                    write_plan(
                        bank, longer
                    )  # only after the lease: no other worker can take the unit
                    if not encoder.encode_unit(lease, clips, keep_empty=False):
                        break
            if committed(bank, unit):
                plan = longer
            # of a retry that was killed, or paused for so long that it counted as such: without this
            # unit in the plan the shard would be of none
            elif maker := holders(bank).get(unit):
                raise UserError(
                    f"{maker} makes the unit of these clips",
                    where=bank,
                    fix="wait for its end, and run the same command again",
                )
        # without the unit that had no clip
        write_plan(bank, plan)
        finish(bank, plan, loaded, encoder.summary.failures)
    return encoder.summary


def without_cut_off_retry(bank: Path, plan: Plan, failed: set[str]) -> Plan:
    """Return the plan without a killed retry's unfinished unit: all its clips had failed before."""
    units = list(plan.units)
    while units and not committed(bank, len(units) - 1) and {c.id for c in units[-1]} <= failed:
        units.pop()
    return replace(plan, units=units)


def relocated(sources: Sequence[ClipSource]) -> list[ClipSource]:
    """Return the clips with the current offsets of members in their archives."""
    archives = {source.path for source in sources if source.offset is not None}
    members = {
        (path, member.name): member
        for path in archives
        if Path(path).is_file()
        for member in archive_members(Path(path))[0]
    }
    found = []
    for source in sources:
        # an archive that was packed once more has its members at other offsets
        member = members.get((source.path, source.relative))
        found.append(
            replace(source, offset=member.offset, nbytes=member.nbytes) if member else source
        )
    return found
