"""Memory that serving a model takes, worked out before a weight is read. Imports no torch.

`admit` says what weights, KV cache and one step need, or refuses in one sentence that names what
would fit. Letters as in `config`; N tokens of a step.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from growmoe.errors import UsageError
from growmoe.models.config import DTYPE_BYTES, ModelConfig, moe_layers, tensor_shapes

Form = Literal["float32", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = ("float32", "bfloat16", "int8", "int4")
GROUP = 32
"""Weights along the input dimension that share one bfloat16 scale in int8 and int4."""
_PANEL = 32
BLOCK = 16
"""Tokens of one block of the KV cache."""
SLOT_ALIGN = 64
"""An expert's tensors start at multiples of this in a slot of the expert cache."""
_KV_SHARE = 0.8
"""Part of what weights and a step leave that the KV cache takes when nobody says."""
_FEWEST_BLOCKS = 16
_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a model is to be served."""

    form: Form = "bfloat16"
    kv_dtype: str = "bfloat16"
    step_tokens: int = 512
    """Most tokens of one step."""
    max_sequences: int = 16
    """Most sequences that run at a time."""
    context: int | None = None
    """Longest sequence; None: what the model was made for."""
    kv_gb: float | None = None
    """GiB for the KV cache; None: what fits. Never more than `max_sequences` whole contexts."""
    expert_memory: int | None = None
    """Bytes for experts in memory; None: all of them."""
    native: bool = True
    """The CPU kernels are there; without them torch multiplies integers out at every use."""
    loaded: bool = False
    """The weights are in memory already."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that serving takes, part by part."""

    weights: int
    """Everything but the routed experts that are cached from disk."""
    expert_cache: int
    kv_cache: int
    step: int
    kv_blocks: int
    experts_in_memory: int
    experts: int
    free: int | None = None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.expert_cache + self.kv_cache + self.step

    def report(self) -> dict[str, Any]:
        """For a JSON line."""
        return {**dataclasses.asdict(self), "total": self.total}


def matrix_bytes(rows: int, columns: int, form: Form) -> int:
    """Bytes of the weight of one linear layer, packed: panels of 32 rows; pairs of columns in
    bfloat16, groups of 32 in int8 and int4."""
    rows = _up_to(rows, _PANEL)
    if form == "float32":
        return rows * columns * 4
    if form == "bfloat16":
        return rows * _up_to(columns, 2) * 2
    groups = _up_to(columns, GROUP) // GROUP
    return rows * groups * ((GROUP if form == "int8" else GROUP // 2) + DTYPE_BYTES["bfloat16"])


def _up_to(count: int, step: int) -> int:
    return math.ceil(count / step) * step


def weight_bytes(config: ModelConfig, form: Form) -> tuple[int, int]:
    """(bytes of all but the routed experts, bytes of the routed experts).

    Matrices of linear layers are in `form`, the head of an int4 model in int8 and beside the
    embedding also where they are tied; embeddings are in bfloat16 (float32 models: float32);
    routers, norms, mixing layers and biases in float32.
    """
    head: Form = "int8" if form == "int4" else form
    table = DTYPE_BYTES["float32" if form == "float32" else "bfloat16"]
    others = 0
    for name, shape in tensor_shapes(config).items():
        count = math.prod(shape)
        if name in ("embed.weight", "positions.weight"):
            others += count * table
        elif ".moe.experts." in name:
            continue
        elif len(shape) == 1:
            others += count * _FLOAT
        elif ".router." in name or ".mix." in name:
            others += matrix_bytes(shape[0], shape[1], "float32")
        elif name == "head.weight":
            others += matrix_bytes(shape[0], shape[1], head)
        elif (rows := _packed_rows(config, name, shape[0])) is not None:
            others += matrix_bytes(rows, shape[1], form)
    if config.tied_head:
        others += matrix_bytes(config.vocab_size, config.hidden_size, head)
    count = sum(config.moe.experts) if config.moe else 0
    return others, count * expert_bytes(config, form) if count else 0


def _packed_rows(config: ModelConfig, name: str, rows: int) -> int | None:
    """Rows of what the matrix `name` is packed with; None where another name stands for it."""
    part = name.split(".")[-2]
    if part in ("k", "v", "gate"):
        return None
    if part == "q":
        return rows + 2 * config.num_kv_heads * config.head_dim
    return 2 * _up_to(rows, 16) if part == "up" and config.activation == "swiglu" else rows


def expert_bytes(config: ModelConfig, form: Form) -> int:
    """Bytes of one routed expert, and so of a slot that holds any of them."""
    moe = config.moe
    assert moe is not None
    D, F = config.hidden_size, moe.ffn_size
    rows = 2 * _up_to(F, 16) if config.activation == "swiglu" else F
    parts = [matrix_bytes(rows, D, form), matrix_bytes(D, F, form)]
    if config.mlp_bias:
        parts += [rows * _FLOAT, D * _FLOAT]
    return sum(_up_to(part, SLOT_ALIGN) for part in parts)


def block_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of one block of the KV cache, over all layers."""
    return BLOCK * config.kv_bytes_per_token(kv_dtype)


def step_bytes(config: ModelConfig, tokens: int, sequences: int) -> int:
    """Activations of a step of `tokens` in float32: the residual stream, the widest layer, and
    logits of every sequence with the copy that sampling makes."""
    D = config.hidden_size
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    gated = 3 if config.activation == "swiglu" else 2
    widths = [attention, gated * config.ffn_size]
    if config.moe is not None:
        fixed = gated * config.moe.fixed_ffn_size + D
        widths.append(fixed + config.moe.top_k * (gated * config.moe.ffn_size + 2 * D))
    per_token = 4 * D + max(widths)
    return _FLOAT * (tokens * per_token + 2 * sequences * config.vocab_size)


def _multiplied_out(config: ModelConfig) -> int:
    """Bytes of the largest matrix of integers in float32 and then in bfloat16."""
    plain = ("embed.weight", "positions.weight")
    shapes = tensor_shapes(config).items()
    return 6 * max(math.prod(s) for name, s in shapes if len(s) > 1 and name not in plain)


def footprint(config: ModelConfig, wanted: Wanted, free: int | None = None) -> Footprint:
    """What serving as `wanted` takes; `free` bytes decide about KV blocks where nothing is asked
    for. Raises UsageError when `expert_memory` holds fewer experts than a token visits or is for
    kernels that are missing, or `kv_gb` holds not one block."""
    # torch has no smaller integers than bytes
    unpacked = wanted.form == "int4" and not wanted.native
    weights, experts = weight_bytes(config, "int8" if unpacked else wanted.form)
    count = sum(config.experts_in(layer) for layer in range(config.num_layers))
    held, cached = count, 0
    if wanted.expert_memory is not None:
        held = expert_slots(config, wanted.form, wanted.expert_memory)
        if not wanted.native:
            raise UsageError("experts on disk need the native kernels; see `growmoe doctor`")
        cached = held * expert_bytes(config, wanted.form)
    else:
        weights += experts
    if wanted.loaded:
        weights = cached = 0
    step = step_bytes(config, wanted.step_tokens, wanted.max_sequences)
    if wanted.form in ("int8", "int4") and not wanted.native:
        step += _multiplied_out(config)
    each = block_bytes(config, wanted.kv_dtype)
    most = math.ceil((wanted.context or config.max_positions) / BLOCK) * wanted.max_sequences
    blocks = most
    if wanted.kv_gb is not None:
        blocks = min(most, int(wanted.kv_gb * 2**30) // each)
        if blocks < 1:
            raise UsageError(
                f"--kv-gb {wanted.kv_gb:g} holds no block of {BLOCK} tokens ({size(each)})"
            )
    elif free is not None:
        left = int(_KV_SHARE * max(0, free - weights - cached - step))
        blocks = max(min(_FEWEST_BLOCKS, most), min(most, left // each))
    return Footprint(
        weights=weights, expert_cache=cached, kv_cache=blocks * each, step=step, kv_blocks=blocks,
        experts_in_memory=held, experts=count, free=free,
    )  # fmt: skip


def check_device(device: str, form: Form, offloaded: bool) -> None:
    """Raises UsageError for what runs on CPUs only and is wanted elsewhere."""
    if device == "cpu":
        return
    if form in ("int8", "int4"):
        raise UsageError(f"{form} weights run on CPUs only; give bfloat16 on {device}")
    if offloaded:
        raise UsageError(f"experts on disk run on CPUs only; keep them in memory on {device}")


def expert_slots(config: ModelConfig, form: Form, budget: int) -> int:
    """Experts of `config` that `budget` bytes hold. Raises UsageError when those are fewer than
    one token visits in a layer, or when there are none to hold."""
    if config.moe is None:
        raise UsageError("--expert-memory needs a model with experts, and this one is dense")
    each = expert_bytes(config, form)
    slots = min(budget // each, sum(config.moe.experts))
    if slots < config.moe.top_k:
        raise UsageError(
            f"--expert-memory {size(budget)} holds {slots} experts of {size(each)}, but a token "
            f"visits {config.moe.top_k} at a time; give at least {size(each * config.moe.top_k)}"
        )
    return slots


def admit(config: ModelConfig, wanted: Wanted, free: int, name: str) -> Footprint:
    """The footprint of serving `name`, if that fits into `free` bytes.

    Raises UsageError that says what it needs, what is free and what would fit.
    """
    found = footprint(config, wanted, free)
    if found.total <= free:
        return found
    fits = _what_fits(config, wanted, free)
    advice = " or ".join(fits) if fits else f"give it at least {size(_least(config, wanted))}"
    parts = {
        "weights": found.weights, "expert cache": found.expert_cache,
        "KV cache": found.kv_cache, "a step": found.step,
    }  # fmt: skip
    listed = ", ".join(f"{part} {size(n)}" for part, n in parts.items() if n)
    what = name if wanted.loaded else f"{name} in {wanted.form}"
    raise UsageError(
        f"{what} needs {size(found.total)} of memory ({listed}), but "
        f"{size(free)} are free; {'this would fit: ' if fits else 'nothing fits, '}{advice}"
    )


def _what_fits(config: ModelConfig, wanted: Wanted, free: int) -> list[str]:
    """Single changes of `wanted` that fit, and a change of two where no single one does."""
    found = []
    narrower = () if wanted.loaded else FORMS[FORMS.index(wanted.form) + 1 :]
    form = next((f for f in narrower if _fits(config, wanted, free, form=f)), None)
    if form:
        found.append(f"--weights {form}")
    if wanted.kv_gb is not None and _fits(config, wanted, free, kv_gb=None):
        cache = footprint(config, dataclasses.replace(wanted, kv_gb=None), free).kv_cache
        found.append(f"--kv-gb {_rounded_down(cache / 2**30)}")
    for choice in (wanted.form, *narrower):
        unable = config.moe is None or wanted.loaded or not wanted.native
        if unable or (found and choice != wanted.form):
            break
        budget = _expert_budget(config, dataclasses.replace(wanted, form=choice), free)
        if budget is not None:
            weights = "" if choice == wanted.form else f"--weights {choice} "
            found.append(f"{weights}--expert-memory {budget >> 20}M")
            break
    return found


def _fits(config: ModelConfig, wanted: Wanted, free: int, **changes: Any) -> bool:
    return footprint(config, dataclasses.replace(wanted, **changes), free).total <= free


def _expert_budget(config: ModelConfig, wanted: Wanted, free: int) -> int | None:
    """Whole MiB for experts that leave three quarters of the rest of `free` to them; None when
    not even the experts of one token fit."""
    assert config.moe is not None
    fewest = config.moe.top_k * expert_bytes(config, wanted.form)
    rest = footprint(config, dataclasses.replace(wanted, expert_memory=fewest), free)
    left = free - (rest.total - rest.expert_cache)
    if wanted.kv_gb is None:
        left = (free - rest.weights - rest.step) * 3 // 4
    budget = (left >> 20) << 20
    if budget < fewest or not _fits(config, wanted, free, expert_memory=budget):
        return None
    current = wanted.expert_memory
    return budget if current is None or budget < current else None


def _least(config: ModelConfig, wanted: Wanted) -> int:
    """Bytes of the smallest way to serve the model with this step."""
    smallest = dataclasses.replace(wanted, form="int4", kv_gb=None)
    if config.moe is not None and moe_layers(config) and wanted.native:
        fewest = config.moe.top_k * expert_bytes(config, "int4")
        smallest = dataclasses.replace(smallest, expert_memory=fewest)
    return footprint(config, smallest, free=0).total


def _rounded_down(value: float) -> str:
    """Two digits, never more than the value."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.floor(value / step) * step:.12g}"


def size(count: int) -> str:
    """Bytes for a reader: 512 B, 3.4 MiB, 12.0 GiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def parse_size(text: str) -> int:
    """Bytes of `4G`, `512M`, `100K` or a plain number (powers of 1024; iB or B may follow)."""
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(cleaned[-1:], 1)
    try:
        value = float(cleaned if factor == 1 else cleaned[:-1]) * factor
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"'{text}' is no size; write bytes, or a number with K, M, G or T")
    return int(value)
