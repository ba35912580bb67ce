"""The engine on tiny models in float64: what is asked for alone is what comes in any company."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import InMemory, tiny_model, write_tiny
from growmoe.data.tokenizer import load_tokenizer
from growmoe.errors import GrowmoeError, UsageError
from growmoe.inference import llm as llm_module
from growmoe.inference import loading
from growmoe.inference.blocks import BLOCK
from growmoe.inference.llm import LLM
from growmoe.inference.loading import Loaded
from growmoe.inference.offloaded import Offload
from growmoe.inference.packing import build_packed
from growmoe.inference.paged import PagedBatch, PagedCache, Span
from growmoe.inference.requests import Sampling
from growmoe.models.attention import Cache
from growmoe.models.config import MoEConfig
from growmoe.models.footprint import Wanted
from growmoe.models.transformer import Transformer
from growmoe.ops import native
from growmoe.ops.native import Form

FIXED: dict[str, Any] = {"ffn_size": 12, "fixed_ffn_size": 20}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"sliding_window": 21, "qkv_bias": True, "qk_norm": True},
    "learned": {
        "positions": "learned", "norm": "layer", "activation": "gelu", "mlp_bias": True,
        "qkv_bias": True, "o_bias": True,
    },
    "moe": {"moe": MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=12)},
    "pyramid-sum": {"moe": MoEConfig(experts=(0, 2, 4), top_k=1, mix="sum", **FIXED)},
    "softmax2": {"moe": MoEConfig(experts=(2, 0, 4), top_k=2, mix="softmax2", **FIXED)},
    "shared": {
        "moe": MoEConfig(
            experts=(4, 4, 8), top_k=2, mix="sigmoid_gate", scoring="sigmoid", groups=2, **FIXED
        ),
        "tied_head": True,
    },
}  # fmt: skip


def float64(seed: int = 0, **changes: Any) -> Transformer:
    return tiny_model(seed, **changes).double()


def llm(model: Transformer, blocks: int = 64, tokenizer: Any = None, **options: Any) -> LLM:
    """An LLM around a model in memory, with that many blocks."""
    config = model.config
    dtype = next(model.parameters()).dtype
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize * BLOCK
    loaded = Loaded("tiny", model, tokenizer, frozenset(), dtype)
    return LLM(loaded, kv_gb=blocks * block / 2**30, **options)


def plain(model: Transformer, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Greedy continuation with the model's own cache: tokens and their log-probabilities."""
    cache, new, found = Cache(), prompt, []
    with torch.no_grad():
        for _ in range(count):
            logs = model(torch.tensor([new]), cache).logits[0, -1].log_softmax(-1)
            new = [int(logs.argmax())]
            found.append((new[0], float(logs[new[0]])))
    return found


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=rng).tolist() for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_chunks_is_what_the_model_says(kind: str) -> None:
    """Prompts of 1 to 70 tokens together, chunks of at most 23 tokens, some of them preempted."""
    model = float64(**KINDS[kind])
    asked = prompts(1, 1, 15, 16, 17, 70, 33)
    engine = llm(model, blocks=8, max_sequences=5, step_tokens=23)
    answers = engine.generate(asked, Sampling(max_tokens=20, temperature=0, logprobs=0))
    for prompt, answer in zip(asked, answers):
        tokens, logs = zip(*plain(model, prompt, 20))
        assert answer.token_ids == list(tokens)
        assert [found.logprob for found in answer.logprobs] == pytest.approx(logs, abs=1e-4)
        assert (answer.finish_reason, answer.error) == ("length", None)
    assert engine.engine.stats().preemptions > 0
    assert engine.engine.stats().blocks_used == 0


# ---- requests in company ----


SAMPLED = [
    Sampling(12, 0.9, seed=3),
    Sampling(12, 1.3, top_p=1.0, seed=4, n=3),
    Sampling(12, 1.0, top_k=20, min_p=0.02, seed=5, repetition_penalty=1.2),
    Sampling(12, 0.0, repetition_penalty=1.5),
    Sampling(12, 0.0, logprobs=4),
]


def test_company_chunks_and_reuse_change_nothing() -> None:
    model = float64(moe=MoEConfig(experts=(4, 0, 4), top_k=2, ffn_size=12))
    asked = prompts(3, 40, 40, 33, 40, 5)
    asked[1] = asked[0][:35] + asked[1][:5]  # two full blocks in common
    alone = []
    for prompt, sampling in zip(asked, SAMPLED):
        engine = llm(model, prefix_reuse=False, step_tokens=512)
        alone.append(engine.generate([prompt], sampling)[0])
    for options in (
        {"step_tokens": 512}, {"step_tokens": 9, "max_sequences": 8}, {"blocks": 10},
        {"max_sequences": 2}, {"prefix_reuse": False},
    ):  # fmt: skip
        engine = llm(model, **options)
        for _ in range(2):
            together = engine.generate(asked, SAMPLED)
            for one, other in zip(alone, together):
                assert [s.token_ids for s in one.samples] == [s.token_ids for s in other.samples]
        assert (engine.engine.stats().cached_tokens > 0) == options.get("prefix_reuse", True)
    assert len({tuple(s.token_ids) for s in alone[1].samples}) == 3
    for found in alone[4].logprobs or []:
        assert found.top[0] == (found.token, pytest.approx(found.logprob))
        assert len(found.top) == 4


@pytest.mark.skipif(not native.available(), reason="the native kernels are not compiled")
@pytest.mark.parametrize("kind", ["dense", "window", "softmax2", "shared"])
@pytest.mark.parametrize("form", ["float32", "int8"])
def test_native_kernels_give_the_same_bits_in_any_company(kind: str, form: Form) -> None:
    """Log-probabilities equal to the last bit: alone, in a batch, in chunks, with a prefix found
    again."""
    model = build_packed(InMemory(tiny_model(**KINDS[kind])), form)
    loaded = Loaded("tiny", model, None, frozenset(), torch.float32)
    asked = prompts(3, 40, 40, 33, 40, 5)
    asked[1] = asked[0][:35] + asked[1][:5]
    sampling = Sampling(12, temperature=0, logprobs=5)
    alone = [
        LLM(loaded, kv_gb=0.01, prefix_reuse=False).generate([prompt], sampling)[0]
        for prompt in asked
    ]
    for options in ({}, {"step_tokens": 9, "max_sequences": 8}, {"max_sequences": 2}):
        engine = LLM(loaded, kv_gb=0.01, **options)
        for _ in range(2):
            for one, other in zip(alone, engine.generate(asked, sampling)):
                assert one.logprobs == other.logprobs


def test_several_sequences_are_one_call_of_the_model() -> None:
    model, calls = float64(), []
    model.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[1]))
    llm(model, step_tokens=200).generate(prompts(2, 30, 40, 50), Sampling(3, temperature=0))
    assert calls == [120, 3, 3]


def test_the_paged_batch_has_what_a_kernel_reads() -> None:
    cache = PagedCache(tiny_model().config, 8, torch.bfloat16)
    batch = PagedBatch(cache, [Span(14, 4, [5, 2]), Span(40, 1, [1, 3, 7]), Span(0, 2, [6])])
    assert batch.positions_N.tolist() == [14, 15, 16, 17, 40, 0, 1]
    assert (batch.positions_N.dtype, batch.last_position(7)) == (torch.int64, 40)
    assert batch.starts_S.tolist() == [14, 40, 0]
    assert batch.counts_S.tolist() == [4, 1, 2]
    assert batch.rows_S1.tolist() == [0, 4, 5, 7]
    assert batch.tables_SM.tolist() == [[5, 2, 0], [1, 3, 7], [6, 0, 0]]
    for name in ("starts_S", "counts_S", "rows_S1", "tables_SM"):
        assert getattr(batch, name).dtype == torch.int32
    assert cache.keys[0].shape == (8, 3, 4, BLOCK)
    assert cache.values[0].shape == (8, 3, BLOCK, 4)
    assert cache.keys[0].dtype == torch.bfloat16


# ---- the interface ----


@pytest.fixture(scope="module")
def speaker(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model with a tokenizer, from a directory."""
    path = write_tiny(
        tmp_path_factory.mktemp("m") / "m", corpus, vocab_size=320, token_ids={"eos_token_id": 7}
    )
    return LLM(path, "float32", kv_gb=0.01)


HOT = Sampling(20, 1.5, top_p=1.0, seed=1, ignore_eos=True)


def test_texts_counts_and_times(speaker: LLM) -> None:
    text = "The river carries 7 boats past the old mill, and"
    first, again = (speaker.generate([text], HOT)[0] for _ in range(2))
    ids = speaker.encode(text)
    assert (first.prompt, first.prompt_tokens, first.generated_tokens) == (text, len(ids), 20)
    assert first.text == speaker.tokenizer.decode(first.token_ids, skip_special_tokens=True)
    assert (first.cached_tokens, again.cached_tokens) == (0, (len(ids) - 1) // BLOCK * BLOCK)
    assert again.cached_tokens > 0
    assert (again.text, again.token_ids) == (first.text, first.token_ids)
    assert first.timing is not None
    assert 0 <= first.timing.started <= first.timing.first_token <= first.timing.total
    by_ids = speaker.generate([ids], HOT)[0]
    assert by_ids.text == first.text


def test_the_stream_is_the_answer_in_pieces(speaker: LLM) -> None:
    asked = ["The river", "这本书一共有", "When"]
    whole = speaker.generate(asked, HOT)
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    turns = []
    for number, output in speaker.stream(asked, HOT):
        pieces[number].append(output.text)
        turns.append(number)
        assert len(output.token_ids) == 1
    assert ["".join(found) for found in pieces.values()] == [answer.text for answer in whole]
    assert turns[:6] == [0, 1, 2, 0, 1, 2]
    assert all(len(found) == 20 for found in pieces.values())


def test_stop_tokens_and_strings(speaker: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speaker.generate(["The river"], HOT)[0]
    token = whole.token_ids[8]
    first = whole.token_ids.index(token)
    change = dataclasses.replace
    ended = speaker.generate(["The river"], change(HOT, stop_token_ids=(token,)))[0]
    assert (ended.finish_reason, ended.token_ids) == ("stop", whole.token_ids[: first + 1])
    assert ended.text == speaker.tokenizer.decode(whole.token_ids[:first])
    monkeypatch.setattr(speaker.engine, "ends", frozenset([token]))
    assert speaker.generate(["The river"], HOT)[0].token_ids == whole.token_ids
    ended = speaker.generate(["The river"], change(HOT, ignore_eos=False))[0]
    assert (ended.finish_reason, ended.token_ids) == ("stop", whole.token_ids[: first + 1])
    middle = whole.text[5:8]
    cut = speaker.generate(["The river"], change(HOT, stop=(middle, "nothing")))[0]
    assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.index(middle)])
    assert len(cut.token_ids) < 20


def test_the_ends_of_a_text_come_from_the_model(speaker: LLM, corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus)
    names = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert speaker.engine.ends == {7} | names


def test_what_cannot_be_answered_does_not_touch_the_others(speaker: LLM) -> None:
    asked = ["The river", "", [400], "far " * 300, "When"]
    answers = speaker.generate(asked, HOT)
    assert [answer.finish_reason for answer in answers] == [
        "length", "error", "error", "error", "length"
    ]  # fmt: skip
    assert answers[1].error == "the prompt is empty"
    assert answers[2].error == "token 400 is outside the model's vocabulary of 320"
    assert "the model's context is 160" in str(answers[3].error)
    assert answers[4].text == speaker.generate(["When"], HOT)[0].text
    with pytest.raises(UsageError, match="2 samplings are given for 1 prompts"):
        speaker.generate(["a"], [HOT, HOT])


def test_who_stops_listening_ends_the_request(speaker: LLM) -> None:
    for _ in range(3):
        stream = speaker.stream(["The river", "When"], HOT)
        next(stream)
        stream.close()
    assert speaker.engine.requests == {}
    assert speaker.engine.stats().blocks_used == 0


def test_two_streams_side_by_side(speaker: LLM) -> None:
    alone = [speaker.generate([text], HOT)[0].token_ids for text in ("The river", "When")]
    streams = [speaker.stream([text], HOT) for text in ("The river", "When")]
    found: list[list[int]] = [[], []]
    for pair in zip(*streams):
        for place, (_, output) in enumerate(pair):
            found[place] += output.token_ids
    assert found == alone


def test_the_context_ends_a_text(speaker: LLM) -> None:
    prompt = speaker.encode("The river carries " * 60)[:150]
    answer = speaker.generate([prompt], HOT)[0]
    assert (answer.finish_reason, answer.generated_tokens) == ("length", 10)


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    silent = LLM(write_tiny(tmp_path / "m"), "float32", kv_gb=0.01)
    answer = silent.generate([[3, 4, 5]], Sampling(4, temperature=0))[0]
    assert (len(answer.token_ids), answer.text) == (4, "")
    assert "no tokenizer.json; give token ids" in str(silent.generate(["a"])[0].error)
    said = "stop strings need a tokenizer"
    assert said in str(silent.generate([[3]], Sampling(stop=("a",)))[0].error)


def test_stats_of_a_moment(speaker: LLM) -> None:
    before = speaker.engine.stats()
    stream = speaker.stream(["The river", "When"], HOT)
    for _ in range(7):
        next(stream)
    now = speaker.engine.stats()
    assert (now.running, now.waiting, now.step_tokens, now.step_sequences) == (2, 0, 2, 2)
    assert now.blocks_used >= 2
    assert now.generated_tokens - before.generated_tokens == 8
    stream.close()


def test_a_model_in_memory_keeps_its_form() -> None:
    loaded = Loaded("tiny", tiny_model(), None, frozenset(), torch.float32)
    with pytest.raises(UsageError, match="form is for models that are loaded here"):
        LLM(loaded, form="int4")
    with pytest.raises(UsageError, match=r"^tiny needs .* are free"):
        LLM(loaded, kv_gb=0.1, step_tokens=1 << 40)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to read weights, or reserves room for experts, fails."""

    def read(*arguments: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(loading, "Offload", read)
    monkeypatch.setattr(loading, "build_for_inference", read)


@pytest.mark.usefixtures("no_weights")
def test_what_is_wrong_is_found_before_weights_are_read(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m", moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=64))
    with pytest.raises(UsageError, match="max_sequences must be at least 1"):
        LLM(model, max_sequences=0)
    with pytest.raises(UsageError, match="must be more than max_sequences"):
        LLM(model, max_sequences=8, step_tokens=8)
    with pytest.raises(UsageError, match="experts on disk run on CPUs only"):
        loading.load(model, "bfloat16", Wanted(expert_memory=1 << 20), "cuda")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(GrowmoeError, match="is not a tokenizer"):
        LLM(model, expert_memory="1M" if native.available() else None)


@pytest.mark.skipif(not native.available(), reason="the native kernels are missing")
def test_experts_on_disk_are_closed_when_there_is_no_memory_for_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny(tmp_path / "m", moe=MoEConfig(experts=(4, 4, 4), top_k=2, ffn_size=64))
    made: list[Offload] = []

    def no_memory(*arguments: object) -> None:
        raise MemoryError

    def offload(*arguments: Any) -> Offload:
        made.append(Offload(*arguments))
        return made[-1]

    monkeypatch.setattr(loading, "Offload", offload)
    monkeypatch.setattr(llm_module, "PagedCache", no_memory)
    with pytest.raises(MemoryError):
        LLM(model, expert_memory="200K")
    with pytest.raises(GrowmoeError, match="closed"):
        made[0].store.request(0, [0])
