"""The tables and the summary of `moe_layer.py`, from its JSON document.

    python benchmarks/moe_report.py RUN.json [RUN.json...]

prints those of several runs together (of one machine and commit, for example parts of the grid).
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_peers import BUILDERS, PEERS

TABLE = ("dtype", "pass", "threads")
CELL = ("T", "E", "k", "routing")
MARGIN = 1.03
"""Slower than the best peer means by more than this."""
LIMIT = 1.10
"""Above the limit means more than this times dense, at T = 4096 and E <= 64."""

Rows = dict[str, dict[str, Any]]
Cells = dict[tuple[Any, ...], Rows]


NOISE_MB = 1.0
"""Resident memory of equal passes differs by this much."""


def cells_of(document: dict[str, Any]) -> Cells:
    """{(dtype, pass, threads, T, E, k, routing): {implementation: row}} in the order of tables."""
    cells: Cells = {}
    for row in document["rows"]:
        cells.setdefault(tuple(row[field] for field in TABLE + CELL), {})[row["impl"]] = row
    return dict(sorted(cells.items(), key=lambda item: (item[0][:3], item[0][3:])))


def ratio(rows: Rows, over: str, under: str, field: str = "seconds") -> float | None:
    """`over` divided by `under`, if both were measured."""
    values = [rows.get(name, {}).get(field) for name in (over, under)]
    return values[0] / values[1] if values[0] and values[1] else None


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(cells: Cells, columns: list[str], value: Callable[[Rows, str], str]) -> None:
    """Markdown, one for each dtype, pass and number of threads."""
    for head, group in itertools.groupby(cells.items(), key=lambda item: item[0][:3]):
        print("\n" + ", ".join(f"{field} {part}" for field, part in zip(TABLE, head)) + "\n")
        print("| T | E | k | routing | max/mean load | " + " | ".join(columns) + " |")
        print("|---|---|---|---|---|" + "---|" * len(columns))
        for key, rows in group:
            load = next(iter(rows.values()))["load_max_over_mean"]
            numbers = [value(rows, column) for column in columns]
            print(f"| {' | '.join(map(str, key[3:]))} | {load:.1f} | {' | '.join(numbers)} |")


def named(key: tuple[Any, ...]) -> str:
    """A cell in one line."""
    return ", ".join(f"{field} {part}" for field, part in zip(TABLE + CELL, key))


def listed(title: str, found: Iterable[str], of: int) -> None:
    """One point of the summary."""
    found = list(found)
    print(f"\n{title}: {len(found)} of {of}")
    for line in found:
        print(f"- {line}")


def against(cells: Cells, names: Iterable[str], margin: float) -> list[str]:
    """Cells in which ours takes more than `margin` times the fastest of `names`."""
    found = []
    for key, rows in cells.items():
        times = {n: rows[n]["seconds"] for n in names if n in rows and rows[n]["seconds"]}
        best = min(times, key=times.__getitem__, default=None)
        quotient = ratio(rows, "growmoe", best) if best else None
        if quotient and quotient > margin:
            found.append(f"{named(key)}: {quotient:.2f} x {best}")
    return found


def chosen(cells: Cells, condition: Callable[[dict[str, Any]], bool]) -> Cells:
    """The cells whose fields satisfy a condition."""
    return {k: rows for k, rows in cells.items() if condition(dict(zip(TABLE + CELL, k)))}


def summary(cells: Cells) -> None:
    """Where ours does not win, and with which number."""
    many, few = (
        chosen(cells, lambda c: c["T"] == 4096 and c["E"] <= 64),
        chosen(cells, lambda c: c["E"] == 128 and c["T"] <= 256),
    )
    listed(f"Slower than the best peer by more than {MARGIN - 1:.0%}",
           against(cells, PEERS, MARGIN), len(cells))  # fmt: skip
    listed(f"T = 4096 and E <= 64 above {LIMIT:.2f} x dense",
           against(many, ["dense"], LIMIT), len(many))  # fmt: skip
    everyone = [name for name in BUILDERS if name not in ("growmoe", "dense", "dense_onednn")]
    listed("E = 128 and T <= 256, not the fastest", against(few, everyone, 1.0), len(few))
    listed("Slower than onehot", against(cells, ["onehot"], 1.0), len(cells))
    fewest = min((key[2] for key in cells), default=1)
    once = chosen(cells, lambda c: c["threads"] == fewest)
    larger = []
    for key, rows in once.items():
        ours, theirs = (rows.get(n, {}).get("peak_mb") for n in ("growmoe", "hf_grouped_mm"))
        if ours is not None and theirs is not None and ours > theirs + NOISE_MB:
            larger.append(f"{named(key)}: {ours:.1f} MB, hf_grouped_mm {theirs:.1f} MB")
    listed(f"Peak memory more than {NOISE_MB:.0f} MB above hf_grouped_mm", larger, len(once))


def report(document: dict[str, Any]) -> None:
    """All tables, then the summary."""
    cells, names = cells_of(document), document["config"]["impl"]
    print("Time as a multiple of the dense MLP of equal FLOPs")
    table(cells, names, lambda rows, name: shown(rows.get(name, {}).get("ratio_to_dense")))
    print("\nPeak memory of one pass in MB, beside weights and input")
    fewest = min((key[2] for key in cells), default=1)
    once = chosen(cells, lambda c: c["threads"] == fewest)
    table(once, names, lambda rows, name: shown(rows.get(name, {}).get("peak_mb"), 1))
    print("\nThe one-hot einsum against ours, in two steps: what the mapping table gains "
          "(onehot/table) and what the kernels gain (table/growmoe)")  # fmt: skip
    gains = {"onehot/table": ("onehot", "table"), "table/growmoe": ("table", "growmoe")}
    table(cells, list(gains), lambda rows, name: shown(ratio(rows, *gains[name])))
    for name, why in document["config"]["left_out"].items():
        print(f"\n{name} is not in the tables: {why}")
    skipped = sorted({(r["impl"], r["skipped"]) for r in document["rows"] if r.get("skipped")})
    if skipped:
        impls = ", ".join(sorted({name for name, _ in skipped}))
        print(f"\nA dash is a cell that was skipped ({impls}); the JSON has its reason")
    raw = sorted({row["impl"] for row in document["rows"] if row.get("weights") == "raw"})
    if raw:
        print(f"\nWith raw routing weights at k = 1, and compared with that: {', '.join(raw)}")
    summary(cells)


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document with the rows of all; exits where they are not of one machine and setting. Runs
    of several commits are named."""
    for field in ("cpu", "versions", "hidden", "ffn", "allocator", "device"):
        found = {json.dumps(document["config"][field]) for document in documents}
        if len(found) > 1:
            sys.exit(f"error: the runs differ in {field}: {', '.join(sorted(found))}")
    config = dict(documents[0]["config"])
    commits = {document["config"]["commit"][:10] for document in documents}
    if len(commits) > 1:
        print(f"The parts are of commits {', '.join(sorted(commits))}.\n")
    used = {name for document in documents for name in document["config"]["impl"]}
    config["impl"] = [name for name in BUILDERS if name in used]
    rows = [row for document in documents for row in document["rows"]]
    return {"config": config, "rows": rows}


if __name__ == "__main__":
    report(merged([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
