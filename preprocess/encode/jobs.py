"""What decoders are asked for: the clips of a unit, and those that a new bank's first unit will have.

    decoders.begin(first_jobs(clips, options), options.batch_frames)   # while the tower is loaded
    jobs = jobs_of(unit, options, tower.pixels)        # once it is; equal ones may be decoded already

Importing this module does not import torch.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile
from types import SimpleNamespace

from model.tower.pixels import Pixels
from preprocess.encode.features import EncodeOptions
from preprocess.encode.pipeline.decoders import Job
from preprocess.encode.tower import tower_folder
from shards.errors import UserError
from shards.format.plan import ClipSource

PARTS_AHEAD = 64
"""Later parts of the same file that a decoder is given, in case it must read the file from its start."""
FORETOLD = 1000
"""Clips of a new bank whose jobs are foretold; far fewer are decoded before the tower is there."""
PROCESSOR_FILE = "preprocessor_config.json"


def jobs_of(
    sources: Sequence[ClipSource], options: EncodeOptions, pixels: Pixels | None
) -> list[Job]:
    """Return the jobs of clips, in their order. pixels: the tower's resizing."""
    return [
        (
            source,
            replace(
                options.request(source, pixels),
                next_parts=_next_parts(source, sources[place + 1 : place + 1 + PARTS_AHEAD]),
            ),
        )
        for place, source in enumerate(sources)
    ]


def _next_parts(
    source: ClipSource, following: Sequence[ClipSource]
) -> tuple[tuple[float | None, float | None], ...]:
    """Return the parts of the same file that directly follow a part."""
    file = source.path, source.offset
    same = takewhile(lambda other: (other.path, other.offset) == file, following)
    return tuple((other.start, other.end) for other in same)


def first_jobs(clips: Sequence[ClipSource], options: EncodeOptions) -> list[Job]:
    """Return the jobs that the first unit of a new bank of these clips most likely begins with.

    They come before the tower is loaded, so its resizing is taken from its files; whoever knows it better
    asks for other jobs, and these are dropped. Members of archives are left out: they are unpacked to the
    bank's disk, where there is no folder yet.
    """
    pixels = likely_pixels(options)
    if pixels is None:
        return []
    plain = takewhile(lambda clip: clip.offset is None, clips)
    return jobs_of(list(islice(plain, FORETOLD)), options, pixels)


def likely_pixels(options: EncodeOptions) -> Pixels | None:
    """Return how a tower's image processor resizes, by its file alone; None if that does not say it."""
    folder = tower_folder(options.tower)
    if folder is None:
        return None
    try:
        written = json.loads((folder / PROCESSOR_FILE).read_text())
        pixels = Pixels.from_processor(SimpleNamespace(**written))
        return pixels.fitted(options.fit) if options.fit else pixels
    # a file of another shape, of an older transformers or of a tower that resizes in another way: what is
    # wrong with it, if anything, is told by who loads the tower
    except (OSError, ValueError, TypeError, AttributeError, LookupError, UserError):
        return None
