"""The Routing section of report.html, on run directories written by hand."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import growmoe
from growmoe.report.routing import routing_history
from growmoe.report.routing_figures import POINTS, credit_ranks, thin

MEASURES = ("max_vio", "load_entropy", "router_entropy", "log_z", "dropped", "dead")


def write_run(folder: Path, stages: dict[str, list[dict[str, Any]]]) -> Path:
    """A run directory of training stages with these metrics."""
    rows = []
    for name, records in stages.items():
        row = {"stage": "train", "name": name, "params_total": 9e5, "params_active": 4e5,
               "tokens": 1000, "flops": 1e9, "loss_before": 4.0, "loss_after": 3.0,
               "seconds": 2.0, "output": name}  # fmt: skip
        rows.append(row)
        result = {**row, "expert_load": records[-1].get("expert_load", [])}
        (folder / name).mkdir(parents=True)
        (folder / name / "stage.json").write_text(json.dumps({"result": result}))
        (folder / f"{name}.run").mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.run" / "metrics.jsonl").write_text(lines)
    (folder / "summary.json").write_text(json.dumps(rows))
    return folder


def dense(steps: int) -> list[dict[str, Any]]:
    """Records of a dense stage, or of one with experts by a version that logged no routing."""
    records: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "validation": {"text": 4.0}}]
    for step in range(1, steps + 1):
        records.append({"step": step, "tokens": step, "loss": 4 - step / steps})
    records[-1]["validation"] = {"text": 3.0}
    return records


def sparse(
    steps: int, layers: int = 2, experts: int = 4, bias: bool = False, dropped: float = 0.0
) -> list[dict[str, Any]]:
    """Records of a stage with experts; a pyramid whose last layer has twice as many."""
    rng = random.Random(0)
    records = dense(steps)
    for record in records:
        step = record["step"]
        wave = [rng.uniform(0.5, 1.0) for _ in range(layers)]
        if step:
            record["routing"] = {name: [0.9 * w for w in wave] for name in MEASURES}
            record["routing"]["dropped"] = [dropped * w for w in wave]
            record["routing"]["dead"] = [0.0] * layers
            if bias:
                record["routing"]["bias_range"] = [0.01 * step] * layers
            record["grad_norms"] = {"router": 0.1 * wave[0], "experts": wave[0], "norm": 0.0}
        if step % (steps // 4) == 0:
            sizes = [experts] * (layers - 1) + [2 * experts]
            record["expert_load"] = [[1 / size] * size for size in sizes]
            record["experts"] = {
                "load": [] if step == 0 else record["expert_load"],
                "rank": [[float(e + 1) for e in range(size)] for size in sizes],
                "cosine_min": [0.8 - layer / 100 for layer in range(layers)],
                "cosine_mean": [0.9 - layer / 100 for layer in range(layers)],
                "cosine_max": [1.0] * layers,
            }
    return records


def report(run: Path) -> str:
    done = growmoe("report", run)
    assert done.code == 0, done.err
    return (run / "report.html").read_text(encoding="utf-8")


HEADINGS = {
    "panels": "What the routers did in stage",
    "similarity": "Do the experts diverge?",
    "norms": "Gradient norm by group",
    "load": "Expert load",
    "ranks": "Which experts lower the loss",
    "table": "Layer by layer at the end",
}
DROPPED, BIAS = "Choices dropped over capacity", "Range of the selection bias"


def parts(page: str) -> set[str]:
    return {part for part, words in HEADINGS.items() if words in page}


def test_a_dense_run_has_no_routing_section(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, {"small": dense(8)}))
    assert "Loss against compute" in page
    assert "<h2>Routing" not in page
    assert not parts(page)


def test_metrics_of_older_versions(tmp_path: Path) -> None:
    """Without routing keys the load is still shown; with a few of them, what they say."""
    old = dense(8)
    old[-1]["expert_load"] = [[0.2, 0.8]]
    page = report(write_run(tmp_path / "a", {"moe": old}))
    assert "<h2>Routing" in page
    assert parts(page) == {"load"}
    for record in old[5:]:  # resumed by a newer version
        record["routing"] = {"max_vio": [0.5], "log_z": [1.0]}
    page = report(write_run(tmp_path / "b", {"moe": old}))
    assert parts(page) == {"load", "panels", "table"}
    assert "1.50 (0.50)" in page
    assert "Evenness of the load" not in page


def test_a_run_killed_before_its_metrics_were_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"moe": sparse(8)})
    shutil.rmtree(run / "moe.run")
    assert parts(report(run)) == {"load"}


def test_a_run_that_dropped_nothing_and_has_no_bias(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, {"moe": sparse(8)}))
    assert parts(page) == set(HEADINGS)
    assert not [words for words in (DROPPED, BIAS, "bias range", "Dead experts") if words in page]


def test_ranks_that_say_nothing_are_left_out() -> None:
    assert credit_ranks([[2.5] * 4, [4.5] * 8], "ranks") is None
    assert credit_ranks([], "ranks") is None


def test_the_table_ends_where_the_curves_end() -> None:
    history = routing_history("moe", sparse(160, bias=True))
    assert history.averaged == 4
    row = history.table()[1]
    assert row["bias_range"] == pytest.approx(0.01 * (157 + 158 + 159 + 160) / 4)
    assert row["cosine_mean"] == 0.89
    assert not routing_history("small", dense(8))


def test_thin_keeps_the_last_point() -> None:
    for length in (0, 1, 299, 300, 301, 999, 1000):
        values = list(range(length))
        kept = thin(values, POINTS)
        assert kept[-1:] == values[-1:]
        assert len(kept) <= POINTS
    assert thin([1, 2, 3], 3) == [1, 2, 3]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages with experts, the last of 8 layers with 8 experts and 1000 steps."""
    last = sparse(1000, layers=8, experts=8, bias=True, dropped=0.05)
    stages = {"small": dense(8), "first": sparse(8), "moe": last}
    run = write_run(tmp_path_factory.mktemp("large"), stages)
    report(run)
    return run


def test_a_long_run_makes_a_light_page(large: Path) -> None:
    page = (large / "report.html").read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    assert parts(page) == set(HEADINGS)
    assert all(words in page for words in (DROPPED, BIAS, "bias range"))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert "<details><summary>Routing in the earlier stage first" in page
    assert "early to late" in page  # a colour scale, not a legend of eight layers
    assert page.count("Gradient norm by group") == 1


def test_routing_in_a_browser(large: Path) -> None:
    """On a phone nothing but the tables scrolls sideways, also with earlier stages opened."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for width, shown in ((1280, "wide"), (390, "narrow")):
            page = browser.new_page(viewport={"width": width, "height": 900})
            requests, problems = [], []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("console", lambda message, seen=problems: seen.append(message.text))
            page.goto((large / "report.html").as_uri())
            figures = page.locator(f"figure .{shown} svg:visible")
            assert figures.count() == 2 + 5
            page.locator("summary", has_text="earlier stage").click()
            assert figures.count() == 2 + 5 + 2
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            table = page.locator("table.many").first
            assert table.locator("tr").count() == 9
            box = table.locator("xpath=..")
            overflow = box.evaluate("e => e.scrollWidth > e.clientWidth")
            assert overflow == (shown == "narrow")
            assert len(requests) == 1
            assert not problems
        browser.close()
