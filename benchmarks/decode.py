"""Decoding and prefill of one random Mixtral: ours, transformers, llama.cpp, vLLM, side by side.

Every engine runs in a process of its own (`engine_worker.py`) and measures when it is its turn:
round robin over engines, every `--repeats` rounds, so that a neighbour's load meets all of them.
Idle engines are idle: what they computed meanwhile stands in `others_cpu`. Decoding is greedy, ends
are ignored, prompts are random tokens, other ones in every round. What is timed:

    decode    --tokens steps of `batch` sequences, after each has its first token
    prefill   a prompt of --prefill tokens, to its first token

transformers is a plain loop around its model (less work than its `generate`), once as it comes
(grouped_mm) and once as `eager`. llama.cpp's rates are its server's own, without HTTP. Ours goes
through its scheduler and sampler. `growmoe_plain` is our model without the engine.

A memory ceiling is measured beside each round: bytes of active weights of a step, over the read
bandwidth of as many threads. With routing as good as uniform a step of B sequences reads
U = E * (1 - (1 - k/E)^B) experts of a layer: L * (attention + U * expert) + head weights (see
`random_mixtral.Sizes.step_bytes`). For prefill the ceiling is a large matrix product of the dtype
(int8 for the quantised forms).

    python benchmarks/decode.py --cache runs/models [--forms bfloat16 int4] [--out runs/decode.json]
    python benchmarks/decode.py --quick
    python benchmarks/decode.py --python llama.cpp=/venv/bin/python --python vllm=/other/bin/python

xllamacpp's wheel for Linux knows AVX2 only, and says so; on a processor with AVX-512 compare with
one that was built for it, in an environment of its own:

    NPROC=2 CMAKE_ARGS="-DLLAMA_BUILD_BORINGSSL=OFF -DLLAMA_LLGUIDANCE=OFF" \\
        pip install --no-binary xllamacpp xllamacpp

Prints tables, the targets and whether they were met, and ends in one JSON line.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_pool import Key, Pool, environment
from random_mixtral import GGUF, Model, Sizes

ENGINES = {
    "growmoe": ("growmoe", ""),
    "growmoe_plain": ("plain", ""),
    "transformers": ("transformers", "grouped_mm"),
    "transformers_eager": ("transformers", "eager"),
    "llama.cpp": ("llama.cpp", ""),
    "vllm": ("vllm", ""),
}
"""Name in the tables -> kind of worker, variant."""
OURS = ("growmoe", "growmoe_plain")
FORMS = tuple(GGUF)
Case = tuple[str, int]
"""(decode, batch) or (prefill, tokens)."""
Samples = dict[tuple[str, str, int, Case], list[dict[str, Any]]]
"""(form, engine, threads, case) -> one answer a round."""


class Bench:
    """Measures everything, round by round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begun = options, time.perf_counter()
        self.sizes = Sizes(**{field: getattr(options, field) for field in FIELDS})
        self.models = Model(options.cache, self.sizes)
        self.samples: Samples = {}
        self.agree: dict[tuple[str, str], list[int]] = {}
        self.cases: list[Case] = [("decode", batch) for batch in options.batches]
        self.cases += [("prefill", options.prefill)] if options.prefill else []
        context = max(options.prompt + options.tokens, options.prefill) + 16
        settings = {
            "slots": max([*options.batches, 1]), "context": -(-context // 256) * 256,
            "probe_mib": options.probe_mib,
        }  # fmt: skip
        pythons = dict(pair.split("=", 1) for pair in options.python)
        log = self.models.folder / "engines.log"
        log.write_text("")
        self.pool = Pool(self.models, settings, options.resident, pythons, log)

    def run(self) -> None:
        """Every form and thread count: load, compare the first tokens, then measure in turns."""
        with self.pool:
            for form in self.options.forms:
                for threads in self.options.threads:
                    self._compare(form, threads)
                    for number in range(self.options.repeats):
                        self._round(form, threads, number)
                    self.pool.close(form, threads)
                    self.save()

    def save(self) -> None:
        """What is known so far, to --out."""
        if self.options.out:
            self.options.out.write_text(json.dumps(document_of(self)))

    def _compare(self, form: str, threads: int) -> None:
        for name in self.options.engines:
            kind, variant = ENGINES[name]
            key = Key(kind, form, threads)
            asked = {"prompts": [1, 16, self.sizes.vocab, 99], "tokens": 8, "variant": variant}
            answer = self.pool.measure(key, "greedy", **asked)
            if answer is not None:
                self.agree[form, name] = answer["ids"]
            for case in self.cases if answer is not None else []:  # first calls, not counted
                short = ("prefill", 32) if case[0] == "prefill" else case
                self._measure(key, variant, short, 7, tokens=2)

    def _measure(self, key: Key, variant: str, case: Case, seed: int, tokens: int) -> Any:
        what, size = case
        if what == "decode":
            prompts = [size, self.options.prompt, self.sizes.vocab, seed]
            return self.pool.measure(key, what, prompts=prompts, tokens=tokens, variant=variant)
        prompts = [1, size, self.sizes.vocab, seed]
        return self.pool.measure(key, what, prompts=prompts, variant=variant)

    def _round(self, form: str, threads: int, number: int) -> None:
        """Engines in the one order, then in the other."""
        probe = Key("probe", "", threads)
        for case in self.cases:
            limit = self._limit(probe, form, case)
            names = self.options.engines[:: 1 if number % 2 == 0 else -1]
            for name in names:
                kind, variant = ENGINES[name]
                seed = 1000 * number + case[1]
                answer = self._measure(
                    Key(kind, form, threads), variant, case, seed, self.options.tokens
                )
                if answer is None:
                    continue
                rate = answer["tokens_per_s"]
                answer.update(limit, fraction_of_ceiling=rate / limit["ceiling_tokens_per_s"])
                self.samples.setdefault((form, name, threads, case), []).append(answer)
        done = f"[{form}, {threads} threads] round {number + 1} of {self.options.repeats}"
        print(f"{done}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)

    def _probed(self, probe: Key, do: str, **more: Any) -> dict[str, Any]:
        answer = self.pool.measure(probe, do, **more)
        if answer is None:
            raise RuntimeError(f"no ceiling: {self.pool.missing[probe.kind, probe.form]}")
        return answer

    def _limit(self, probe: Key, form: str, case: Case) -> dict[str, float]:
        what, size = case
        if what == "decode":
            found = self._probed(probe, "bandwidth")["bytes_per_s"]
            ceiling = found * size / self.sizes.step_bytes(size, form)
            return {"bandwidth_gb_s": found / 1e9, "ceiling_tokens_per_s": ceiling}
        found = self._probed(probe, "products", form=form)["flop_per_s"]
        ceiling = found / self.sizes.prefill_flop
        return {"products_gflop_s": found / 1e9, "ceiling_tokens_per_s": ceiling}


# ---- results ----


def row_of(key: tuple[str, str, int, Case], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the tables."""
    form, engine, threads, (what, size) = key
    rates = [sample["tokens_per_s"] for sample in samples]
    median = statistics.median(rates)

    def middle(field: str) -> float:
        return statistics.median(sample[field] for sample in samples)

    limit = "bandwidth_gb_s" if what == "decode" else "products_gflop_s"
    return {
        "engine": engine, "form": form, "pass": what,
        "batch": size if what == "decode" else 1,
        "prompt_tokens": size if what == "prefill" else None, "threads": threads,
        "tokens_per_s": median, "best": max(rates), "spread": (max(rates) - min(rates)) / median,
        "cpu_s_per_token": statistics.median(s["cpu_seconds"] / s["tokens"] for s in samples),
        "fraction_of_ceiling": middle("fraction_of_ceiling"), limit: middle(limit),
        "samples": rates, "others_cpu": max(sample["others_cpu"] for sample in samples),
        "load": max(sample["load"] for sample in samples),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """Ours over the best of `peers`, or over the ceiling when there are none."""

    name: str
    form: str
    case: str
    batch: int
    peers: tuple[str, ...]
    at_least: float


TRANSFORMERS = ("transformers", "transformers_eager")
PEERS = (*TRANSFORMERS, "llama.cpp", "vllm")
TARGETS = (
    Target("bf16 batch 1 / llama.cpp BF16", "bfloat16", "decode", 1, ("llama.cpp",), 1.0),
    Target("bf16 batch 1 / transformers", "bfloat16", "decode", 1, TRANSFORMERS, 2.0),
    Target("bf16 batch 8 / best peer", "bfloat16", "decode", 8, PEERS, 1.2),
    Target("bf16 prefill / llama.cpp", "bfloat16", "prefill", 1, ("llama.cpp",), 2.0),
    Target("bf16 prefill / transformers", "bfloat16", "prefill", 1, TRANSFORMERS, 0.9),
    Target("int8 batch 1 / llama.cpp Q8_0", "int8", "decode", 1, ("llama.cpp",), 1.0),
    Target("int4 batch 1 / llama.cpp Q4_0", "int4", "decode", 1, ("llama.cpp",), 0.9),
    Target("bf16 batch 1 / memory ceiling", "bfloat16", "decode", 1, (), 0.7),
)


def ratios(rows: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """Every target that can be judged: the median over rounds of ours over the best peer of that
    round, and best over best."""
    found = []
    for target in TARGETS:
        fit = {
            row["engine"]: row
            for row in rows
            if (row["form"], row["pass"], row["threads"]) == (target.form, target.case, threads)
            and row["batch"] == target.batch
        }
        mine = fit.get("growmoe", fit.get("growmoe_plain"))
        peers = [fit[name] for name in target.peers if name in fit]
        if mine is None or (target.peers and not peers):
            continue
        if not target.peers:
            ratio = of_best = mine["fraction_of_ceiling"]
        else:
            best = [max(both) for both in zip(*(peer["samples"] for peer in peers))]
            ratio = statistics.median(a / b for a, b in zip(mine["samples"], best))
            of_best = mine["best"] / max(peer["best"] for peer in peers)
        found.append(
            {
                "target": target.name, "threads": threads, "at_least": target.at_least,
                "ours": mine["engine"], "ratio": ratio, "ratio_of_best": of_best,
                "met": ratio >= target.at_least,
            }
        )  # fmt: skip
    return found


def report(document: dict[str, Any]) -> None:
    """Tables for people."""
    rows = document["rows"]
    groups = dict.fromkeys((row["form"], row["threads"]) for row in rows)
    for form, threads in groups:
        print(f"\n{form} (llama.cpp: {GGUF[form]}), {threads} threads")
        print(
            f"{'':22}{'engine':20}{'tok/s':>9}{'best':>9}{'spread':>8}{'CPU ms/tok':>12}"
            f"{'of ceiling':>12}{'others':>8}"
        )
        last = None
        for row in rows:
            if (row["form"], row["threads"]) != (form, threads):
                continue
            size = f"batch {row['batch']}" if row["pass"] == "decode" else row["prompt_tokens"]
            label = f"{row['pass']} {size}"
            print(
                f"{label if label != last else '':22}{row['engine']:20}{row['tokens_per_s']:9.1f}"
                f"{row['best']:9.1f}{row['spread']:8.0%}{1e3 * row['cpu_s_per_token']:12.2f}"
                f"{row['fraction_of_ceiling']:12.0%}{row['others_cpu']:8.1%}"
            )
            last = label
    if document["missing"]:
        print("\nNot measured")
    for entry in document["missing"]:
        print(f"  {entry['engine']} {entry['form']}: {entry['why']}")
    print("\nEngines")
    for kind, facts in document["config"]["engines_are"].items():
        print(f"  {kind}: {' '.join(f'{name} {value}' for name, value in facts.items())}")
    print("\nFirst greedy tokens (a random model has near ties: quantised forms may differ)")
    for entry in document["greedy"]:
        print(f"  {entry['form']:10}{entry['engine']:20}{entry['ids']}")
    print("\nTargets (ratio: median of rounds, and best over best)")
    for entry in document["targets"]:
        print(
            f"  {entry['threads']} threads  {entry['target']:34}{entry['ratio']:7.2f}"
            f"{entry['ratio_of_best']:7.2f}  at least {entry['at_least']}: "
            f"{'met' if entry['met'] else 'missed'}"
        )


def document_of(bench: Bench) -> dict[str, Any]:
    """Everything in one object."""
    options = bench.options
    order = list(options.engines)
    keys = sorted(
        bench.samples,
        key=lambda key: (
            FORMS.index(key[0]), key[2], bench.cases.index(key[3]), order.index(key[1])
        ),
    )  # fmt: skip
    rows = [row_of(key, bench.samples[key]) for key in keys]
    return {
        "benchmark": "decode", "rows": rows,
        "targets": [one for threads in options.threads for one in ratios(rows, threads)],
        "missing": [
            {"engine": name, "form": form, "why": bench.pool.missing[kind, form]}
            for name, (kind, _) in ENGINES.items() if name in options.engines
            for form in options.forms if (kind, form) in bench.pool.missing
        ],
        "greedy": [
            {"form": form, "engine": name, "ids": ids} for (form, name), ids in bench.agree.items()
        ],
        "config": {
            **{name: value if not isinstance(value, Path) else str(value)
               for name, value in vars(options).items()},
            "step_gb": {
                form: {batch: bench.sizes.step_bytes(batch, form) / 1e9 for batch in
                       options.batches} for form in options.forms
            },
            "engines_are": bench.pool.facts, **environment(),
            "seconds": time.perf_counter() - bench.begun,
        },
    }  # fmt: skip


# ---- command line ----

FIELDS = [field.name for field in dataclasses.fields(Sizes)]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """One option for each field of Sizes, and where the files are kept."""
    for field in dataclasses.fields(Sizes):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=int, default=field.default, help="of the random model")
    kept = Path(tempfile.gettempdir()) / "growmoe-benchmarks"
    parser.add_argument("--cache", type=Path, default=kept, help="folder that keeps the model")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--prompt", type=int, default=32, help="tokens of a prompt before decoding")
    add("--tokens", type=int, default=64, help="decoding steps")
    add("--prefill", type=int, default=512, help="tokens of a prompt that is timed; 0: none")
    add("--repeats", type=int, default=5)
    add("--resident", type=int, default=6, help="engines in memory at a time, the probe included")
    add("--probe-mib", type=int, default=512, help="memory that the bandwidth probe reads")
    add("--python", action="append", default=[], metavar="KIND=PATH",
        help="run this kind of engine with another interpreter")  # fmt: skip
    add("--out", type=Path, help="JSON file")
    add("--quick", action="store_true", help="bfloat16, one thread, batch 1 and 8, two rounds")
    add_sizes(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.forms, options.threads, options.batches = ["bfloat16"], [1], [1, 8]
        options.repeats, options.tokens = 2, 16
    return options


def main() -> int:
    """Measure, print, end in the JSON line."""
    bench = Bench(arguments())
    bench.run()
    document = document_of(bench)
    report(document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
