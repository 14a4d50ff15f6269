"""How a dataset's records are read: the settings, its own entry, and the banks that it draws on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from shards.annotations import forms
from shards.annotations.fault import RowError
from shards.annotations.files import annotation_files, suffix_of
from shards.read.banks import Banks, Place
from shards.read.timeline import Timeline, timeline_of
from shards.signed import canonical_json
from train.data.coordinates import resolved
from train.data.known.sealed import code_digest, versions
from train.data.mixtures import MixturePart
from train.data.records import Record, join, made_independent, parse_record
from train.settings.config import DataSettings

ELSEWHERE = {
    *("bank", "data_path", "data_config", "data_mixture", "splice_path", "splice", "eval_path"),
    *("augment", "mm_spatial_pool_stride", "fast_stride", "media_dir", "strip_prefix", "turns"),
}
"""Settings that decide nothing here, or by way of the entry, the banks, and `independent` alone."""
CODE = ("shards", "train/data", "train/settings")
"""The folders of the code that reads records."""


@dataclass(frozen=True)
class Manner:
    """All that decides what is read of a file, beside the file itself and our code."""

    settings: DataSettings
    part: MixturePart
    banks: Banks
    independent: bool
    """Whether its records have independent turns."""

    def record(self, where: str, row: Any) -> Record:
        """Return the record of a sound row, as reading the whole file finds it."""
        settings, part = self.settings, self.part
        outside, ignored = settings.allow_outside, settings.ignore_fields
        record = parse_record(
            row, where, allow_outside=outside, ignored=ignored, folders=part.folders
        )
        problems: list[str] = []
        joined = join([record], self.banks, settings.missing, problems, folders=part.folders)
        assert joined, (where, problems)
        record, _, faults = finished(joined[0], settings, independent=self.independent)
        assert not faults, faults
        return record

    def key(self, path: str, digest: str) -> str | None:
        """Return a digest of all that decides what reading a file finds; None for code that is not ours.

        digest: `file_digest` of the file and the choice of its rows.
        """
        # a form that a user has added
        if any(form.__module__ != forms.__name__ for form in forms.FORMS.values()):
            return None
        files = annotation_files(Path(path))
        parquet = any(suffix_of(file) == ".parquet" for file in files)
        names = [item.name for item in fields(DataSettings) if item.name not in ELSEWHERE]
        facts = {
            "code": code_digest(*CODE),
            "versions": versions(["numpy", *["pyarrow"] * parquet]),
            "path": path,  # records are named by their path and line
            "files": [[str(file), file.stat().st_size] for file in files],
            "digest": digest,
            "chosen": repr(self.part.chosen),
            "folders": repr(self.part.folders),
            "independent": self.independent,
            "settings": {name: getattr(self.settings, name) for name in names},
            "banks": [bank_digest(bank.columns) for bank in self.banks.banks],
            "quarantined": sorted(self.banks.quarantined()),
        }
        return blake2b(canonical_json(facts), digest_size=16).hexdigest()


def bank_digest(columns: Any) -> str:
    """Return a digest of the ids and times of a bank's clips, in their order."""
    digest = blake2b(digest_size=16)
    for name in ("id", "id_offsets", "start", "end"):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def finished(
    record: Record, settings: DataSettings, *, independent: bool
) -> tuple[Record, bool, Sequence[RowError]]:
    """Return (record that was joined to its clips, ready for use; whether a span was clipped; faults)."""
    try:
        record = joined_on_timeline(made_independent(record) if independent else record)
    except RowError as error:
        return record, False, [error.at(record.where, record.id)]
    seconds = [seconds_of(place) for place in record.places]
    return resolved(record, seconds, clip=settings.times_past_end == "clip")


def seconds_of(place: Place | Timeline) -> float:
    """Return the duration of a medium."""
    return place.duration if isinstance(place, Place) else place.clip().info.duration


def joined_on_timeline(record: Record) -> Record:
    """Return a record with its clips joined to one medium, if it has a timeline."""
    if not record.cuts:
        return record
    places = [place for place in record.places if isinstance(place, Place)]
    return replace(record, places=(timeline_of(places, record.cuts),))
