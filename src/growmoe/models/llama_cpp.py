"""What llama.cpp itself says about a GGUF file: log-probabilities and token ids.

Needs xllamacpp, a build of llama.cpp for Python, which is imported when a file is opened.
"""

import json
import secrets
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.gguf_header import read_gguf_header


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with keys and values cached in float32.

    Answers for `context` tokens at most. Close it, or use it in a `with` statement.
    """

    def __init__(self, gguf: Path, context: int = 512, threads: int = 1) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise UsageError("running llama.cpp needs xllamacpp: pip install xllamacpp") from None
        if not gguf.is_file():
            raise UsageError(f"{gguf} does not exist")
        self.path, self.context = gguf, context
        self.vocab_size = _vocab_size(gguf)
        self._key = secrets.token_hex(16)
        options = xllamacpp.CommonParams()
        options.model.path = str(gguf)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = context, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.fit_params = options.warmup = options.ctx_shift = False
        options.api_keys = [self._key]
        options.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(options)
        except RuntimeError as error:
            raise GrowmoeError(f"{gguf}: llama.cpp cannot load it ({error})") from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def log_probs(
        self,
        ids: Sequence[int],
        positions: Sequence[int] | None = None,
        top: int | None = None,
    ) -> Tensor:
        """Log-probabilities [P,V] of the token after each of the given positions of `ids`.

        Row p is about what follows ids[: positions[p] + 1]; all positions by default. Every
        position is one request whose answer names every token, which takes a second or more for
        50,000 tokens; with `top` it names so many, the likeliest, and the others are NaN.
        """
        wanted = range(len(ids)) if positions is None else positions
        if len(ids) >= self.context:
            raise UsageError(f"{len(ids)} tokens do not fit a context of {self.context}")
        # An answer has no log-probabilities when its token is half a character or ends the text, so
        # the sampler (which they are taken before) is steered to a plain letter.
        steer = [[self.tokenize("a")[0], 1e6]]
        count = min(top or self.vocab_size, self.vocab_size)
        rows = torch.full((len(wanted), self.vocab_size), float("nan"))
        for row, position in zip(rows, wanted, strict=True):
            answer = self._server.handle_completions(
                {
                    "prompt": list(ids[: position + 1]), "n_predict": 1, "max_tokens": 1,
                    "n_probs": count, "temperature": 0, "cache_prompt": True, "logit_bias": steer,
                }
            )  # fmt: skip
            try:
                entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            except (KeyError, IndexError, TypeError):
                raise GrowmoeError(
                    f"{self.path}: llama.cpp gave no log-probabilities ({str(answer)[:300]})"
                ) from None
            index = torch.tensor([entry["id"] for entry in entries])
            values = [entry["logprob"] for entry in entries]
            row[index] = torch.tensor([float("nan") if v is None else v for v in values])
        return rows

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text` without those added around it; `special` ones are recognised."""
        body = {"content": text, "add_special": False, "parse_special": special}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["tokens"]
        except (OSError, ValueError, KeyError) as error:
            raise GrowmoeError(f"{self.path}: llama.cpp cut no text ({error})") from None


def next_token_log_probs(
    gguf: Path, ids: Sequence[int], positions: Sequence[int] | None = None
) -> Tensor:
    """`LlamaCpp.log_probs` of a file that is opened for this one question."""
    with LlamaCpp(gguf, context=max(64, len(ids) + 8)) as engine:
        return engine.log_probs(ids, positions)


def _vocab_size(path: Path) -> int:
    header = read_gguf_header(path)
    if "tokenizer.ggml.tokens" not in header.arrays:  # its server would end the process
        raise GrowmoeError(f"{path} holds no tokenizer, without which llama.cpp answers nothing")
    return header.tensors["token_embd.weight"].shape[0]


def main() -> None:
    """`python -m growmoe.models.llama_cpp FILE OUT`: ids as JSON on standard input; writes the
    log-probabilities of the 1000 likeliest tokens after each, NaN for the others."""
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    ids = json.load(sys.stdin)
    with LlamaCpp(file, context=max(64, len(ids) + 8)) as engine:
        save_file({"log_probs": engine.log_probs(ids, top=1000)}, out)


if __name__ == "__main__":
    try:
        main()
    except GrowmoeError as error:
        sys.exit(str(error))
