"""Engines under traffic, each in a process of its own: `engine_worker.py` with one more command.

`traffic` plays a schedule of requests against the engine at their times, whether or not it keeps
up, and says when each token of each request came.
"""

import threading
import time
from typing import Any

import engine_worker

Schedule = list[tuple[float, list[int], int]]
"""(seconds after the start, prompt, tokens of the answer)."""
Times = list[list[float]]
"""For each request when its tokens came, in seconds after the start. llama.cpp sends a token that
ends inside a character with the next one, at the same time."""


class Growmoe(engine_worker.Growmoe):
    """Ours in this process: requests are added and steps made by one thread."""

    def __init__(self, model: str, form: str, threads: int, options: dict[str, Any]) -> None:
        from pathlib import Path

        import torch

        from growmoe.errors import UsageError
        from growmoe.inference.llm import LLM
        from growmoe.inference.loading import load

        torch.set_num_threads(threads)
        self.settings: dict[str, Any] = {}
        try:
            loaded = load(Path(model), form)
        except UsageError as error:
            raise engine_worker.Missing(str(error)) from None
        self.fresh = lambda **settings: LLM(loaded, **settings).engine

    def traffic(self, schedule: Schedule, settings: dict[str, Any]) -> dict[str, Any]:
        """A new engine with these settings, so that no cache knows the prompts."""
        from growmoe.inference.requests import Request, Sampling

        self.engine = self.fresh(**settings)
        self.greedy([1, 2, 3], 2, "")
        times: Times = [[] for _ in schedule]
        owners: dict[int, int] = {}
        coming, begun = 0, time.perf_counter()
        while coming < len(schedule) or self.engine.has_work():
            now = time.perf_counter() - begun
            while coming < len(schedule) and schedule[coming][0] <= now:
                _, prompt, tokens = schedule[coming]
                sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
                owners[self.engine.add(Request(list(prompt), sampling))] = coming
                coming += 1
            if not self.engine.has_work():
                time.sleep(max(0.0, schedule[coming][0] - (time.perf_counter() - begun)))
                continue
            outputs, now = self.engine.step(), time.perf_counter() - begun
            for output in outputs:
                if output.finish_reason == "error":
                    raise RuntimeError(f"growmoe: {output.error}")
                times[owners[output.request.id]] += [now] * len(output.token_ids)
        stats = self.engine.stats()
        return {
            "times": times, "cached_tokens": stats.cached_tokens, "preemptions": stats.preemptions,
        }  # fmt: skip


class LlamaCpp(engine_worker.LlamaCpp):
    """llama.cpp's server with a thread for each request, which is told of every token."""

    def traffic(self, schedule: Schedule, settings: dict[str, Any]) -> dict[str, Any]:
        """Its prompt cache is on, as it comes; `settings` are more fields of the requests."""
        self._ask([1, 2, 3], -1, 2)
        times: Times = [[] for _ in schedule]
        failures: list[str] = []
        begun = time.perf_counter()

        def ask(number: int, prompt: list[int], tokens: int) -> None:
            def came(chunk: Any) -> None:
                now = time.perf_counter() - begun
                for one in chunk if isinstance(chunk, list) else [chunk]:
                    if not isinstance(one, dict) or "choices" not in one:
                        failures.append(str(one)[:300])
                    elif one["choices"] and one["choices"][0].get("finish_reason") is None:
                        times[number].append(now)

            request = {
                "prompt": prompt, "n_predict": tokens, "max_tokens": tokens, "temperature": 0,
                "ignore_eos": True, "stream": True, **settings,
            }  # fmt: skip
            self.server.handle_completions(request, came)

        asking = []
        for number, (moment, prompt, tokens) in enumerate(schedule):
            time.sleep(max(0.0, moment - (time.perf_counter() - begun)))
            asking.append(threading.Thread(target=ask, args=(number, prompt, tokens)))
            asking[-1].start()
        for thread in asking:
            thread.join()
        if failures:
            raise RuntimeError(f"llama.cpp: {failures[0]}")
        return {"times": times}


if __name__ == "__main__":
    engine_worker.KINDS = {"growmoe": Growmoe, "llama.cpp": LlamaCpp}
    engine_worker.main()
