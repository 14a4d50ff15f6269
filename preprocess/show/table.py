"""The table of `preprocess show BANK`: how a bank was made and what is in it.

The table needs only the bank. The picture of one clip (`preprocess show BANK KEY --out page.png`, see
`picture`) also decodes the clip's video, where that still exists.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

import numpy as np

from shards.errors import UserError
from shards.format.catalogue import split_text
from shards.format.manifest import Manifest
from shards.format.quarantine import QuarantineEntry, read_quarantine
from shards.format.samples import SampleMeta
from shards.read.bank import Bank
from shards.text import in_bytes, printable, some

BAR = 32  # characters
EXAMPLES = 3
DURATIONS = {"0 s": 0, "1 s": 1, "2 s": 2, "5 s": 5, "10 s": 10, "20 s": 20, "30 s": 30}
DURATIONS |= {f"{n} min": 60 * n for n in (1, 2, 5, 10, 20, 30)} | {"1 h": 3600, "2 h": 7200}


def table(path: Path) -> str:
    """Return the table of the bank at `path`, as text for a terminal or a log."""
    bank = Bank.open(path)
    durations = bank.columns["end"] - bank.columns["start"]
    # one after the other: not all descriptions are held together
    metas = (bank.meta(row) for row in range(len(bank)))
    lines = [*facts(bank), *histogram(durations), *origins(metas)]
    return "\n".join([*lines, *quarantine(read_quarantine(path))])


def find(bank: Bank, name: str) -> int:
    """Return the catalogue row of the clip whose id or key is `name`; raises UserError if none has it."""
    keys = split_text(bank.columns, "key")
    same = [normalize(form, name) for form in ("NFC", "NFD")]  # macOS may store names as NFD
    # ids first: a clip may be called as another one's key
    for names in (bank.ids, keys):
        for asked in (name, *same):
            if asked in names:
                return names.index(asked)
    for entry in read_quarantine(bank.path):
        if entry.id in (name, *same) or entry.key == name:
            raise UserError(
                printable(
                    f"{bank.path}: {entry.id} is in quarantine: {entry.reason}: {entry.message}"
                )
            )
    within = [id_ for id_ in bank.ids if name in id_]
    close = within[:3] or get_close_matches(name, [*bank.ids, *keys], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else f" among its {len(bank)}"
    raise UserError(printable(f"{bank.path}: no clip {name}{hint}"))


def facts(bank: Bank) -> list[str]:
    """Return the lines on how the bank was made and how large it is."""
    config, manifest = bank.config, bank.manifest
    tower = f"{config.tower_type}, digest {config.tower_digest[:12]}"
    rate = f"{config.sampling.fps} frame{'s' * (config.sampling.fps != '1')}"
    many = f"{rate} per second, at most {config.sampling.max_frames}"
    if config.sampling.num_frames:
        many = f"{config.sampling.num_frames} frames of each clip, uniformly"
    if config.sampling.like:
        many += f", as {config.sampling.like}'s processor takes them"
    if config.sampling.kept:
        many += f"; of these {config.sampling.kept}, uniformly"
    lines = {
        "bank": str(bank.path),
        "tower": f"{manifest.provenance.tower} ({tower})",
        "fingerprint": config.fingerprint,
        "layer": f"{config.layer}, width {manifest.tower_width}",
        "sampling": many,
        "dtype": f"{config.dtype}, tower ran in {config.tower_dtype}, codec {config.codec}",
        "pool": config.pool,
        "clips": f"{len(bank):,}",
        "frames": f"{len(bank.columns['timestamps']):,}",
        "bytes": f"{in_bytes(bank.whole.nbytes)}, shards {len(manifest.shards):,}",
    }
    if config.derived:
        strides = ",".join(map(str, config.derived.strides))
        lines["derived"] = (
            f"from {', '.join(sources(manifest))} (strides {strides}, codec {config.derived.codec}, "
            f"fingerprint {config.derived.fingerprint[:12]})"
        )
    for stride in bank.strides:
        shapes = bank.columns[f"stride{stride}_shape"].reshape(-1, 4)
        grids = Counter(f"{rows}x{columns} cells" for _, rows, columns, _ in shapes.tolist())
        named = ", ".join(grid for grid, _ in grids.most_common(EXAMPLES)) or "no cells"
        nbytes = in_bytes(int(bank.columns[f"stride{stride}_nbytes"].sum()))
        lines[f"stride {stride}"] = f"{named}{' ...' * (len(grids) > EXAMPLES)}, {nbytes}"
        if config.codec != "none":
            lines[f"stride {stride}"] += f", {codec_quality(bank.whole, stride)}"
    return [f"{name:<12} {printable(value)}" for name, value in lines.items()]


def sources(manifest: Manifest) -> list[str]:
    """Return the paths of the banks that a bank was derived from."""
    places = {record.get("derived_from") for record in manifest.provenance.encoded}
    return sorted(str(place) for place in places if place)


def codec_quality(manifest: Manifest, stride: int) -> str:
    """Return a codec's measured compression and errors, in words."""
    measured = manifest.codec.strides[str(stride)]
    return (
        f"{measured['ratio']:.2f} of the plain bytes, cosine {measured['cosine_mean']:.5f} "
        f"(worst {measured['cosine_min']:.5f}), worst channel off by "
        f"{measured['channel_error_worst']:.1%}"
    )


def histogram(durations: np.ndarray) -> list[str]:
    """Return the lines of a histogram of the clips' durations. durations: seconds."""
    if not len(durations):
        return []
    low, middle, high = np.percentile(durations, (0, 50, 100))
    lines = [f"{'durations':<12} {low:.2f} s shortest, {middle:.2f} s median, {high:.2f} s longest"]
    # classes as people count time, not of equal width: clips of seconds and of hours are in one bank
    counts, _ = np.histogram(durations, [*DURATIONS.values(), np.inf])
    names = [*DURATIONS, "more"]
    for k in range(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1):
        # one block at least: a class with a single clip is not empty
        bar = "█" * max(int(counts[k] > 0), round(BAR * counts[k] / counts.max()))
        lines.append(f"  {names[k]:>6} to {names[k + 1]:<6}  {bar:<{BAR}}  {counts[k]:,}")
    return lines


def origins(metas: Iterable[SampleMeta]) -> list[str]:
    """Return the lines that count readers and scan flags."""
    counts: dict[str, Counter[str]] = {"readers": Counter(), "flags": Counter()}
    for meta in metas:
        counts["readers"][meta.decoder] += 1
        counts["flags"].update(meta.flags)
    return [
        f"{name:<12} {', '.join(f'{word} {n:,}' for word, n in found.most_common()) or 'none'}"
        for name, found in counts.items()
    ]


def quarantine(entries: Sequence[QuarantineEntry]) -> list[str]:
    """Return the lines on the clips that failed, by reason, the commonest first."""
    lines = [f"{'quarantine':<12} {len(entries) or 'none'}"]
    for reason, count in Counter(entry.reason for entry in entries).most_common():
        ids = [entry.id for entry in entries if entry.reason == reason]
        lines.append(printable(f"  {reason} {count:,}: {some(ids, EXAMPLES)}"))
    return lines
