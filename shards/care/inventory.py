"""The small files of a bank, read even where some of them are gone or damaged."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shards.errors import UserError
from shards.format.commits import done_path, journal_path, shard_name
from shards.format.features import FORMAT_VERSION
from shards.format.plan import served_units
from shards.signed import Json, read_signed_json, signed_json

Remedy = Literal["rewrite", "encode", "restore", "remove"]
"""`rewrite`: from what is sound in the bank, without a tower. `encode`: from the video, with the
tower. `restore`: from a copy. `remove`: by `gc`, it is no part of the bank."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    file: str
    """Below the bank's folder."""
    what: str
    remedy: Remedy = "rewrite"
    key: str | None = None
    """Of the sample, None for a file as a whole."""
    part: str | None = None
    """A sample's `json`, `stride4` or `stride4_scale`; a member; a column of the catalogue."""

    def __str__(self) -> str:
        return f"{': '.join(filter(None, [self.file, self.key, self.part]))}: {self.what}"


@dataclass
class Books:
    """What a bank's small files say is in it."""

    bank: Path
    manifest: Json | None = None
    """None where it is gone or damaged."""
    plan: Json | None = None
    commits: dict[str, Json | None] = field(default_factory=dict)
    """By name of shard; None where the commit record is gone or damaged."""
    damages: list[Damage] = field(default_factory=list)

    @property
    def listed(self) -> dict[str, Json]:
        """The manifest's entries, by name of shard."""
        return {entry["name"]: entry for entry in (self.manifest or {}).get("shards", ())}

    def listed_dead(self, name: str) -> list[str]:
        """Return the keys in a shard that were served no more when the manifest was written."""
        return list((self.manifest or {}).get("superseded", {}).get(name, ()))

    @property
    def planned(self) -> dict[str, list[Json]]:
        """The plan's units, by name of shard."""
        units = (self.plan or {}).get("units", ())
        return {shard_name(number): unit for number, unit in enumerate(units)}

    @property
    def features(self) -> Json | None:
        return next((book["features"] for book in (self.plan, self.manifest) if book), None)

    def served(self) -> dict[str, int]:
        """By key, the unit whose sample of it is served: the last one that holds it."""
        assert self.plan
        return served_units(self.plan)

    def sound_commits(self) -> list[Json]:
        return [commit for _, commit in sorted(self.commits.items()) if commit]


def read_books(bank: Path) -> Books:
    """Read the manifest, the plan and the commit records, and note which of them are damaged."""
    books = Books(bank)
    if not (bank / "bank.json").exists() and not (bank / "plan.json").exists():
        raise UserError(
            f"{bank}: no bank here (neither bank.json nor plan.json); make one with `preprocess "
            f"encode INPUT --out {bank} --tower NAME`"
        )
    books.plan = _read(books, "plan.json", "restore")
    if books.plan is None and not (bank / "plan.json").exists():
        books.damages.append(Damage("plan.json", "is missing; restore it from a copy", "restore"))
    books.manifest = _read(books, "bank.json", "rewrite")
    for name, book in (("plan.json", books.plan), ("bank.json", books.manifest)):
        if book and book["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{bank / name}: format {book['format_version']}, this framebank knows up to "
                f"{FORMAT_VERSION}; update framebank"
            )
    names = {path.name for path in (bank / "shards").glob("*.tar")}
    done = {path.with_suffix(".tar").name for path in (bank / "shards").glob("*.done")}
    for name in sorted(names | done | set(books.listed)):
        path = bank / "shards" / name
        file = f"shards/{done_path(path).name}"
        if books.plan and name not in books.planned and name not in books.listed:
            books.damages.append(
                Damage(f"shards/{name}", "is of no unit of the plan; `preprocess gc`", "remove")
            )
        elif name in done:
            books.commits[name] = _read(books, file, "rewrite")
        elif name in books.listed or not journal_path(path).exists():
            books.commits[name] = None
            books.damages.append(Damage(file, "is missing"))
    _check_presence_of_manifest(books)
    return books


def _read(books: Books, name: str, remedy: Remedy) -> Json | None:
    if not (books.bank / name).exists():
        return None
    try:
        record = read_signed_json(books.bank / name)
        if signed_json(record) == (books.bank / name).read_bytes():
            return record
        raise UserError("1e-3 is not written 1E-3")
    except UserError:
        what = "does not match its own hash"
        books.damages.append(
            Damage(name, what + ("; restore it from a copy" * (remedy == "restore")), remedy)
        )
    except OSError as error:
        books.damages.append(Damage(name, f"cannot be read: {error.strerror}", remedy))
    return None


def _check_presence_of_manifest(books: Books) -> None:
    if (books.bank / "bank.json").exists():
        return
    over = books.plan is not None and set(books.planned) <= set(books.commits)
    if over or (books.bank / "index.zarr").exists():
        books.damages.append(Damage("bank.json", "is missing"))
