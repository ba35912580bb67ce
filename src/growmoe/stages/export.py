"""export: the same model in the form that an engine runs, and proof that it is the same."""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.artifacts import check_sequences, history, lineage_of, note, sizes
from growmoe.errors import GrowmoeError
from growmoe.growth.portable import reshaped
from growmoe.growth.verify import agreement
from growmoe.memory import free_memory
from growmoe.models.checkpoint import Directory, Source, open_source
from growmoe.models.lineage import write_lineage
from growmoe.models.streamed import streamed_logits
from growmoe.models.targets import export_target
from growmoe.publishing import publish_derived
from growmoe.recipe import ExportStage

LLAMA_CPP_TOKENS = 64
# largest difference of log-probabilities: llama.cpp rounds activations to the file's dtype
LLAMA_CPP_BOUND = {"float32": 1e-2, "float16": 0.25, "bfloat16": 1.0}


def run(spec: ExportStage, staged: Path, work: Path) -> dict[str, Any]:
    """Write for one engine, reload through its own or transformers' class, compare logits."""
    path = Path(spec.model)
    source = open_source(path)
    target = export_target(source.config, spec.engine, spec.portable, spec.as_gguf)
    for text in target.notes:
        print(f"note: {text}", file=sys.stderr)
    if target.steps:
        print(f"changed form: {', '.join(target.steps)}", file=sys.stderr)
    derived = reshaped(source, target.steps, spec.seed)
    if spec.as_gguf:
        return _gguf(spec, staged, path, source, derived)

    def public_check(folder: Path, sequences: list[Tensor]) -> dict[str, str]:
        if spec.engine == "llama.cpp":  # a form for its converter, which no public class reads
            return {"llama.cpp": "written for its converter, which was not run"}
        said = {"transformers": _through_transformers(folder, sequences)}
        return said if spec.engine == "transformers" else {**said, spec.engine: "not run"}

    return publish_derived(
        staged, work, path, source, derived, lossy=(), operation="export", spec=spec,
        family=target.family, public_check=public_check,
    )  # fmt: skip


def _through_transformers(folder: Path, sequences: list[Tensor]) -> str:
    """Reload with AutoModelForCausalLM and compare with our reading of the same files.

    Raises GrowmoeError when a tensor was not found or the logits differ by more than ten times
    the noise of float32 arithmetic.
    """
    written = Directory(folder)
    if written.config.bytes("float32") > 0.8 * free_memory():
        return "not reloaded: it does not fit into memory"
    note("reloading with transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if written.family == "growmoe":
        import growmoe.models.hf  # noqa: F401
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(kind):
            raise GrowmoeError(f"transformers reports {kind} {sorted(loading[kind])[:3]}")
    with torch.no_grad():
        public = [model.eval()(ids[None]).logits[0].float() for ids in sequences]
    del model
    gc.collect()
    largest, tolerance = agreement(written, public, sequences, free_memory())
    if largest > tolerance:
        raise GrowmoeError(
            f"transformers gives other logits: largest difference {largest:.3g}, tolerance "
            f"{tolerance:.3g}; nothing was published"
        )
    return f"logits compared, largest difference {largest:.2g}"


def _gguf(
    spec: ExportStage, staged: Path, path: Path, source: Source, derived: Source
) -> dict[str, Any]:
    """One GGUF file, checked by llama.cpp itself where it is installed."""
    from growmoe.models.gguf_write import write_gguf

    dtype = spec.dtype or source.dtype
    origin = path if path.suffix == ".gguf" else None
    has_tokenizer = path.is_dir() and (path / "tokenizer.json").exists()
    file = staged / "model.gguf"
    write_gguf(file, derived, path if has_tokenizer else None, dtype, origin_gguf=origin)
    said, checks = "not run: left out (--no-verify)", {"unverified": True}
    if spec.verify:
        said, checks = _through_llama_cpp(spec, path, source, file, dtype)
    parent = lineage_of(path)
    totals = ("tokens_total", "flops_total", "dense_spent")
    lineage = {
        "name": spec.name, "operation": "export", "parent": str(path),
        "options": spec.model_dump(mode="json", exclude_none=True), "declared_exact": True,
        "checks": checks, "engines": {"llama.cpp": said},
        "history": history(parent, "export", path, exact=True),
        **{key: parent[key] for key in totals if key in parent},
    }  # fmt: skip
    write_lineage(staged, lineage, source.config)
    print(f"check: llama.cpp: {said}", file=sys.stderr)
    return {
        **sizes(derived.config), "tokens": 0, "flops": 0, "file": "model.gguf",
        "bytes": file.stat().st_size, "engines": lineage["engines"], "check": checks,
    }  # fmt: skip


def _through_llama_cpp(
    spec: ExportStage, path: Path, source: Source, file: Path, dtype: str
) -> tuple[str, dict[str, Any]]:
    """Log-probabilities on real tokens, in a process of its own (an assertion inside llama.cpp
    ends the process it is in)."""
    import importlib.util

    if importlib.util.find_spec("xllamacpp") is None:
        return "not run: pip install xllamacpp", {"unverified": True}
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return "not run: a file without a tokenizer answers nothing", {"unverified": True}
    sequences, origin = check_sequences(path, source.config, spec.text, spec.data, spec.seed)
    ids = sequences[0][:LLAMA_CPP_TOKENS]
    ours = streamed_logits(source, [ids], "float32")[0].log_softmax(-1)
    note("the same tokens in llama.cpp")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "log_probs.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", "growmoe.models.llama_cpp", str(file), str(answer)],
            input=json.dumps(ids.tolist()), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise GrowmoeError(f"llama.cpp does not run {file.name}: {reason}")
        from safetensors.torch import load_file

        theirs = load_file(answer)["log_probs"]
    given = torch.isfinite(theirs)
    if not given.any(dim=1).all():
        raise GrowmoeError("llama.cpp's log-probabilities are not finite; nothing was published")
    largest = float((ours - theirs)[given].abs().max())
    found = {
        "text": origin, "tokens": len(ids), "max_abs_log_prob_diff": largest,
        "mean_abs_log_prob_diff": float((ours - theirs)[given].abs().mean()),
        "bound": LLAMA_CPP_BOUND[dtype],
    }  # fmt: skip
    if not largest <= LLAMA_CPP_BOUND[dtype]:
        raise GrowmoeError(
            f"llama.cpp gives other log-probabilities: largest difference {largest:.3g}, bound "
            f"{LLAMA_CPP_BOUND[dtype]} for {dtype}; nothing was published"
        )
    said = f"log-probabilities of {len(ids)} tokens compared, largest difference {largest:.2g}"
    return said, found
