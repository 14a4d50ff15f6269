"""`make bench`: each benchmark prints a table and writes bench-results/<name>.json.

python -m tests.bench            # all
python -m tests.bench training   # one
"""

import importlib
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    known = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(unknown)}; have {', '.join(known)}")
    out = Path("bench-results")
    out.mkdir(exist_ok=True)
    for name in names or known:
        print(f"== {name}", flush=True)
        rows = importlib.import_module(f"tests.bench.{name}").run()
        machine = {"cores": os.cpu_count(), "machine": platform.machine()}
        (out / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))
        print(table(rows), flush=True)


def table(rows: list[dict[str, object]]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [header] + [[_shown(row.get(key, "")) for key in header] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])
