"""Where a model comes from: growmoe.json, and the model card that says the same to people."""

import json
from pathlib import Path
from typing import Any

import yaml

from growmoe import __version__
from growmoe.files import read_json, write_json, write_text
from growmoe.models.config import ModelConfig
from growmoe.models.families import config_from_hf, pick_family


def write_lineage(
    out: Path, lineage: dict[str, Any], config: ModelConfig | None = None
) -> None:  # fmt: skip
    """Write growmoe.json and the model card (README.md) of the MODEL directory `out`.

    `lineage` has name, operation, parent, options, checks, and whatever else is to be kept; the
    licence is copied from the parent's card when the parent is a directory that states one.
    `config` is needed where `out` holds no config.json.
    """
    config = config or config_from_hf(read_json(out / "config.json"), out / "config.json")
    licence = licence_of(Path(str(lineage.get("parent", ""))))
    lineage = {"growmoe": __version__, **licence, **lineage}
    write_json(out / "growmoe.json", lineage)
    library = "transformers" if (out / "config.json").exists() else "llama.cpp"
    write_text(out / "README.md", _card(config, lineage, library))


def licence_of(parent: Path) -> dict[str, Any]:
    """The licence fields of a model card's front matter ({} where there are none)."""
    card = parent / "README.md"
    if not card.is_file():
        return {}
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    head, fence, rest = text.partition("---\n")
    front, closed, _ = rest.partition("\n---")
    if head.strip() or not fence or not closed:
        return {}
    try:
        fields = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError):
        return {}
    if not isinstance(fields, dict):
        return {}
    kept = ("license", "license_name", "license_link")
    return {key: str(fields[key]) for key in kept if key in fields}


def _card(config: ModelConfig, lineage: dict[str, Any], library: str) -> str:
    front = {k: v for k, v in lineage.items() if k.startswith("license")}
    front |= {"library_name": library, "pipeline_tag": "text-generation"}
    front |= {"tags": ["growmoe"], "base_model": str(lineage.get("parent"))}
    total, active = config.params_total() / 1e6, config.params_active() / 1e6
    rows = [
        ("architecture", pick_family(config)),
        ("layers", config.num_layers),
        ("hidden size", config.hidden_size),
        ("parameters", f"{total:.2f} M, {active:.2f} M active per token"),
    ]
    if config.moe:
        counts = sorted(set(config.moe.experts))
        rows.append(("experts per layer", ", ".join(map(str, counts))))
        rows.append(("experts per token", config.moe.top_k))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {lineage.get('name', 'model')}\n\n"
        f"Made by growmoe {__version__} with `{lineage.get('operation')}` from "
        f"`{lineage.get('parent')}`.\n\n{_table(rows)}\n{_loading(config)}"
        f"## Checks\n\n{_table(_flat(lineage.get('checks', {})))}\n"
        f"Engines: {_engines(lineage)}\n\n"
        f"## Options\n\n{_table(_flat(lineage.get('options', {})))}"
    )


def _loading(config: ModelConfig) -> str:
    if pick_family(config) != "growmoe":
        return ""
    return "transformers loads it after `import growmoe.hf`.\n\n"


def _engines(lineage: dict[str, Any]) -> str:
    engines = lineage.get("engines") or {}
    return ", ".join(f"{name} ({said})" for name, said in engines.items()) or "none tried yet."


def _flat(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = []
    for key, value in fields.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, dict | list):
            value = f"`{json.dumps(value, ensure_ascii=False)}`"
        rows.append((key, value))
    return rows


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '/')} |\n" for key, value in rows]
    return "| | |\n|---|---|\n" + "".join(lines) if rows else "None.\n"
