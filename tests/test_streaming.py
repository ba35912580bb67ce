"""Models larger than memory: reading, running and writing tensor by tensor; interruptions, failures
and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import InMemory, tiny_model, write_tiny
from growmoe import publishing
from growmoe.cli import main
from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import GrowmoeError
from growmoe.growth.compose import grow
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import Directory, load_model
from growmoe.models.config import MoEConfig, tensor_shapes
from growmoe.models.safetensors_io import TensorFile
from growmoe.models.streamed import streamed_logits
from growmoe.models.upcycling import Upcycling
from growmoe.recipe import GrowStage
from growmoe.tokenizer_check import PROBE, check_tokenizer

SMALL_SHARDS = ["--shard-gb", "3e-5"]  # 32 KiB


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def content(folder: Path) -> dict[str, bytes]:
    """The files that a model is made of; those that tell its story hold times and paths."""
    story = ("growmoe.json", "stage.json", "README.md")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in story}


# ---- reading ----


def example_file(path: Path) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=rng), "half": torch.randn(4, generator=rng).bfloat16(),
        "low": torch.randn(2, 2, 2, generator=rng).half(), "none": torch.zeros(0, 7),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def test_files_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    example_file(path)
    file, wanted = TensorFile(path), safetensors.torch.load_file(path)
    assert set(file.names()) == set(wanted)
    for name, tensor in wanted.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
        assert file.shape(name) == tuple(tensor.shape)


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m")
    views = InMemory(tiny_model()).views
    loaded = safetensors.torch.load_file(model / "model.safetensors")
    assert len(loaded) == len(views)
    assert torch.equal(loaded["model.embed_tokens.weight"], views["embed.weight"])


def read_all(data: bytes, path: Path) -> dict[str, torch.Tensor] | None:
    """What the file holds, or None when it is refused in one sentence that names it."""
    path.write_bytes(data)
    try:
        file = TensorFile(path)
        return {name: file.read(name) for name in file.names()}
    except GrowmoeError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("example") / "x.safetensors"
    example_file(path)
    return path.with_name("fuzzed"), path.read_bytes()


@given(st.binary(max_size=64))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused(example: tuple[Path, bytes], data: bytes) -> None:
    assert not read_all(data, example[0])
    header = len(data).to_bytes(8, "little") + data
    assert not read_all(header, example[0])


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_cut_files_are_refused(example: tuple[Path, bytes], length: int) -> None:
    path, data = example
    if length < len(data):
        path.write_bytes(data[:length])
        with pytest.raises(GrowmoeError, match="not a whole safetensors file"):
            TensorFile(path)  # before anything is read


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_gives_tensors_or_a_sentence(
    example: tuple[Path, bytes], at: int, value: int
) -> None:
    path, data = example
    damaged = bytearray(data)
    damaged[at % len(data)] = value
    found = read_all(bytes(damaged), path)
    assert found is None or len(found) <= 5


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
number = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 10**30])


@given(
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "I64", "X"]) | anything,
        "shape": st.lists(number, max_size=4) | anything,
        "data_offsets": st.lists(number, min_size=2, max_size=2) | anything,
    }) | anything
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_wrong_entries_give_tensors_or_a_sentence(
    example: tuple[Path, bytes], entry: Any
) -> None:  # fmt: skip
    header = json.dumps({"a": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 32
    found = read_all(data, example[0])
    if found is not None:
        tensor = found["a"]
        assert list(tensor.shape) == entry["shape"]
        first, last = entry["data_offsets"]
        assert tensor.numel() * tensor.element_size() == last - first


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 40, b"7", b"1" * 9000,
        b'{"a":{"dtype":"F32","shape":[0,1000000000000000000000],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0,4611686018427387903,9],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U64","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}',
    ],
    ids=lambda header: header[:70].decode("latin-1"),
)  # fmt: skip
def test_hostile_headers_are_refused(example: tuple[Path, bytes], header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header + b"\0" * 64
    assert read_all(data, example[0]) is None


# ---- running ----

GPT = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "qkv_bias": True,
    "o_bias": True, "mlp_bias": True, "family": "growmoe",
}  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [
        {}, {"tied_head": True}, {"qkv_bias": True, "tied_head": True}, {"qk_norm": True}, GPT,
        {**GPT, "tied_head": True},
        {"moe": MoEConfig(experts=(0, 2, 4), top_k=2, ffn_size=20)},
        {"moe": MoEConfig(experts=(4,) * 3, top_k=1, ffn_size=20, mix="softmax2",
                          fixed_ffn_size=12)},
        {**GPT, "moe": MoEConfig(experts=(4,) * 3, top_k=2, ffn_size=20, mix="sigmoid_gate",
                                 fixed_ffn_size=12)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer_by_layer_gives_the_same_logits(shape: dict[str, Any], dtype: str) -> None:
    model = tiny_model(**shape)
    rng = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 97, (n,), generator=rng) for n in (40, 3)]
    found = streamed_logits(InMemory(model), sequences, dtype)
    model.to(getattr(torch, dtype))
    for ids, logits in zip(sequences, found):
        with torch.no_grad():
            assert torch.equal(model(ids[None]).logits[0], logits)


# ---- writing ----


def test_streamed_files_hold_what_the_operations_give(tmp_path: Path, capsys) -> None:
    dense = write_tiny(tmp_path / "m", qkv_bias=True)
    code, _, err = run(capsys, "grow", dense, tmp_path / "g", "--hidden", 48, "--layers", 4,
                       "--seed", 3, *SMALL_SHARDS)  # fmt: skip
    assert code == 0, err
    code, _, err = run(capsys, "upcycle", tmp_path / "g", tmp_path / "u", "--experts", 4,
                       "--expert-init", "permute", "--seed", 3, *SMALL_SHARDS)  # fmt: skip
    assert code == 0, err
    spec = GrowStage(stage="grow", model="x", hidden=48, layers=4, seed=3)
    grown, _ = grow(InMemory(tiny_model(qkv_bias=True)), spec)
    up = Upcycled(grown, Upcycling(experts=4, expert_init="permute", seed=3))
    for built, folder in ((grown, tmp_path / "g"), (up, tmp_path / "u")):
        assert len(list(folder.glob("*.safetensors"))) > 2  # tensors lie in many files
        written = Directory(folder)
        for name in tensor_shapes(built.config):
            assert torch.equal(written.load(name), built.load(name)), name


def test_shards_hold_the_same_weights_as_one_file(tmp_path: Path, capsys) -> None:
    dense = write_tiny(tmp_path / "m")
    for out, shards in (("one", []), ("many", SMALL_SHARDS)):
        assert run(capsys, "upcycle", dense, tmp_path / out, "--experts", 2, *shards)[0] == 0
    one = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one)
    size = sum(tensor.numel() * 4 for tensor in one.values())
    assert index["metadata"]["total_size"] == size
    for file in set(index["weight_map"].values()):
        for name, tensor in safetensors.torch.load_file(tmp_path / "many" / file).items():
            assert torch.equal(tensor, one[name])
    left, right = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    ids = torch.arange(20)[None]
    assert torch.equal(left(ids).logits, right(ids).logits)


# ---- interruptions ----

UPCYCLE = ["--experts", "4", "--expert-init", "permute", *SMALL_SHARDS]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, tensors: int, error: BaseException) -> None:
    """The wrapper raises `error` when it is asked for one tensor too many."""
    plain, asked = Upcycled.load, 0

    def load(self: Upcycled, name: str) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if asked > tensors:
            raise error
        return plain(self, name)

    monkeypatch.setattr(Upcycled, "load", load)


def shards_of(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.glob("*.safetensors")}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, capsys, monkeypatch) -> None:
    dense, out = write_tiny(tmp_path / "m"), tmp_path / "out"
    command = ["upcycle", dense, out, *UPCYCLE]
    assert run(capsys, "upcycle", dense, tmp_path / "whole", *UPCYCLE)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40, KeyboardInterrupt())
        code, _, err = run(capsys, *command)
    assert (code, "the same command continues" in err) == (130, True)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    work = tmp_path / "out.run" / "model"
    kept = shards_of(work)
    assert len(kept) >= 1
    # other options, and another source, are another model
    for other in (["--seed", "1"], ["--experts", "2"], ["--dtype", "bfloat16"]):
        code, _, err = run(capsys, *command, *other)
        assert (code, "unfinished upcycle with other options" in err) == (2, True)
        assert len(err.splitlines()) == 1
    code, _, err = run(capsys, "grow", dense, out, "--layers", 4)
    assert (code, "unfinished upcycle" in err) == (2, True)
    assert shards_of(work) == kept
    code, text, err = run(capsys, *command)
    assert code == 0, err
    assert f"{len(kept)} of " in err
    assert content(out) == content(tmp_path / "whole")
    assert {name: shards_of(out)[name] for name in kept} == kept  # not written again
    assert json.loads(text.splitlines()[-1])["exact"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "whole"]


def test_a_changed_source_is_noticed(tmp_path: Path, capsys, monkeypatch) -> None:
    dense, out = write_tiny(tmp_path / "m"), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40, KeyboardInterrupt())
        assert run(capsys, "upcycle", dense, out, *UPCYCLE)[0] == 130
    shutil.rmtree(dense)
    write_tiny(dense, seed=1)
    code, _, err = run(capsys, "upcycle", dense, out, *UPCYCLE)
    assert (code, "remove it to start over" in err) == (2, True)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, capsys) -> None:
    dense, out = write_tiny(tmp_path / "m"), tmp_path / "out"
    assert run(capsys, "upcycle", dense, tmp_path / "whole", *UPCYCLE)[0] == 0
    arguments = ["upcycle", str(dense), str(out), *UPCYCLE]
    code = (
        "import os, signal, sys\n"
        "from growmoe.growth.upcycle import Upcycled\n"
        "plain, asked = Upcycled.load, []\n"
        "def load(self, name):\n"
        "    asked.append(name)\n"
        "    if len(asked) > 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, name)\n"
        "Upcycled.load = load\n"
        f"from growmoe.cli import main\nmain({arguments!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    kept = shards_of(tmp_path / "out.run" / "model")
    assert kept
    assert list((tmp_path / "out.run" / "model").glob("*.partial"))
    # a file that was being replaced when the process died
    (tmp_path / "out.run" / "model" / ".config.json.99999999.tmp").write_text("{")
    status, _, err = run(capsys, *arguments)
    assert status == 0, err
    assert content(out) == content(tmp_path / "whole")
    assert {name: shards_of(out)[name] for name in kept} == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "whole"]


def test_files_without_a_mark_are_not_trusted(tmp_path: Path, capsys) -> None:
    """Shards of nobody knows what would be taken for finished ones by their size."""
    dense, out = write_tiny(tmp_path / "m"), tmp_path / "out"
    assert run(capsys, "upcycle", dense, tmp_path / "whole", *UPCYCLE)[0] == 0
    left = tmp_path / "out.run" / "model"
    left.mkdir(parents=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        (left / file.name).write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    code, _, err = run(capsys, "upcycle", dense, out, *UPCYCLE, "--no-verify")
    assert (code, "no unfinished run claims" in err) == (2, True)
    assert not out.exists()


@pytest.mark.parametrize(
    "error", [GrowmoeError("broken"), RuntimeError("odd"), OSError(28, "full")]
)
def test_a_failure_leaves_nothing_behind(error: Exception, tmp_path, capsys, monkeypatch) -> None:
    dense = write_tiny(tmp_path / "m")
    interrupt_after(monkeypatch, 40, error)
    code, _, err = run(capsys, "upcycle", dense, tmp_path / "out", *UPCYCLE)
    assert (code, "Traceback" in err) == (1, False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_result_that_is_not_exact_is_not_published(tmp_path, capsys, monkeypatch) -> None:
    dense = write_tiny(tmp_path / "m")
    monkeypatch.setattr(Upcycling, "routed_share", 1.01)
    code, _, err = run(capsys, "upcycle", dense, tmp_path / "out", "--experts", 2)
    assert (code, "declared exact, but" in err) == (1, True)
    assert "nothing was published" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_without_a_check_the_output_says_that_it_is_unverified(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    dense, out = write_tiny(tmp_path / "m"), tmp_path / "out"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr(publishing, "compare", never)
    code, text, err = run(capsys, "upcycle", dense, out, "--experts", 2, "--no-verify")
    assert code == 0, err
    assert "unverified" in err
    result = json.loads(text.splitlines()[-1])
    assert (result["check"]["unverified"], result["exact"]) == (True, None)
    lineage = json.loads((out / "growmoe.json").read_text())
    assert lineage["checks"]["unverified"] is True
    assert "unverified" in (out / "README.md").read_text()
    assert not lineage["engines"]


# ---- bad input ----


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 72}, "but config.json says"), ({"num_hidden_layers": 4}, "is missing"),
        ({"num_hidden_layers": 2}, "has no place"), ({"num_key_value_heads": 9}, "says"),
        ({"attention_bias": True}, "is missing"), ({"vocab_size": 96}, "config.json says"),
        ({"model_type": "gpt9"}, "model_type 'gpt9'"), ({"hidden_size": "wide"}, "wrong type"),
        ({"rope_scaling": "yes", "rope_parameters": None}, "config.json"),
        ({"rope_parameters": [1]}, "config.json"), ({"num_hidden_layers": -1}, "num_layers"),
        ({"vocab_size": None}, "config.json"), ({"intermediate_size": 1e400}, "config.json"),
        ({"tie_word_embeddings": None}, None), ({"num_attention_heads": 0}, "config.json"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_contradicts_the_tensors(changes, words, tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    edit(model / "config.json", **changes)
    code, _, err = run(capsys, "upcycle", model, tmp_path / "out", "--experts", 2)
    if words is None:
        assert code == 0, err
        return
    assert (code, words in err, "unexpected" in err) == (1, True, False), err
    assert str(model) in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not in"),
        ({"weight_map": {"a": 3}}, "names no file for tensor a"), ([], "'weight_map' is missing"),
        ({"weight_map": {"a": ["x"]}}, "names no file"), ({}, "'weight_map' is missing"),
        ({"weight_map": {}}, "is missing from the checkpoint"),
        ({"weight_map": {"a": "config.json"}}, "is missing from the checkpoint"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_an_index_that_is_wrong(index, words: str, dry: bool, tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    options = ["--dry-run"] if dry else []
    code, _, err = run(capsys, "upcycle", model, tmp_path / "out", "--experts", 2, *options)
    if not dry or "missing from the checkpoint" not in words:
        assert (code, words in err) == (1, True), err
        assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_shard_that_is_cut_short(tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for dry in (["--dry-run"], []):
        code, _, err = run(capsys, "grow", model, tmp_path / "out", "--layers", 4, *dry)
        assert (code, "is not a whole safetensors file" in err) == (1, True)


def test_outputs_that_cannot_be_made(tmp_path: Path, capsys) -> None:
    model, there = write_tiny(tmp_path / "m"), tmp_path / "there"
    there.mkdir()
    (tmp_path / "file").write_text("")
    for out, code, words in (
        (there, 2, "already exists"), (tmp_path / "file" / "out", 1, "cannot write in"),
        (Path("/proc/out"), 1, "cannot write in /proc"), (model / "config.json", 2, "exists"),
    ):  # fmt: skip
        found, _, err = run(capsys, "grow", model, out, "--layers", 4)
        assert (found, words in err) == (code, True), err
        assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m", "there"]


def test_the_licence_goes_into_card_and_lineage(tmp_path: Path, capsys) -> None:
    model, out = write_tiny(tmp_path / "m"), tmp_path / "out"
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: odd-1\nlicense_link: https://example.org\n"
        "tags: [x]\n---\n# M\n"
    )
    assert run(capsys, "upcycle", model, out, "--experts", 2)[0] == 0
    assert run(capsys, "grow", out, tmp_path / "again", "--layers", 4)[0] == 0
    for made in (out, tmp_path / "again"):
        lineage = json.loads((made / "growmoe.json").read_text())
        card = (made / "README.md").read_text()
        for key, value in (
            ("license", "other"), ("license_name", "odd-1"), ("license_link", "https://example.org")
        ):  # fmt: skip
            assert lineage[key] == value
            assert f"{key}: {value}\n" in card.partition("\n---\n")[0]
    for card in ("no front", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: x"):
        (model / "README.md").write_text(card)
        other = tmp_path / f"o{abs(hash(card))}"
        assert run(capsys, "grow", model, other, "--layers", 4, "--no-verify")[0] == 0
        assert "license" not in json.loads((other / "growmoe.json").read_text())


# ---- tokenizers that change with the architecture ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files like SmolLM2's: bytes, single digits, no normalisation, GPT2Tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("digits")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["don't we all can't  tabs\t\t and\n\n\nlines of it''s"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 160,
                "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def public_ids(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(PROBE, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_class_that_would_change_the_ids_is_pinned(
    digits: Path, tmp_path: Path, capsys
) -> None:
    """The same files beside a qwen2 config are read as Qwen2Tokenizer, which splits otherwise;
    beside qwen2_moe as the class that they name."""
    model = write_tiny(
        tmp_path / "m", tokenizer_from=digits, vocab_size=320, family="qwen2", qkv_bias=True
    )
    edit(model / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    ids = load_tokenizer(digits).encode(PROBE, add_special_tokens=False).ids
    assert public_ids(model) != ids
    said = {}
    for verb, options in (("grow", ["--layers", 4]), ("upcycle", ["--experts", 2])):
        out = tmp_path / verb
        capsys.readouterr()
        code, _, err = run(capsys, verb, model, out, *options)
        assert code == 0, err
        said[verb] = json.loads((out / "growmoe.json").read_text())["checks"]["tokenizer"]
        assert (out / "tokenizer.json").read_bytes() == (digits / "tokenizer.json").read_bytes()
        assert ("that is so for the output too" in err) == (verb == "grow")
    assert said["upcycle"] == {**said["upcycle"], "class_pinned": True, "transformers": "same ids"}
    assert public_ids(tmp_path / "upcycle") == ids
    # no class helps beside qwen2, but nothing changed either
    assert said["grow"]["transformers"] == "other ids, as for the parent"
    assert public_ids(tmp_path / "grow") == public_ids(model)


def test_a_tokenizer_that_would_come_to_be_read_otherwise_is_refused(
    digits: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "llama", tmp_path / "qwen2"
    for folder, shape in ((home, {}), (out, {"family": "qwen2", "qkv_bias": True})):
        write_tiny(folder, tokenizer_from=digits, vocab_size=320, **shape)
    config = Directory(out).config
    with pytest.raises(GrowmoeError, match="beside a qwen2 model as a class that changes it"):
        check_tokenizer(home, out, config)


def test_a_tokenizer_that_does_not_fit_is_refused(digits: Path, tmp_path: Path, capsys) -> None:
    model = write_tiny(tmp_path / "m", tokenizer_from=digits, vocab_size=97)
    code, _, err = run(capsys, "upcycle", model, tmp_path / "out", "--experts", 2, "--no-verify")
    assert (code, "outside the vocabulary of 97" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert os.path.exists(model)
