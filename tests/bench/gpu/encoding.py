"""`preprocess encode` with a random SigLIP-so400m beside its slowest stage alone.

Wall seconds a frame of a whole run (start-up taken off by a run of few clips), over the largest of
decode / decoders, tower and write as `preprocess bench` measures them. Clips: the same ten seconds of
H.264 at 640x360.

python -m tests.bench.gpu.encoding [--small]
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from preprocess.encode.bench import measure_pace
from preprocess.encode.features import EncodeOptions, load_tower
from preprocess.sources.find import find_clips
from preprocess.sources.probe import probe
from shards.format.features import Sampling
from tests.bench.decode import draw
from tests.bench.gpu.shapes import tower_shape

FRAMES = 16


def main(small: bool) -> list[dict[str, Any]]:
    few, many = (1, 3) if small else (8, 136)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        config = SiglipVisionConfig(**tower_shape(small), vision_use_head=False)
        SiglipVisionModel(config).save_pretrained(place / "tower")
        size = {"height": config.image_size, "width": config.image_size}
        SiglipImageProcessorPil(size=size).save_pretrained(place / "tower")
        drawn = draw(place / "drawn.mp4")
        for name, count in (("few", few), ("many", many)):
            (place / name).mkdir()
            for number in range(count):
                shutil.copy(drawn, place / name / f"{number:03}.mp4")
        seconds = {name: encode(place, name) for name in ("few", "many")}
        options = EncodeOptions(
            tower=str(place / "tower"), strides=(4, 8), sampling=Sampling(num_frames=FRAMES)
        )
        tower = load_tower(options)
        clips = probe(find_clips([str(place / "few")]).clips, {}, options.sampling)
        pace = measure_pace(clips, tower, options, place, most=few, cores=os.cpu_count() or 1)
    frame = (seconds["many"] - seconds["few"]) / ((many - few) * FRAMES)
    slowest = max(pace.decode / pace.decoders, pace.tower, pace.write)
    return [
        {
            "what": "encode so400m: wall over the slowest stage alone (bar 1.15)",
            "value": frame / slowest,
            "note": f"{1 / frame:.0f} frames/s; ms a frame: decode {pace.decode * 1e3:.1f}, tower "
            f"{pace.tower * 1e3:.1f}, write {pace.write * 1e3:.2f}; {pace.decoders} decoders would do",
        }
    ]


def encode(place: Path, name: str) -> float:
    """Return the wall seconds of encoding a folder."""
    began = time.perf_counter()
    flags = [
        "--out",
        f"{place / name}-bank",
        "--tower",
        str(place / "tower"),
        "--frames",
        str(FRAMES),
    ]
    command = [sys.executable, "-m", "preprocess", "encode", str(place / name), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(main("--small" in sys.argv)))
