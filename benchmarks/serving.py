"""Latency and throughput under traffic: our engine with its scheduler on, and llama.cpp's server.

Requests arrive as a Poisson process at each of several rates, at times that do not depend on how
fast they are answered (open loop), with prompts and answers of random lengths (log-uniform); a part
of them begins with the same tokens, as chats with one system prompt do. Each engine runs in a
process of its own, in-process without HTTP, and gets the same requests at the same times, one
engine after the other for every rate:

    growmoe                as it comes: prompts in chunks of --chunk tokens, prefixes reused
    growmoe_whole_prompts  prompts computed at once, whatever waits
    growmoe_no_reuse       without prefix reuse
    llama.cpp              its server with --slots slots, prompt cache on

Reported per rate, p50, p90 and p99: time to first token (from the arrival, waiting included), time
between tokens, and end to end; output tokens per second; goodput: requests per second that had
their first token within --ttft-limit and an average time between tokens within --token-limit.

    python benchmarks/serving.py --cache runs/models --plot runs/serving.png [--out FILE]
    python benchmarks/serving.py --rates 1 2 --seconds 10 --form int4

Prints a table and ends in one JSON line.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode import FIELDS, add_sizes
from engine_pool import Key, Pool, environment
from random_mixtral import GGUF, Model, Sizes

SCRIPT = Path(__file__).with_name("serving_worker.py")
Schedule = list[tuple[float, list[int], int]]
"""(seconds after the start, prompt, tokens of the answer)."""
ENGINES = ("growmoe", "growmoe_whole_prompts", "growmoe_no_reuse", "llama.cpp")
PERCENTILES = (50, 90, 99)


def schedule_of(options: argparse.Namespace, rate: float, seed: int) -> Schedule:
    """Poisson arrivals for --seconds at `rate` requests per second; at least one."""
    draw = random.Random(seed)
    low = options.vocab // 64
    shared = [draw.randrange(low, options.vocab) for _ in range(options.shared_tokens)]

    def length(between: Sequence[int]) -> int:
        return round(math.exp(draw.uniform(*(math.log(limit) for limit in between))))

    schedule: Schedule = []
    moment = draw.expovariate(rate)
    while moment < options.seconds or not schedule:
        own = [draw.randrange(low, options.vocab) for _ in range(length(options.prompt_tokens))]
        prompt = (shared if draw.random() < options.shared else []) + own
        schedule.append((moment, prompt, length(options.output_tokens)))
        moment += draw.expovariate(rate)
    return schedule


def percentile(values: Sequence[float], percent: float) -> float:
    """Of the sorted values, the first that has at least `percent` of them at or below it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def summary(
    schedule: Schedule, times: list[list[float]], options: argparse.Namespace
) -> dict[str, Any]:
    """What the times of all tokens say."""
    first, between, whole = list[float](), list[float](), list[float]()
    good = 0
    for (arrival, _, tokens), came in zip(schedule, times, strict=True):
        if not came:
            raise RuntimeError("a request got no token")
        first.append(came[0] - arrival)
        between += [b - a for a, b in zip(came, came[1:])]
        whole.append(came[-1] - arrival)
        average = (came[-1] - came[0]) / max(1, tokens - 1)
        good += first[-1] <= options.ttft_limit and average <= options.token_limit
    span = max(came[-1] for came in times)
    row: dict[str, Any] = {
        "requests": len(schedule), "output_tokens_per_s": sum(s[2] for s in schedule) / span,
        "requests_per_s": len(schedule) / span, "goodput_requests_per_s": good / span,
        "good": good / len(schedule), "seconds": span,
    }  # fmt: skip
    for name, values in (("ttft", first), ("between_tokens", between or [0.0]), ("whole", whole)):
        row[f"{name}_s"] = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return row


def settings_of(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of our engine, or nothing."""
    if engine == "llama.cpp":
        return {}
    longest = options.shared_tokens + options.prompt_tokens[1]
    whole = engine == "growmoe_whole_prompts"
    return {
        "max_sequences": options.slots, "prefix_reuse": engine != "growmoe_no_reuse",
        "step_tokens": options.slots * (longest + 1) if whole else options.chunk,
        "kv_gb": options.kv_gb,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every engine at every rate."""
    models = Model(options.cache, Sizes(**{field: getattr(options, field) for field in FIELDS}))
    most = options.shared_tokens + options.prompt_tokens[1] + options.output_tokens[1]
    settings = {"slots": options.slots, "context": -(-(most + 8) // 256) * 256}
    pythons = dict(pair.split("=", 1) for pair in options.python)
    log = models.folder / "serving.log"
    log.write_text("")
    rows = []
    with Pool(models, settings, 2, pythons, log, SCRIPT) as pool:
        for number, rate in enumerate(options.rates):
            schedule = schedule_of(options, rate, options.seed + 100 * number)
            for engine in options.engines:
                kind = "llama.cpp" if engine == "llama.cpp" else "growmoe"
                answer = pool.measure(
                    Key(kind, options.form, options.threads), "traffic", schedule=schedule,
                    settings=settings_of(engine, options),
                )  # fmt: skip
                if answer is None:
                    continue
                rows.append(
                    {
                        "engine": engine, "rate": rate,
                        **summary(schedule, answer.pop("times"), options), **answer,
                    }
                )  # fmt: skip
                print(f"{engine} at {rate}/s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        missing = [{"engine": kind, "why": why} for (kind, _), why in pool.missing.items()]
        facts = pool.facts
    chosen = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }
    config = {**chosen, "engines_are": facts, **environment()}
    return {"benchmark": "serving", "rows": rows, "missing": missing, "config": config}


def report(document: dict[str, Any]) -> None:
    """A line for each engine and rate; times in milliseconds."""
    options = document["config"]
    print(f"\n{options['form']} (llama.cpp: {GGUF[options['form']]}), {options['threads']} threads")
    print(
        f"{'rate':>5} {'engine':22}{'first token':>21}{'between tokens':>21}{'end to end':>24}"
        f"{'tok/s':>8}{'good/s':>8}{'good':>6}"
    )
    print(f"{'':28}{'p50 / p90 / p99, milliseconds':>40}")
    for row in document["rows"]:
        times = [
            " / ".join(
                f"{1e3 * value:.{'0f' if value >= 0.1 else '1f'}}" for value in row[name].values()
            )
            for name in ("ttft_s", "between_tokens_s", "whole_s")
        ]
        print(
            f"{row['rate']:5} {row['engine']:22}{times[0]:>21}{times[1]:>21}{times[2]:>24}"
            f"{row['output_tokens_per_s']:8.1f}{row['goodput_requests_per_s']:8.2f}"
            f"{row['good']:6.0%}"
        )
    for kind, facts in options["engines_are"].items():
        print(f"{kind}: {' '.join(f'{name} {value}' for name, value in facts.items())}")
    for entry in document["missing"]:
        print(f"not measured: {entry['engine']}: {entry['why']}")


def plot(document: dict[str, Any], file: Path) -> None:
    """Latencies and goodput over the rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options = document["config"]
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), constrained_layout=True)
    panels = (
        ("time to first token, p50", lambda row: row["ttft_s"]["p50"], "s"),
        ("time to first token, p99", lambda row: row["ttft_s"]["p99"], "s"),
        ("time between tokens, p99", lambda row: row["between_tokens_s"]["p99"], "s"),
        (
            f"goodput: first token in {options['ttft_limit']} s, "
            f"{options['token_limit']} s a token",
            lambda row: row["goodput_requests_per_s"],
            "requests/s",
        ),
    )
    styles = {
        "growmoe": ("#1f5fa8", "-", "o"), "growmoe_whole_prompts": ("#6ba4d8", "--", "s"),
        "growmoe_no_reuse": ("#8f6bb8", ":", "D"), "llama.cpp": ("#d1711c", "-", "^"),
    }  # fmt: skip
    for axis, (title, value, unit) in zip(axes, panels):
        for engine, (color, line, marker) in styles.items():
            own = [row for row in document["rows"] if row["engine"] == engine]
            if own:
                axis.plot(
                    [row["rate"] for row in own], [value(row) for row in own], label=engine,
                    color=color, linestyle=line, marker=marker,
                )  # fmt: skip
        axis.set(title=title, xlabel="arrivals per second", ylabel=unit)
        axis.grid(alpha=0.3, which="both")
        if unit == "s":  # once requests queue, they wait many times longer
            axis.set_yscale("log")
    rates = [0, max(options["rates"])]
    axes[3].plot(rates, rates, color="#999999", linewidth=0.8, label="all requests")
    axes[3].legend(fontsize=8)
    threads = f"{options['threads']} threads, {options['slots']} sequences at a time"
    figure.suptitle(f"{options['form']}, {threads}", fontsize=11)
    figure.savefig(file, dpi=110)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--form", choices=tuple(GGUF), default="bfloat16")
    add("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="requests per second")
    add("--seconds", type=float, default=60.0, help="how long requests arrive at each rate")
    add("--prompt-tokens", type=int, nargs=2, default=[16, 512], metavar=("LOW", "HIGH"))
    add("--output-tokens", type=int, nargs=2, default=[8, 96], metavar=("LOW", "HIGH"))
    add("--shared", type=float, default=0.5, help="part of the requests with a common beginning")
    add("--shared-tokens", type=int, default=128, help="length of that beginning")
    add("--ttft-limit", type=float, default=1.0, help="seconds")
    add("--token-limit", type=float, default=0.1, help="seconds between tokens on average")
    add("--slots", type=int, default=16, help="most sequences at a time, of every engine")
    add("--chunk", type=int, default=256, help="tokens of one of our steps")
    add("--kv-gb", type=float, default=1.0, help="memory of our keys and values")
    add("--threads", type=int, default=2)
    add("--python", action="append", default=[], metavar="KIND=PATH",
        help="run this kind of engine with another interpreter")  # fmt: skip
    add("--plot", type=Path, help="PNG file")
    add("--out", type=Path, help="JSON file")
    add_sizes(parser)
    return parser.parse_args(argv)


def main() -> int:
    """Measure, print, draw, end in the JSON line."""
    options, begun = arguments(), time.perf_counter()
    document = measure(options)
    document["config"]["seconds_in_all"] = time.perf_counter() - begun
    report(document)
    if options.plot:
        plot(document, options.plot)
    if options.out:
        options.out.write_text(json.dumps(document))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
