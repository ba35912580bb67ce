"""generate: continue prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from growmoe.artifacts import load_for_text, sizes
from growmoe.inference.generate import Sampling, stream_text
from growmoe.recipe import GenerateStage


def run(
    spec: GenerateStage,
    staged: Path | None,
    work: Path | None,
    show: Callable[[str], None] = lambda piece: None,
) -> dict[str, Any]:
    """Continue every prompt; `show` gets the text piece by piece."""
    model, tokenizer, stop = load_for_text(Path(spec.model))
    sampling = Sampling(spec.max_tokens, spec.temperature, spec.top_p, spec.seed)
    samples = []
    for prompt in spec.prompts:
        show(prompt)
        pieces = []
        for piece in stream_text(model, tokenizer, prompt, sampling, stop):
            show(piece)
            pieces.append(piece)
        show("\n")
        samples.append({"prompt": prompt, "text": "".join(pieces)})
    return {**sizes(model.config), "tokens": 0, "flops": 0, "samples": samples}
