"""A sweep as it is written: a YAML of named runs, of which each has a few settings of its own.

    about: what LAPE is worth             # a sentence above the table
    config: train/presets/toy.yaml        # settings of every run, as --config
    settings: {bank: "${WORLD}/bank"}     # more of them; the command line's own flags win
    seeds: [0, 1, 2]                      # each run once with each
    runs:
      off: {enable_lape: false}
      long: {max_steps: 800, seeds: [0], cpu_hours: 0.2, about: twice the steps}
      tuned: {stage: long, against: long} # starts from that run's model, with the same seed; is
                                          # compared with that one, not with the baseline
    grid: {lape_sigma: [1, 2]}            # each of the runs with each value
    baseline: off                         # what the others are compared with [the first]
    test_path: "${WORLD}/test.jsonl"      # what they are evaluated on
    controls: [shuffled]                  # ... and how else: shuffled, untrained
    max_records: 0                        # ... and on how many records of it [0: all]
    cpu_hours: 0.1                        # of one run, as once measured

`${NAME}` is a variable of the environment. Runs are in the order of their seeds, then of the file.
"""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from train.settings.config import TrainConfig
from train.settings.parse import Origin, with_variables

KEYS = (
    *("about", "config", "settings", "seeds", "runs", "grid"),
    *("baseline", "test_path", "controls", "max_records", "cpu_hours"),
)
OF_A_RUN = ("about", "seeds", "stage", "cpu_hours", "against")
"""Keys of a run that are no settings."""
NOT_OF_A_RUN = {
    "seed": "list it under seeds",
    "output_dir": "runs write below that of all: OUTPUT_DIR/NAME/seed-N",
    "config": "name it at the top, for all runs",
    "plan": "give it on the command line, for all runs",
}
CONTROLS = ("shuffled", "untrained")
# a folder's name on any system, and never hidden or a flag
NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]{0,100}")

Setting = tuple[str, Any, Origin]
"""(name, as it is written, where)"""


@dataclass(frozen=True)
class Variant:
    """A run as it is named, for any seed."""

    name: str
    settings: tuple[Setting, ...] = ()
    seeds: tuple[str, ...] = ()
    """As they are written; none: the seed that all runs have."""
    stage: str = ""
    """The run that it starts from."""
    cpu_hours: float = 0.0
    """As once measured; 0 where that is not said."""
    about: str = ""
    against: str = ""
    """The run that it is compared with; empty: the baseline."""
    origin: Origin = ""


@dataclass(frozen=True)
class Sweep:
    """The runs of one file."""

    path: str
    about: str = ""
    config: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    variants: tuple[Variant, ...] = ()
    baseline: str = ""
    test_path: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    max_records: int = 0

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def in_order(self) -> list[tuple[Variant, str]]:
        """Return each run with its seed (empty: that of all): all runs of a seed before the next."""
        # all runs of a seed before the next: a sweep that is stopped early has compared all runs once
        seeds = dict.fromkeys(seed for own in self.variants for seed in own.seeds or ("",))
        return [
            (own, seed) for seed in seeds for own in self.variants if seed in (own.seeds or ("",))
        ]


def read_sweep(path: str, environ: Mapping[str, str], problems: list[str]) -> Sweep:
    """Return the sweep of a file; what is wrong with it is added to `problems`, each with its line."""
    try:
        # compose, not load: nodes keep their lines, for messages, and their texts as written
        root = yaml.compose(Path(path).read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        problems.append(f"--sweep {path}: {error.strerror}")
        return Sweep(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{path}{line} not valid YAML: {getattr(error, 'problem', error)}")
        return Sweep(path)
    return Reader(path, environ, problems).sweep(root)


@dataclass(frozen=True)
class Reader:
    """Reads the nodes of a YAML, with the line that each stands on."""

    path: str
    environ: Mapping[str, str]
    problems: list[str]

    def sweep(self, root: yaml.Node | None) -> Sweep:
        known = self.mapping(root, "expected `runs:` and other keys") if root else {}
        for key, (_, origin) in known.items():
            if key not in KEYS:
                self.problems.append(f"{origin} {key}: expected one of {', '.join(KEYS)}")
        nodes = {key: node for key, (node, _) in known.items()}
        seeds = self.words(nodes.get("seeds"))
        hours = self.number(nodes.get("cpu_hours"), "cpu_hours")
        runs = self.mapping(nodes.get("runs"), "runs: expected `name: {setting: value}` lines")
        variants = [self.variant(name, *run, seeds, hours) for name, run in runs.items()]
        grid = self.grid(nodes.get("grid"))
        # a grid without runs is a run of its own in each cell
        if grid or not variants:
            variants = [crossed(own, cell) for own in variants or [Variant("")] for cell in grid]
        if not variants:
            self.problems.append(f"{self.path}: no runs; name them under `runs` or `grid`")
        # cells have no keys of a run: they take those of the sweep
        if grid and not runs:
            variants = [replace(own, seeds=seeds, cpu_hours=hours) for own in variants]
        self.check(variants)
        baseline = self.text(nodes.get("baseline")) or (variants[0].name if variants else "")
        if variants and baseline not in {own.name for own in variants}:
            self.problems.append(f"{known['baseline'][1]} baseline: no run is called {baseline}")
        controls = self.words(nodes.get("controls"))
        for word in set(controls) - set(CONTROLS):
            self.problems.append(
                f"{known['controls'][1]} controls: {word}; expected {', '.join(CONTROLS)}"
            )
        common = self.mapping(nodes.get("settings"), "settings: expected some")
        return Sweep(
            path=self.path,
            about=self.text(nodes.get("about")),
            config=self.words(nodes.get("config")),
            settings=self.settings(self.without_keys(common)),
            variants=tuple(variants),
            baseline=baseline,
            test_path=self.words(nodes.get("test_path")),
            controls=controls,
            max_records=int(self.number(nodes.get("max_records"), "max_records", whole=True)),
        )

    def variant(
        self, name: str, node: yaml.Node, origin: Origin, seeds: tuple[str, ...], hours: float
    ) -> Variant:
        """Return a run of `runs`; seeds, hours: those of all."""
        own = self.mapping(node, f"{name}: expected settings")
        nodes = {key: own.pop(key)[0] for key in OF_A_RUN if key in own}
        own = self.without_keys(own)
        for key, (_, where) in own.items():
            if key in NOT_OF_A_RUN:
                self.problems.append(f"{where} {key}: {NOT_OF_A_RUN[key]}")
        return Variant(
            name=name,
            settings=self.settings(own),
            seeds=self.words(nodes["seeds"]) if "seeds" in nodes else seeds,
            stage=self.text(nodes.get("stage")),
            cpu_hours=self.number(nodes.get("cpu_hours"), f"{name} cpu_hours") or hours,
            about=self.text(nodes.get("about")),
            against=self.text(nodes.get("against")),
            origin=origin,
        )

    def grid(self, node: yaml.Node | None) -> list[tuple[Setting, ...]]:
        """Return the settings of each cell of a grid, the last one's values changing fastest."""
        axes = []
        cells = self.without_keys(self.mapping(node, "grid: expected settings"))
        for name, (values, origin) in cells.items():
            if name in NOT_OF_A_RUN:
                self.problems.append(f"{origin} {name}: {NOT_OF_A_RUN[name]}")
            elif not isinstance(values, yaml.SequenceNode) or not values.value:
                self.problems.append(f"{origin} {name}: expected a list of values to try")
            else:
                axes.append([(name, self.value(item), origin) for item in values.value])
        return list(itertools.product(*axes)) if axes else []

    def check(self, variants: Sequence[Variant]) -> None:
        above: set[str] = set()
        for own in variants:
            if own.name and not NAME.fullmatch(own.name):
                self.problems.append(
                    f"{own.origin or self.path} {own.name!r}: a run's name is a folder's: letters, "
                    "digits and . , = + - _ (name the run under `runs` where a value has others)"
                )
            if own.name in above:
                self.problems.append(f"{own.origin or self.path} {own.name}: two runs of this name")
            # above, not anywhere: runs are taken in this order, and circles cannot arise
            if own.stage and own.stage not in above:
                self.problems.append(
                    f"{own.origin} stage: {own.stage} is no run above {own.name}, whose model it "
                    "would start from"
                )
            if own.against and own.against not in {other.name for other in variants}:
                self.problems.append(f"{own.origin} against: no run is called {own.against}")
            above.add(own.name)

    # -- nodes

    def mapping(self, node: yaml.Node | None, expected: str) -> dict[str, tuple[yaml.Node, Origin]]:
        """Return key -> (value, where); nothing where the node is empty."""
        found: dict[str, tuple[yaml.Node, Origin]] = {}
        if node is None or is_empty(node):
            return found
        if not isinstance(node, yaml.MappingNode):
            self.problems.append(f"{self.origin(node)} {expected}")
            return found
        for key, value in node.value:
            # YAML itself would keep the last one without a word
            if str(key.value) in found:
                self.problems.append(f"{self.origin(key)} {key.value}: there already")
            found[str(key.value)] = value, self.origin(key)
        return found

    def without_keys(
        self, found: Mapping[str, tuple[yaml.Node, Origin]]
    ) -> dict[str, tuple[yaml.Node, Origin]]:
        """Return what may be settings: keys of a sweep that stand among them, or slips of one, are
        problems, which the nearest setting would not explain."""
        left, settings = dict(found), [item.name for item in fields(TrainConfig)]
        for name, (_, origin) in found.items():
            words = [*settings, *OF_A_RUN, *KEYS]
            close = difflib.get_close_matches(name.lower(), words, n=1, cutoff=0.7)
            if name in (*settings, *NOT_OF_A_RUN) or not close or close[0] in settings:
                continue
            place = "of a run, under `runs`" if close[0] in OF_A_RUN else "at the top of the file"
            slip = f"unknown setting; did you mean {close[0]}, a key {place}?"
            said = f"no setting, a key {place}" if name == close[0] else slip
            self.problems.append(f"{origin} {name}: {said}")
            del left[name]
        return left

    def settings(self, found: Mapping[str, tuple[yaml.Node, Origin]]) -> tuple[Setting, ...]:
        return tuple((name, self.value(node), origin) for name, (node, origin) in found.items())

    def value(self, node: yaml.Node) -> str | list[str]:
        return list(self.words(node)) if isinstance(node, yaml.SequenceNode) else self.text(node)

    def words(self, node: yaml.Node | None) -> tuple[str, ...]:
        """Return a list's texts, or the one that stands in its place."""
        if node is None or is_empty(node):
            return ()
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(self.text(item) for item in items)

    def text(self, node: yaml.Node | None) -> str:
        if node is None or is_empty(node):
            return ""
        if not isinstance(node, yaml.ScalarNode):
            self.problems.append(f"{self.origin(node)} expected a value, got a list or a mapping")
            return ""
        text, lacking = with_variables(str(node.value), self.environ)
        self.problems.extend(f"{self.origin(node)} {line}" for line in lacking)
        return text

    def number(self, node: yaml.Node | None, what: str, *, whole: bool = False) -> float:
        text = self.text(node)
        try:
            found = float(int(text) if whole else text) if text else 0.0
        except ValueError:
            found = -1.0
        if node is not None and not 0 <= found < float("inf"):
            kind = "a whole number" if whole else "a number"
            self.problems.append(f"{self.origin(node)} {what}: expected {kind}, got {text!r}")
        return max(found, 0.0)

    def origin(self, node: yaml.Node) -> Origin:
        return f"{self.path}:{node.start_mark.line + 1}"


def is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def crossed(run: Variant, cell: tuple[Setting, ...]) -> Variant:
    """Return a run with the settings of a cell of the grid, and a name that says them."""
    words = [f"{name}={'+'.join(v) if isinstance(v, list) else v}" for name, v, _ in cell]
    name = ",".join(filter(None, [run.name, *words]))
    return replace(run, name=name, settings=(*run.settings, *cell))
