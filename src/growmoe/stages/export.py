"""export: the same model in the form that an engine runs, and proof that it is the same."""

import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growmoe.artifacts import (
    check_sequences,
    history,
    lineage_of,
    note,
    report_closeness,
    sizes,
)
from growmoe.errors import GrowmoeError
from growmoe.growth.portable import reshaped
from growmoe.growth.verify import Rounded, agreement, closeness
from growmoe.memory import free_memory
from growmoe.models.checkpoint import Directory, Source, open_source
from growmoe.models.lineage import write_lineage
from growmoe.models.stored import LEFT_DTYPE, quantizing_notes, why_rounded
from growmoe.models.streamed import streamed_logits
from growmoe.models.targets import export_target
from growmoe.publishing import publish_derived
from growmoe.recipe import ExportStage

LLAMA_CPP_TOKENS = 64
# largest difference of log-probabilities: llama.cpp rounds activations to the file's dtype
LLAMA_CPP_BOUND = {"float32": 1e-2, "float16": 0.25, "bfloat16": 1.0}
# To 8 bits for quantised weights, after which a router may choose another expert. So the mean
# difference is bounded there, by this part of the spread of our own log-probabilities.
LLAMA_CPP_SHARE = 0.15


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
    lossy: tuple[str, ...] = ()
    if spec.quantize:
        for text in quantizing_notes(derived.config, spec.engine):
            print(f"note: {text}", file=sys.stderr)
        lossy = (why_rounded(spec.quantize),)
    if spec.as_gguf:
        return _gguf(spec, staged, path, source, derived)

    def public_check(folder: Path, sequences: list[Tensor]) -> dict[str, str]:
        if spec.engine == "llama.cpp":  # a form for its converter, which no public class reads
            return {"llama.cpp": "written for its converter, which was not run"}
        said = {"transformers": _through_transformers(folder, sequences)}
        return said if spec.engine == "transformers" else {**said, spec.engine: "not run"}

    return publish_derived(
        staged, work, path, source, derived, lossy=lossy, operation="export", spec=spec,
        family=target.family, form=spec.quantize, public_check=public_check,
    )  # fmt: skip


def _through_transformers(folder: Path, sequences: list[Tensor]) -> str:
    """Reload with AutoModelForCausalLM and compare with our reading of the same files.

    Raises GrowmoeError when a tensor was not found or the logits differ by more than ten times
    the noise of float32 arithmetic.
    """
    written = Directory(folder)
    if written.config.bytes("float32") > 0.8 * free_memory():
        return "not reloaded: it does not fit into memory"
    options: dict[str, Any] = {}
    reading: Source = written
    if written.quantized:
        if importlib.util.find_spec("compressed_tensors") is None:
            return "not reloaded: it needs compressed-tensors (pip install compressed-tensors)"
        from transformers import CompressedTensorsConfig

        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        reading = Rounded(written, LEFT_DTYPE)  # as that library dequantises
    note("reloading with transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if written.family == "growmoe":
        import growmoe.models.hf  # noqa: F401
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(kind):
            raise GrowmoeError(f"transformers reports {kind} {sorted(loading[kind])[:3]}")
    model.float()  # experts that were dequantised are bfloat16 whatever was asked for
    with torch.no_grad():
        public = [model.eval()(ids[None]).logits[0].float() for ids in sequences]
    del model
    gc.collect()
    largest, tolerance = agreement(reading, public, sequences, free_memory())
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
    from growmoe.models.gguf_write import InGGUF, write_gguf

    form = spec.quantize
    dtype = LEFT_DTYPE if form else spec.dtype or source.dtype
    origin = path if path.suffix == ".gguf" else None
    has_tokenizer = path.is_dir() and (path / "tokenizer.json").exists()
    file = staged / "model.gguf"
    home, text = path if has_tokenizer else None, None
    if spec.verify:
        text = check_sequences(path, source.config, spec.text, spec.data, spec.seed)
    write_gguf(file, derived, home, dtype, origin_gguf=origin, form=form)
    said = "not run: left out (--no-verify)"
    checks: dict[str, Any] = {"unverified": True}
    if text is not None:
        stored = InGGUF(derived, form) if form else source
        said, checks = _through_llama_cpp(path, stored, text, file, form or dtype)
        if form:
            near = closeness(Rounded(source, LEFT_DTYPE), stored, text[0], note)
            report_closeness(near, form)
            checks = {**near.as_dict(), "against": f"weights in {LEFT_DTYPE}", "text": text[1],
                      "llama.cpp": checks}  # fmt: skip
    parent = lineage_of(path)
    totals = ("tokens_total", "flops_total", "dense_spent")
    lineage = {
        "name": spec.name, "operation": "export", "parent": str(path),
        "options": spec.model_dump(mode="json", exclude_none=True), "declared_exact": not form,
        "lossy_because": [why_rounded(form)] if form else [],
        "checks": checks, "engines": {"llama.cpp": said},
        "history": history(parent, "export", path, exact=not form),
        **{key: parent[key] for key in totals if key in parent},
    }  # fmt: skip
    write_lineage(staged, lineage, source.config)
    print(f"check: llama.cpp: {said}", file=sys.stderr)
    return {
        **sizes(derived.config), "tokens": 0, "flops": 0, "file": "model.gguf",
        "bytes": file.stat().st_size, "engines": lineage["engines"], "check": checks,
        "loss_before": checks.get("ce_a"), "loss_after": checks.get("ce_b"),
        "declared_exact": not form,
        **({"lossy_because": lineage["lossy_because"]} if form else {}),
    }  # fmt: skip


def _through_llama_cpp(
    path: Path, source: Source, text: tuple[list[Tensor], str], file: Path, stored: str
) -> tuple[str, dict[str, Any]]:
    """Log-probabilities on real tokens, in a process of its own (an assertion inside llama.cpp
    ends the process it is in)."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "not run: pip install xllamacpp", {"unverified": True}
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return "not run: a file without a tokenizer answers nothing", {"unverified": True}
    sequences, origin = text
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
    differences = (ours - theirs)[given].abs()
    largest, mean = float(differences.max()), float(differences.mean())
    measured, bound = ("largest", LLAMA_CPP_BOUND.get(stored, 0.0))
    if stored not in LLAMA_CPP_BOUND:
        measured, bound = "mean", LLAMA_CPP_SHARE * float(ours[given].std())
    found = {
        "text": origin, "tokens": len(ids), "max_abs_log_prob_diff": largest,
        "mean_abs_log_prob_diff": mean, "bound": bound, "bound_of": measured,
    }  # fmt: skip
    value = largest if measured == "largest" else mean
    if not value <= bound:
        raise GrowmoeError(
            f"llama.cpp gives other log-probabilities: {measured} difference {value:.3g}, bound "
            f"{bound:.3g} for {stored}; nothing was published"
        )
    said = f"log-probabilities of {len(ids)} tokens compared, {measured} difference {value:.2g}"
    return said, found
