"""Write index files beside the shards for other readers; nothing is copied.

The shards are plain WebDataset. On every node and in every worker, each sample once over all:

    files = sorted(glob.glob("bank/shards/*.tar"))
    clips = webdataset.WebDataset(files, nodesplitter=webdataset.split_by_node, shardshuffle=False)
    loader = webdataset.WebLoader(clips.decode(), batch_size=None, num_workers=2)

A sample is a dict of `__key__`, `json` and, per stride, `strideS.npy` (with codec int8
`strideS_scale.npy` too; blosc holds compressed bytes, which `shards.format.codec.Codec` decodes). There
should be as many shards as workers over all nodes, at least.
"""

import json
from pathlib import Path

from shards.errors import UserError, disk_errors
from shards.format.commits import index_path
from shards.format.manifest import Manifest, ShardEntry, read_manifest
from shards.signed import write_atomic

CARD = "<!-- written by `preprocess export hf` -->"


def write_wids(bank: Path) -> Path:
    """Write `wids.json`, by which `wids.ShardListDataset` reads samples by their number."""
    manifest = read_manifest(bank)
    shards = [
        {
            "url": f"shards/{shard.name}",
            "nsamples": samples_in(bank, shard),
            "filesize": shard.nbytes,
        }
        for shard in manifest.shards
    ]
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": manifest.fingerprint,
        "shardlist": [shard for shard in shards if shard["nsamples"]],
    }
    path = bank / "wids.json"
    with disk_errors(bank):
        write_atomic(path, json.dumps(index, indent=2).encode() + b"\n")
    return path


def samples_in(bank: Path, shard: ShardEntry) -> int:
    """Return the number of samples in a shard, served or not, by its `.idx`."""
    # the index has one offset for each sample and one for the end, 8 bytes each
    path = index_path(bank / "shards" / shard.name)
    if not path.exists():
        raise UserError("is missing", where=path, fix=f"run `preprocess repair {bank}`")
    return path.stat().st_size // 8 - 1


def write_hf(bank: Path) -> Path:
    """Write a dataset card, with which `datasets.load_dataset(BANK)` reads shards, streaming or not."""
    manifest = read_manifest(bank)
    if not manifest.shards:
        raise UserError("no clip is banked, so there is nothing to load", where=bank)
    path = bank / "README.md"
    # a README that somebody wrote about the bank is not ours to replace
    if path.exists() and CARD not in path.read_text("utf-8"):
        raise UserError(
            "exists and was not written by framebank", where=path, fix="move it and run again"
        )
    with disk_errors(bank):
        write_atomic(path, card(manifest).encode())
    return path


def card(manifest: Manifest) -> str:
    """Return the text of a bank's dataset card."""
    features = manifest.features
    strides = features.strides
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: shards/*.tar
---
{CARD}
# Frozen vision features of {manifest.clips} video clips

`{features.tower_type}`, hidden layer {features.layer}, {features.pool} pooling over
{" and ".join(f"{stride}x{stride}" for stride in strides)} patches, {features.dtype}, codec
{features.codec}; {manifest.frames} frames, {manifest.nbytes / 1e9:.2f} GB. Fingerprint
`{manifest.fingerprint}`. Made by framebank.

```python
clips = datasets.load_dataset(BANK, split="train", streaming=True).with_format("numpy")
for clip in clips:
    clip["json"]["id"], clip["stride{strides[0]}.npy"]  # frames x rows x columns x channels
```

Without `streaming=True` the same, once all is copied into Arrow files. `datasets` gives arrays as
lists unless asked for NumPy, with floats as float32 and whole numbers as int64: no value changes.
"""
