"""The Triton kernels of a decoding step against plain torch, under the interpreter or on a GPU."""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# the first import of growmoe's kernels: it turns the interpreter on
from test_triton import DEVICE, GPU, choices, inputs, table

# isort: split

from conftest import tiny_model
from growmoe.errors import GrowmoeError
from growmoe.models.config import MoEConfig
from growmoe.models.moe import MoE
from growmoe.models.transformer import Transformer
from growmoe.ops import experts as dispatch
from growmoe.ops import triton_direct, triton_experts, triton_routing, tuning
from growmoe.ops.experts import ExpertWeights, expert_mlp, expert_mlp_reference
from growmoe.ops.mapping import MappingTable
from growmoe.ops.tuning import Tile

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROOT = Path(__file__).resolve().parent.parent


# --- experts without a mapping table ---


def biased(w: ExpertWeights) -> ExpertWeights:
    E, R, D = w.up_ERD.shape
    return w._replace(
        up_bias_ER=torch.randn(E, R).to(w.up_ERD), down_bias_ED=torch.randn(E, D).to(w.up_ERD)
    )


def check_direct(
    T: int, K: int, E: int, D: int, F: int, gelu: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    chosen = choices(T, K, E).to(DEVICE)
    x, weights, up, down = (t.detach() for t in inputs(T, K, E, D, F, dtype))
    w = ExpertWeights(up[:, :F] if gelu else up, down)
    w = biased(w) if bias else w
    found = triton_direct.direct_experts(x, chosen, weights, *w)
    assert found.dtype == dtype
    wide = ExpertWeights(*(None if t is None else t.float() for t in w))
    sorted_by_expert = MappingTable(*table(chosen.cpu(), E))
    activation: Any = "gelu" if gelu else "swiglu"
    right = expert_mlp_reference(x.float(), sorted_by_expert, weights, wide, activation)
    close = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found.float(), right, **close)


@given(
    st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_direct_experts_equal_the_reference(
    rows: tuple[int, int, int], widths: tuple[int, int], gelu: bool, bias: bool
) -> None:
    T, K, E = rows
    torch.manual_seed(sum(widths))
    check_direct(T, min(K, E), E, *widths, gelu=gelu, bias=bias)


def test_direct_experts_take_several_steps_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_direct, "TILE", Tile(1, 4, 16, 4, 2))
    torch.manual_seed(0)
    check_direct(3, 2, 5, 50, 37)
    check_direct(3, 2, 5, 50, 37, dtype=torch.float16)
    check_direct(2, 2, 5, 50, 37, gelu=True, dtype=torch.bfloat16)


def test_direct_experts_read_only_the_chosen() -> None:
    torch.manual_seed(0)
    x, weights, up, down = (t.detach() for t in inputs(2, 2, 6, 12, 8, torch.float32))
    chosen = torch.tensor([[4, 1], [1, 5]], device=DEVICE)
    for w in (up, down):
        w[[0, 2, 3]] = float("nan")
    assert triton_direct.direct_experts(x, chosen, weights, up, down).isfinite().all()


def test_few_rows_is_the_rule_of_vllm_and_one_token() -> None:
    assert triton_direct.few_rows(1, 8, 8)
    assert triton_direct.few_rows(2, 2, 16)
    assert not triton_direct.few_rows(2, 2, 15)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Triton path for every tensor; names of the kernels as they are launched."""
    launched: list[str] = []
    monkeypatch.setattr(dispatch, "on_triton", lambda x: True)
    monkeypatch.setattr(dispatch, "plain_cpu", lambda x: False)
    monkeypatch.setattr("growmoe.models.router.on_triton", lambda x: True)
    for module in (triton_routing, triton_experts, triton_direct):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name, launched))
    return launched


class Counted:
    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


def moe_model(T: int, **changes: Any) -> tuple[Transformer, Tensor]:
    moe = MoEConfig(**{"experts": (0, 0, 16), "top_k": 2, "ffn_size": 20, **changes})
    model = tiny_model(moe=moe).to(DEVICE)
    return model, torch.randn(1, T, 36, device=DEVICE)


DIRECT = ["_route_kernel", "_direct_up_kernel", "_direct_down_kernel"]
SORTED = [
    "_route_kernel", "_scatter_kernel", "_gated_rows_kernel", "_scattered_rows_kernel",
    "_sum_rows_kernel",
]  # fmt: skip


@pytest.mark.parametrize(("T", "launches"), [(1, DIRECT), (2, DIRECT), (3, SORTED)])
def test_a_moe_layer_sorts_only_where_rows_are_many(
    T: int, launches: list[str], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 experts, two per token: up to two tokens the mapping table is never made."""
    torch.manual_seed(0)
    model, x = moe_model(T)
    layer = model.layers[2].moe
    assert isinstance(layer, MoE)
    with torch.no_grad():
        found = layer(x, None)[0]
    assert counted == launches
    monkeypatch.undo()
    torch.testing.assert_close(found, layer(x, None)[0], **CLOSE)


def test_training_always_sorts(counted: list[str]) -> None:
    model, x = moe_model(1)
    layer = model.layers[2].moe
    assert isinstance(layer, MoE)
    layer(x, None)[0].sum().backward()
    assert counted[:5] == SORTED
    assert layer.experts.up.grad is not None


def test_what_the_sorted_kernels_cannot_do_is_done_directly_in_a_decoding_step(
    counted: list[str],
) -> None:
    """GELU, biases, odd sizes: torch's way would ask the GPU for the counts."""
    torch.manual_seed(0)
    x, weights, up, down = (t.detach() for t in inputs(7, 2, 3, 11, 5, torch.float32))
    w = biased(ExpertWeights(up[:, :5], down))
    chosen = choices(7, 2, 3).to(DEVICE)
    order, counts = table(chosen.cpu(), 3)
    found = expert_mlp(x, MappingTable(order, counts, chosen), weights, w, "gelu")
    assert counted == DIRECT[1:]
    right = expert_mlp_reference(x, MappingTable(order, counts), weights, w, "gelu")
    torch.testing.assert_close(found, right, **CLOSE)
    expert_mlp(x, MappingTable(order, counts), weights, w, "gelu")  # rows may have been dropped
    assert len(counted) == 2


# --- compiled for a GPU, on a machine without one ---

COMPILE = """
import importlib, pathlib, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for line in sys.argv[1:]:
    module, name, types, constants, warps, stages = eval(line)
    kernel = getattr(importlib.import_module("growmoe.ops." + module), name)
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    # as a launch finds it: aligned pointers, sizes that are multiples of 16
    sixteen = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names)
               if signature[arg].startswith("*") or arg in ("D", "F", "C", "cols", "inner")}
    source = ASTSource(kernel, signature, constants, sixteen)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"STACK:([0-9]+)", usage).group(1)
    print(name, done.metadata.shared, "mma" in done.asm["ptx"], spilled)
"""


def compiled(
    *kernels: tuple[str, str, dict[str, str], dict[str, Any], int, int],
) -> list[list[str]]:
    """Compile kernels for sm_90 by a process without the interpreter; [name, bytes of shared
    memory, uses tensor cores, bytes of spilled registers] of each."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "ptxas").exists() or not (tools / "cuobjdump").exists():
        pytest.skip("this triton comes without NVIDIA's tools")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *map(repr, kernels)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_direct_experts_compile_for_sm90() -> None:
    pointers = dict.fromkeys(("x_ptr", "h_ptr", "up_ptr", "down_ptr", "bias_ptr", "y_ptr"), "*bf16")
    types = {**pointers, "experts_ptr": "*i64", "weights_ptr": "*fp32", "D": "i32", "F": "i32"}
    tile = triton_direct.TILE
    blocks = {"TOP_K": 2, "BLOCK_N": tile.cols, "BLOCK_K": tile.inner}
    lines = compiled(
        *(
            ("triton_direct", "_direct_up_kernel", types,
             {**blocks, "SWIGLU": swiglu, "HAS_BIAS": bias}, tile.warps, 2)
            for swiglu, bias in ((True, False), (False, True))
        ),
        (
            "triton_direct", "_direct_down_kernel", types, {**blocks, "HAS_BIAS": False},
            tile.warps, 2,
        ),
    )  # fmt: skip
    assert [line[0] for line in lines] == ["_direct_up_kernel"] * 2 + ["_direct_down_kernel"]
    assert all(line[3] == "0" for line in lines)


def test_sorted_experts_compile_for_sm90() -> None:
    """The router and the kernels of many rows, with the tiles of bfloat16."""
    data = dict.fromkeys(("x_ptr", "up_ptr", "h_ptr", "pre_ptr", "w_ptr", "out_ptr"), "*bf16")
    data |= dict.fromkeys(("left_ptr", "rows_ptr", "y_ptr"), "*bf16")
    floats = dict.fromkeys(("logits_ptr", "bias_ptr", "scores_ptr", "weights_ptr", "scale_ptr"))
    longs = dict.fromkeys(("order_ptr", "counts_ptr", "experts_ptr"), "*i64")
    names = ("inverse_ptr", "histograms_ptr", "starts_ptr", "offsets_ptr", "ticket_ptr")
    sizes = ("D", "F", "E", "T", "K", "cols", "inner", "stride_col", "stride_inner", "blocks")
    types = {
        **data, **dict.fromkeys(floats, "*fp32"), **longs, **dict.fromkeys(names, "*i32"),
        **dict.fromkeys(sizes, "i32"),
    }  # fmt: skip
    route = {"SOFTMAX": True, "RENORMALIZE": True, "HAS_BIAS": True, "BLOCK_B": 16}
    tile = {"BLOCK_T": 16, "BLOCK_E": 64}
    kernels: list[Any] = [
        ("triton_routing", "_route_kernel", types, {**route, **tile, "SINGLE": False}, 4, 2),
        ("triton_routing", "_scatter_kernel", types, tile, 4, 2),
        (
            "triton_experts", "_sum_rows_kernel", types,
            {"TOP_K": 2, "BLOCK_T": 4, "BLOCK_D": 512, "BLOCK_E": 64}, 4, 2,
        ),
    ]  # fmt: skip
    for name, options in (("gated", {"TOP_K": 2, "KEEP": False}), ("rows", {"SCALE": True})):
        kernel = "_gated_rows_kernel" if name == "gated" else "_scattered_rows_kernel"
        for chosen in triton_experts.TILES[name, torch.bfloat16][::3]:  # lowest, highest
            blocks = {"BLOCK_M": chosen.rows, "BLOCK_N": chosen.cols, "BLOCK_K": chosen.inner}
            constants = {**options, **blocks, "BLOCK_E": 64, "GROUP": 8, "UPCAST": False}
            kernels.append(
                ("triton_experts", kernel, types, constants, chosen.warps, chosen.stages)
            )
    lines = compiled(*kernels)
    assert [line[2] for line in lines] == ["False"] * 3 + ["True"] * 4  # tensor cores
    assert all(line[3] == "0" for line in lines), lines


# --- tuned blocks ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "Some Card (80 GB)")
    return tmp_path


def tuned(kernel: str, rows: int, E: int = 4, dtype: torch.dtype = torch.float32) -> Tile | None:
    return tuning.tuned_tile(kernel, torch.device(DEVICE), dtype, (E, 24, 16), rows)


def test_tuned_tiles_are_found_by_size_device_and_dtype(folder: Path) -> None:
    small, large = Tile(16, 16, 32, 2, 3), Tile(32, 32, 16, 4, 2)
    path = tuning.write(
        folder, (4, 24, 16), "float32", "Some Card (80 GB)", {"gated": {256: large, 2: small}}
    )
    assert path.name == "E=4,D=24,F=16,float32,Some_Card_80_GB_.json"
    assert [tuned("gated", rows) for rows in (0, 1, 2, 16, 40, 9999)] == [small] * 4 + [large] * 2
    assert tuned("rows", 2) is None
    assert tuned("gated", 2, E=5) is None
    assert tuned("gated", 2, dtype=torch.bfloat16) is None


def test_tiles_of_another_triton_do_not_count(folder: Path) -> None:
    path = tuning.write(
        folder, (4, 24, 16), "float32", "Some Card (80 GB)", {"rows": {1: Tile(16, 16, 16, 1, 1)}}
    )
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "triton": "2.1.0"}))
    assert tuned("rows", 1) is None
    tuning._read.cache_clear()
    path.write_text(json.dumps({**body, "triton": ".".join(body["triton"].split(".")[:2])}))
    assert tuned("rows", 1) == Tile(16, 16, 16, 1, 1)


@pytest.mark.parametrize(
    "tiles",
    [
        {"gated": {"1": {"rows": 8, "cols": 16, "inner": 16, "warps": 4, "stages": 2}}},
        {"gated": {"1": {"rows": 16, "cols": 48, "inner": 16, "warps": 4, "stages": 2}}},
        {"gated": {"1": {"rows": 16, "cols": 16, "inner": 16, "warps": 3, "stages": 2}}},
        {"gated": {"1": {"rows": 16}}},
        {"gated": {"few": {"rows": 16, "cols": 16, "inner": 16, "warps": 4, "stages": 2}}},
        {"other": {"1": {"rows": 16, "cols": 16, "inner": 16, "warps": 4, "stages": 2}}},
        {"gated": []},
        [1],
    ],
)
def test_a_broken_file_is_named(tiles: Any, folder: Path) -> None:
    path = tuning.write(folder, (4, 24, 16), "float32", "Some Card (80 GB)", {})
    path.write_text(json.dumps({**json.loads(path.read_text()), "tiles": tiles}))
    with pytest.raises(GrowmoeError, match=r"80_GB_\.json does not hold tuned blocks"):
        tuned("gated", 1)


def test_the_kernels_use_tuned_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only found: the launch gets these blocks, and the result stays."""
    torch.manual_seed(0)
    leaves = [t.detach() for t in inputs(6, 2, 4, 24, 16, torch.float32)]
    x, weights, up, down = leaves
    chosen = choices(6, 2, 4).to(DEVICE)
    order, counts = table(chosen.cpu(), 4)
    plain = triton_experts.moe_experts(x, order, counts, weights, up, down)
    tile, line = Tile(16, 16, 16, 2, 3), Tile(1, 2, 4, 1, 1)
    tuning._read.cache_clear()
    tuning.write(
        folder, (4, 24, 16), "float32", "Some Card (80 GB)",
        {
            "gated": {12: tile}, "rows": {12: tile}, "direct_up": {12: line},
            "direct_down": {1: line},
        },
    )  # fmt: skip
    used: list[tuple[str, int, int]] = []
    for module in (triton_experts, triton_direct):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, Seen(kernel, name, used))
    found = triton_experts.moe_experts(x, order, counts, weights, up, down)
    torch.testing.assert_close(found, plain, **CLOSE)
    direct = triton_direct.direct_experts(x, chosen, weights, up, down)
    torch.testing.assert_close(direct, plain, **CLOSE)
    assert used == [
        ("_gated_rows_kernel", 16, 2), ("_scattered_rows_kernel", 16, 2),
        ("_direct_up_kernel", 4, 1), ("_direct_down_kernel", 4, 1),
    ]  # fmt: skip


@pytest.mark.skipif(GPU, reason="there is a GPU to tune")
@pytest.mark.parametrize(
    "command",
    ["tune_moe.py --experts 8 --hidden 64 --width 64 --top-k 2 --out", "gpu_decode.py --cache"],
)
def test_a_benchmark_of_a_gpu_refuses_to_run_without_one(command: str, tmp_path: Path) -> None:
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "there is none" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_search_keeps_the_fastest_tile_that_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of tune_moe.py but the clock: here fewer columns are faster, and too few wrong."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tune_moe = importlib.import_module("tune_moe")
    options = argparse.Namespace(
        experts=8, hidden=24, width=16, top_k=2, dtype="float32", tokens=(1, 5)
    )
    calls = tune_moe.calls
    now: list[Tile | None] = []

    def watched(t: dict[str, Tensor]) -> dict[str, Any]:
        def of(call: Any, tile: Tile | None) -> Tensor:
            now[:] = [tile]
            return call(tile) * (2 if tile is not None and tile.cols == 16 else 1)

        return {name: functools.partial(of, call) for name, call in calls(t).items()}

    def clock(call: Any) -> float:
        call()
        return 500.0 if now[0] is None else now[0].cols

    monkeypatch.setattr(tune_moe, "calls", watched)
    monkeypatch.setattr(tune_moe, "milliseconds", clock)
    tiles = [Tile(16, cols, 16, 4, 2) for cols in (64, 16, 32)]
    monkeypatch.setattr(tune_moe, "grid", lambda kernel, rows: iter(tiles))
    found = tune_moe.tune(options, DEVICE)
    best = tiles[2]
    assert found == {
        "gated": {10: best}, "rows": {10: best}, "direct_up": {2: best}, "direct_down": {2: best},
    }  # fmt: skip


class Seen:
    def __init__(self, kernel: Any, name: str, used: list[tuple[str, int, int]]) -> None:
        self.kernel, self.name, self.used = kernel, name, used

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            if "num_warps" in options:
                self.used.append((self.name, options["BLOCK_K"], options["num_warps"]))
            self.kernel[grid](*arguments, **options)

        return launch


def test_shipped_files_can_be_read() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        body = json.loads(path.read_text(encoding="utf-8"))
        sizes = (body["experts"], body["hidden"], body["width"])
        assert path.name == tuning.file_name(sizes, body["dtype"], body["device"])
        tuning._read(tuning.FOLDER, sizes, body["dtype"], body["device"])
