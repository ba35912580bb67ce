"""A plan as lines that people read. Imports no torch."""

from typing import Any

from growmoe.progress import human_count

_FIELDS = (
    ("family", "architecture"), ("layers", "layers"), ("hidden", "hidden"), ("heads", "heads"),
    ("kv_heads", "kv heads"), ("ffn", "feed-forward"), ("experts", "experts"), ("top_k", "top-k"),
    ("vocab", "vocabulary"), ("dtype", "dtype"), ("params_total", "parameters"),
    ("params_active", "active per token"), ("flops_per_token", "FLOPs per token"),
    ("bytes_on_disk", "bytes on disk"), ("kv_bytes_per_token", "KV bytes per token"),
)  # fmt: skip
_HUGE = ("params_total", "params_active", "flops_per_token", "bytes_on_disk", "kv_bytes_per_token")


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The lines of a dry run of one verb, or of the plan of a recipe."""
    if "stages" in plan:
        return _recipe_lines(plan["stages"])
    shapes = [plan[key] for key in ("in", "out", "model", "a", "b") if key in plan]
    lines = [f"dry run of {plan['stage']}" + (f" -> {plan['output']}" if "output" in plan else "")]
    for field, label in _FIELDS:
        cells = [_cell(field, shape.get(field)) for shape in shapes]
        if any(cell != "-" for cell in cells):
            lines.append(f"  {label:<20}" + " -> ".join(f"{cell:>10}" for cell in cells))
    if "declared_exact" in plan:
        why = "; ".join(plan.get("lossy_because", []))
        lines.append(f"  function:           {'the same' if not why else f'changed: {why}'}")
        lines.append(f"  check:              {plan['verification']}")
    for key in ("steps", "tokens", "flops", "state_bytes", "disk_free", "text", "data", "tasks"):
        if plan.get(key) and not isinstance(plan[key], dict):
            value = plan[key]
            lines.append(
                f"  {key:<20}{human_count(float(value)) if isinstance(value, int) else value}"
            )
    for source in plan.get("sources", []):
        lines.append("  source              " + "  ".join(f"{k} {v}" for k, v in source.items()))
    if "layer_map" in plan:
        lines.append(f"  layers copied       {' '.join(map(str, plan['layer_map']))}")
    lines += _tensor_lines(plan.get("tensors", []))
    return lines + [f"warning: {text}" for text in plan.get("warnings", [])]


def _cell(field: str, value: Any) -> str:
    if not value:
        return "-"
    return human_count(float(value)) if field in _HUGE else str(value)


def _tensor_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    width = max(len(row["tensor"]) for row in rows)
    lines = [f"  {'tensor':<{width}}  {'count':>6}  {'shape':>16}  made from"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        source = ""
        if row["source_shape"] is not None:
            same = row["source_shape"] == row["shape"] and row["from"] == row["tensor"]
            old = "x".join(map(str, row["source_shape"]))
            source = "itself" if same else f"{row['from']} {old}"
        lines.append(
            f"  {row['tensor']:<{width}}  {row['count']:>6}  {shape:>16}  {source or row['from']}"
        )
    return lines


def _recipe_lines(stages: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'stage':<10}{'name':<14}{'family':<11}{'params':>9}{'active':>9}{'FLOPs/tok':>10}"
        f"{'bytes':>9}{'tokens':>9}{'FLOPs':>9}"
    ]
    for row in stages:
        keys = ("params_total", "params_active", "flops_per_token", "bytes", "tokens", "flops")
        widths = (9, 9, 10, 9, 9, 9)
        cells = "".join(
            f"{human_count(float(row[k])) if row.get(k) else '-':>{w}}"
            for k, w in zip(keys, widths)
        )
        lines.append(f"{row['stage']:<10}{row['name']:<14}{row.get('family', ''):<11}{cells}")
    for row in stages:
        if "tensors" in row:
            why = "; ".join(row.get("lossy_because", [])) or "the same function"
            lines.append(f"{row['name']}: {why}")
            if "layer_map" in row:
                lines.append(f"  layers copied: {' '.join(map(str, row['layer_map']))}")
            lines += _tensor_lines(row["tensors"])
    for row in stages:
        lines += [f"warning: {row['name']}: {text}" for text in row.get("warnings", [])]
    return lines
