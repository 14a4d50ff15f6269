"""What `tests.bench.encoding` runs in processes of their own: peers, and our stages alone.

python -m tests.bench._encoding loop TOWER FRAMES DTYPE OUT CLIP...     # a plain loop
python -m tests.bench._encoding loader TOWER FRAMES DTYPE OUT CLIP...   # a DataLoader that decodes
python -m tests.bench._encoding mixed TOWER FRAMES DTYPE OUT CLIP...    # batches of several clips' frames
python -m tests.bench._encoding stages TOWER FRAMES DTYPE OUT CLIP...   # prints their CPU seconds as JSON
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

STRIDES = (4, 8)
MIXED = 256
T = TypeVar("T")


class Decoded(torch.utils.data.Dataset[torch.Tensor]):
    """Clips -> what the tower takes of them, by decord and transformers' processor."""

    def __init__(self, tower: str, frames: int, clips: list[str]) -> None:
        from transformers import AutoImageProcessor

        self.frames, self.clips = frames, clips
        self.processor = AutoImageProcessor.from_pretrained(tower)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: int) -> torch.Tensor:
        import decord

        reader = decord.VideoReader(self.clips[place], num_threads=1)
        index = np.linspace(0, len(reader) - 1, min(self.frames, len(reader))).round().astype(int)
        pictures = reader.get_batch(index.tolist()).asnumpy()
        del reader
        pixels: torch.Tensor = self.processor(images=list(pictures), return_tensors="pt")[
            "pixel_values"
        ]
        return pixels


def loop(tower: str, frames: int, dtype: str, out: Path, clips: list[str]) -> None:
    """Decode, process, encode, pool and save a clip at a time, as everybody's first script does."""
    decoded = Decoded(tower, frames, clips)
    model = vision(tower, dtype)
    for k, clip in enumerate(clips):
        torch.save(pooled(model, decoded[k]), out / f"{Path(clip).stem}.pt")


def loader(tower: str, frames: int, dtype: str, out: Path, clips: list[str]) -> None:
    """Do the same with a core's worth of workers that decode ahead, as the second script does."""
    ahead, model = decoded_ahead(tower, frames, clips), vision(tower, dtype)
    for clip, pixels in zip(clips, ahead, strict=True):
        torch.save(pooled(model, pixels), out / f"{Path(clip).stem}.pt")


def mixed(tower: str, frames: int, dtype: str, out: Path, clips: list[str]) -> None:
    """Fill batches of one size with frames of several clips, and write an archive of arrays.

    The scheme of clip-video-encode: readers of their own, `MIXED` frames a batch, WebDataset files.
    """
    import webdataset

    ahead, model = decoded_ahead(tower, frames, clips), vision(tower, dtype)
    lengths, waiting, done = [], torch.empty(0), []
    for pixels in ahead:
        lengths.append(len(pixels))
        waiting = torch.cat([waiting, pixels]) if len(waiting) else pixels
        while len(waiting) >= MIXED:
            done.append(pooled(model, waiting[:MIXED]))
            waiting = waiting[MIXED:]
    if len(waiting):
        done.append(pooled(model, waiting))
    with webdataset.TarWriter(str(out / "features.tar")) as writer:
        parts = {s: torch.cat([one[s] for one in done]).split(lengths) for s in STRIDES}
        for k, clip in enumerate(clips):
            arrays = {f"{s}.npy": parts[s][k].numpy() for s in STRIDES}
            writer.write({"__key__": Path(clip).stem, **arrays})


def decoded_ahead(tower: str, frames: int, clips: list[str]) -> Iterable[torch.Tensor]:
    workers = len(os.sched_getaffinity(0))
    decoded = Decoded(tower, frames, clips)
    return torch.utils.data.DataLoader(decoded, batch_size=None, num_workers=workers)


def vision(tower: str, dtype: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(tower, dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def pooled(model: Any, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the cells of each frame, by stride, of the last hidden state but one."""
    output = model(pixel_values=pixels.to(model.dtype), output_hidden_states=True)
    patches = output.hidden_states[-2][:, 1:].float().transpose(1, 2)
    side = round(patches.shape[2] ** 0.5)
    planes = patches.unflatten(2, (side, side))
    return {s: F.avg_pool2d(planes, s, s, ceil_mode=True).half() for s in STRIDES}


def stages(tower: str, frames: int, dtype: str, out: Path, clips: list[str]) -> dict[str, float]:
    """Return the CPU seconds of decoding, tower and writing, one after the other, start-up left out."""
    from preprocess.decode.decode_child import DecodeChild
    from preprocess.decode.source import SourceReader
    from preprocess.encode.features import (
        EncodeOptions,
        describe,
        encode_frames,
        feature_config,
        load_tower,
    )
    from preprocess.sources.find import find_clips
    from shards.format.features import Sampling
    from shards.write.shard import ShardWriter

    options = EncodeOptions(tower, STRIDES, Sampling(num_frames=frames), tower_dtype=dtype)
    loaded = load_tower(options)
    sources = find_clips(clips).clips
    encode_frames(loaded, np.zeros((1, 224, 224, 3), np.uint8), options)  # loads kernels
    spent = dict.fromkeys(("decode", "tower", "write"), 0.0)

    def clocked(stage: str, pid: int | None, work: Callable[[], T]) -> T:
        clocks = [time.CLOCK_PROCESS_CPUTIME_ID] + ([~pid << 3 | 2] if pid else [])
        began = sum(map(time.clock_gettime, clocks))
        found = work()
        spent[stage] += sum(map(time.clock_gettime, clocks)) - began
        return found

    fingerprint = feature_config(loaded, options).fingerprint
    with (
        SourceReader(DecodeChild(), out) as reader,
        ShardWriter(out / "shards" / "bank-000000.tar", 0, fingerprint) as writer,
    ):
        for source in sources:
            request = options.request(source, loaded.pixels)
            reader.child.ensure_running()
            pid = reader.child.pid
            outcome = clocked("decode", pid, lambda s=source, r=request: reader.read(s, r))
            clip = outcome.clip
            assert clip, outcome.error
            arrays, lost = clocked(
                "tower", None, lambda c=clip: encode_frames(loaded, c.frames, options)
            )
            meta = describe(source, outcome, clip, loaded, arrays)
            clocked(
                "write",
                None,
                lambda k=source.key, m=meta, a=arrays, n=lost: writer.write(k, m, a, n),
            )
        clocked("write", None, writer.commit)
    return spent


if __name__ == "__main__":
    what, tower, frames, dtype, out, *clips = sys.argv[1:]
    run = {"loop": loop, "loader": loader, "mixed": mixed, "stages": stages}[what]
    print(json.dumps(run(tower, int(frames), dtype, Path(out), clips)))
