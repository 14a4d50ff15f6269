"""The commands in the heads of the presets of the paper's runs, as a shell would read them."""

from pathlib import Path

from tests.commands import Command, commands

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "train" / "presets"
STAGES = [
    FOLDER / "llava_st" / f"{name}.yaml"
    for name in (
        *("content_alignment", "coordinate_alignment", "instruction_tuning"),
        *("charades_sta", "stvg", "refcoco"),
    )
]
"""In the order in which each starts from an earlier one."""
PRESETS = [*STAGES, FOLDER / "llava_video_178k.yaml"]
PROGRAMS = ("preprocess", "python", "accelerate")


def commands_of(preset: Path) -> list[Command]:
    """Return the commands in the comments above a preset's settings."""
    lines = [line[1:].strip() for line in preset.read_text().splitlines() if line.startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.split(" ", 1)[0] in PROGRAMS:
            found += commands(line)
    return found
