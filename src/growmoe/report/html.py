"""report.html: everything about a run on one page that works without internet."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from growmoe import __version__
from growmoe.errors import UsageError
from growmoe.files import read_json, write_text
from growmoe.progress import human_count, human_seconds
from growmoe.report.figures import Curve, expert_load, loss_against_flops, validation_by_domain
from growmoe.report.routing import RoutingHistory, routing_history
from growmoe.report.routing_figures import (
    credit_ranks,
    expert_similarity,
    gradient_norms,
    routing_panels,
)
from growmoe.training.trainer import read_metrics


def write_report(folder: Path) -> Path:
    """Build the page from summary.json, the stages' results and their metrics.

    Raises UsageError when `folder` is not the run directory of a recipe.
    """
    if not (folder / "summary.json").exists():
        raise UsageError(f"{folder} holds no summary.json, so it is not a run directory")
    rows = read_json(folder / "summary.json")
    results = [read_json(folder / row["name"] / "stage.json")["result"] for row in rows]
    metrics = {
        result["name"]: read_metrics(folder / f"{result['name']}.run" / "metrics.jsonl")
        for result in results
        if result["stage"] == "train"
    }
    curves = _curves(results, metrics)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            name=folder.name,
            version=__version__,
            rows=rows,
            results=results,
            headline=_headline(rows),
            flops=loss_against_flops(curves) if curves else None,
            domains=validation_by_domain(curves) if curves else None,
            routing=_routing(results, metrics),
            transitions=[r for r in results if r["stage"] in ("grow", "upcycle", "verify")],
            samples=[s for r in results for s in r.get("samples", [])],
            scores=_scores(results),
            corpora=_corpora(folder, results),
            recipe=json.dumps(read_json(folder / "recipe.json"), indent=2, ensure_ascii=False)
            if (folder / "recipe.json").exists()
            else "",
        )
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("growmoe.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "count": lambda value: human_count(float(value)) if value else "–",
        "loss": lambda value: f"{value:.4f}" if value is not None else "–",
        "time": lambda value: human_seconds(value) if value is not None else "–",
        "short": lambda value: f"{value:.2g}" if value is not None else "–",
        "fixed": lambda value, digits: f"{value:.{digits}f}" if value is not None else "–",
        "percent": lambda value: f"{value:.1%}" if value is not None else "–",
    }
    return environment


Metrics = dict[str, list[dict[str, Any]]]
"""Records of metrics.jsonl by training stage."""


def _curves(results: list[dict[str, Any]], metrics: Metrics) -> list[Curve]:
    """One curve per training stage, on FLOPs and tokens summed over the stages before it."""
    curves = []
    flops = tokens = 0.0
    for result in results:
        if result["stage"] != "train":
            continue
        per_token = result["flops"] / result["tokens"]
        curve = Curve(result["name"])
        for record in metrics[result["name"]]:
            at = (flops + record["tokens"] * per_token, tokens + record["tokens"])
            if "loss" in record:
                curve.flops.append(at[0])
                curve.tokens.append(at[1])
                curve.loss.append(record["loss"])
            if "validation" in record:
                curve.validation.append((*at, record["validation"]))
        if curve.loss:
            curves.append(curve)
        flops, tokens = flops + result["flops"], tokens + result["tokens"]
    return curves


def _routing(results: list[dict[str, Any]], metrics: Metrics) -> list[dict[str, Any]]:
    """What the template shows of every training stage with experts, the last stage first; only
    that one has its gradients, load and ranks shown."""
    histories: list[RoutingHistory] = []
    for result in results:
        if result["stage"] != "train":
            continue
        history = routing_history(result["name"], metrics[result["name"]])
        history.load = result.get("expert_load") or history.load
        if history:
            histories.insert(0, history)
    found = []
    for number, history in enumerate(histories):
        last = number == 0
        found.append(
            {
                "name": history.name,
                "panels": routing_panels(history, f"routing{number}"),
                "similarity": expert_similarity(history, f"alike{number}"),
                "norms": gradient_norms(history, "norms") if last else None,
                "load": expert_load(history.load) if last and history.load else None,
                "ranks": credit_ranks(history.ranks, "ranks") if last else None,
                "table": history.table(),
                "averaged": history.averaged,
            }
        )
    return found


def _headline(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers that say what the run did."""
    models = [row for row in rows if row["params_total"] and row["stage"] != "generate"]
    trained = [row for row in rows if row["stage"] == "train"]
    if not models or not trained:
        return []
    first, last = models[0], models[-1]
    return [
        (
            "parameters",
            f"{human_count(first['params_total'])} → {human_count(last['params_total'])}",
        ),
        ("active per token", human_count(last["params_active"])),
        ("training tokens", human_count(float(sum(row["tokens"] for row in trained)))),
        ("training FLOPs", human_count(float(sum(row["flops"] for row in trained)))),
        ("validation loss", f"{trained[0]['loss_before']:.3f} → {trained[-1]['loss_after']:.3f}"),
        ("wall time", human_seconds(sum(row["seconds"] for row in rows))),
    ]


def _scores(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluation results as rows of (stage, name, value)."""
    rows = []
    for result in results:
        if result["stage"] != "evaluate":
            continue
        for domain, loss in result.get("validation", {}).items():
            value = f"{loss:.4f} (perplexity {result['perplexity'][domain]:.1f})"
            rows.append({"stage": result["name"], "what": f"loss, {domain}", "value": value})
        for task, found in result.get("tasks", {}).items():
            rules = [rule for rule in ("sum", "per_char", "greedy") if rule in found]
            value = ", ".join(
                f"{rule} {found[rule]:.3f} ± {found[f'{rule}_stderr']:.3f}" for rule in rules
            )
            what = f"{task}, {found['n']} rows"
            rows.append({"stage": result["name"], "what": what, "value": value})
    return rows


def _corpora(folder: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        if result["stage"] == "prepare":
            rows += read_json(folder / result["name"] / "manifest.json")["sources"]
    return rows
