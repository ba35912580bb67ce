"""What a grown model's optimizer starts with: moments by hand and by gradients, masks, rates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import InMemory, tiny_config, tiny_model, write_tiny
from growmoe.data.corpus import Corpus, ShardWriter, token_dtype
from growmoe.errors import UsageError
from growmoe.files import write_json
from growmoe.growth.compose import grow
from growmoe.growth.inherit import Inherited, Step, ancestry, carried, known
from growmoe.growth.upcycle import Upcycled
from growmoe.models.checkpoint import build_model, load_model, parameter_views
from growmoe.models.config import tensor_shapes
from growmoe.models.upcycling import Upcycling
from growmoe.recipe import GrowStage, OptimizerModel, TrainStage, UpcycleStage
from growmoe.stages import grow as grow_stage
from growmoe.stages import train as train_stage
from growmoe.stages import upcycle as upcycle_stage
from growmoe.training.resume import MOMENTS, load_checkpoint
from growmoe.training.start import Newcomers, Start, bias_ratio, new_rate
from growmoe.training.trainer import Trainer

V = 97


def grown_by(tokens: int = V, **options: Any) -> Step:
    return Step(GrowStage(stage="grow", model="x", **options), tokens)


def upcycled_by(**options: Any) -> Step:
    return Step(UpcycleStage(stage="upcycle", model="x", **options), V)


def numbered(**changes: Any) -> Inherited:
    """Different numbers above zero in every element of a tiny model."""
    config = tiny_config(**changes)
    shapes = tensor_shapes(config)
    tensors, first = {}, 1
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        tensors[name] = torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count
    return Inherited(config, tensors.__getitem__)


@pytest.mark.parametrize("copies", [False, True])
def test_width_by_hand(copies: bool) -> None:
    """36 -> 54: units 0-17 have two copies written with sqrt(54/36/2), the others one."""
    old = numbered()
    new = carried(old, [grown_by(hidden=54, ffn=60, heads=9)], copies=copies, power=1)
    unit = torch.arange(54) % 36
    count = torch.where(unit < 18, 2.0, 1.0)
    written = (1.5 / count).sqrt()
    here = torch.ones(54) if copies else (torch.arange(54) < 36).float()
    down = old.load("layers.1.mlp.down.weight")
    width = torch.arange(60) % 50
    live = torch.ones(60) if copies else (torch.arange(60) < 50).float()
    want = down[unit][:, width] * (here / (count * written))[:, None] * live
    assert torch.allclose(new.load("layers.1.mlp.down.weight"), want)
    gate = old.load("layers.1.mlp.gate.weight")
    copied = torch.where(width < 10, 2.0, 1.0)
    want = gate[width][:, unit] * (live / copied)[:, None] * here
    assert torch.allclose(new.load("layers.1.mlp.gate.weight"), want)
    norm = old.load("layers.1.mlp_norm.weight")
    assert torch.allclose(new.load("layers.1.mlp_norm.weight"), norm[unit] * here * written / count)
    embed = old.load("embed.weight")[:, unit]
    assert torch.allclose(new.load("embed.weight"), embed * here / (count * written))


def test_heads_by_hand() -> None:
    """9 heads in 3 groups -> 12: each group gets a copy of its first head behind it."""
    old = numbered()
    new = carried(old, [grown_by(heads=12, kv_heads=3)], power=2)
    rows = old.load("layers.0.attn.q.weight").view(9, 4, 36)
    q = new.load("layers.0.attn.q.weight").view(12, 4, 36)
    for head in range(12):
        group, place = divmod(head, 4)
        factor = {0: 0.25, 3: 0.0}.get(place, 1.0)  # a half, squared; a copy; the only one
        assert torch.equal(q[head], rows[group * 3 + place % 3] * factor), head
    assert torch.equal(new.load("layers.0.attn.k.weight"), old.load("layers.0.attn.k.weight"))


@pytest.mark.parametrize(
    ("method", "layers", "origins"),
    [
        ("identity", 5, {0: 0, 1: None, 2: 1, 3: 2, 4: None}),
        ("interpolate", 6, {0: 0, 1: None, 2: 1, 3: None, 4: 2, 5: None}),
        ([2, 0, 2], None, {0: 2, 1: 0, 2: None}),
    ],
)
def test_depth_by_hand(method: Any, layers: int | None, origins: dict[int, int | None]) -> None:
    old = numbered()
    new = carried(old, [grown_by(layers=layers, depth=method)])
    for layer, origin in origins.items():
        for rest in ("attn.q.weight", "mlp.down.weight", "attn_norm.weight"):
            tensor = new.load(f"layers.{layer}.{rest}")
            if origin is None:
                assert not tensor.any(), layer
            else:
                assert torch.equal(tensor, old.load(f"layers.{origin}.{rest}")), layer


def test_copies_of_layers_leave_out_what_is_silent() -> None:
    old = numbered()
    new = carried(old, [grown_by(layers=5)], copies=True)
    assert torch.equal(new.load("layers.1.mlp.up.weight"), old.load("layers.0.mlp.up.weight"))
    assert not new.load("layers.1.mlp.down.weight").any()


def test_vocab_by_hand() -> None:
    old = numbered()
    new = carried(old, [grown_by(104, vocab=104)], copies=True)
    embed = new.load("embed.weight")
    assert torch.equal(embed[:V], old.load("embed.weight"))
    assert embed.shape[0] == 104
    assert not embed[V:].any()
    reused = Step(
        GrowStage(stage="grow", model="x", vocab_tokenizer="y", vocab_init="from_tokens"), 104, 90
    )
    assert int(carried(old, [reused]).load("embed.weight").any(1).sum()) == 90


@pytest.mark.parametrize("copies", [False, True])
def test_aki_takes_new_rows_from_the_layer_above(copies: bool) -> None:
    old = numbered()
    new = carried(old, [grown_by(ffn=60, method="aki")], copies=copies)
    up = new.load("layers.0.mlp.up.weight")
    assert torch.equal(up[:50], old.load("layers.0.mlp.up.weight"))
    assert torch.equal(up[50:], old.load("layers.1.mlp.up.weight")[:10] * copies)
    last = new.load("layers.2.mlp.up.weight")
    assert torch.equal(last[50:], old.load("layers.2.mlp.up.weight")[:10] * copies)


def test_upcycled_experts() -> None:
    old = numbered()
    up, down = (old.load(f"layers.0.mlp.{part}.weight") for part in ("up", "down"))

    def expert(step: Step, number: int, part: str = "up", copies: bool = False) -> torch.Tensor:
        source = carried(old, [step], copies=copies)
        return source.load(f"layers.0.moe.experts.{number}.{part}.weight")

    plain = upcycled_by(experts=4)
    assert torch.equal(expert(plain, 0), up)
    assert not expert(plain, 1).any()
    assert torch.equal(expert(plain, 1, copies=True), up)
    assert not carried(old, [plain], copies=True).load("layers.0.moe.router.weight").any()
    sliced = upcycled_by(experts=4, granularity=2)
    assert torch.equal(expert(sliced, 0), up[:25])
    assert torch.equal(expert(sliced, 1, "down"), down[:, 25:])
    assert not expert(sliced, 2).any()
    fixed = upcycled_by(experts=4, residual="softmax2")
    assert torch.equal(carried(old, [fixed]).load("layers.0.mlp.up.weight"), up)
    assert not expert(fixed, 0).any()
    assert torch.equal(expert(fixed, 0, copies=True), up)
    assert not expert(fixed, 0, "down", copies=True).any()  # it adds nothing yet
    dropped = upcycled_by(experts=4, expert_init="drop", drop=0.4)
    assert int(expert(dropped, 0).any(1).sum()) == 30
    assert torch.equal(expert(dropped, 0).any(1), expert(dropped, 0, "down").any(0))


@pytest.mark.parametrize("granularity", [1, 2])
def test_permuted_experts_keep_their_units_together(granularity: int) -> None:
    """The weights themselves, carried as if they were moments, are the experts' weights."""
    model = tiny_model()
    options: dict[str, Any] = {"expert_init": "permute", "granularity": granularity}
    step = upcycled_by(experts=4, **options)
    moe = Upcycled(InMemory(model), Upcycling.of(step.spec))
    new = carried(InMemory(model), [step], copies=True)
    for number in range(4):
        name = f"layers.1.moe.experts.{number}.gate.weight"
        assert torch.equal(new.load(name), moe.load(name))


def test_the_same_size_inherits_everything() -> None:
    old = numbered()
    new = carried(old, [grown_by(hidden=36, ffn=50, heads=9, layers=3)], power=2)
    for name in tensor_shapes(old.config):
        assert torch.equal(new.load(name), old.load(name)), name


GRADIENT_CASES = {
    "hidden": {"hidden": 72, "heads": 9},
    "ragged": {"hidden": 54, "heads": 9},
    "heads": {"heads": 12, "kv_heads": 3},
    "all": {"hidden": 72, "heads": 18, "kv_heads": 6, "ffn": 75},
    "pad": {"hidden": 54, "heads": 9, "ffn": 60, "units": "zero_pad"},
    "head_dim": {"hidden": 36, "heads": 9, "head_dim": 8},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_moments_follow_the_gradients(case: str, tied: bool) -> None:
    """An exact growth with even shares: the gradients of inherited elements are the source's,
    scaled as moments are."""
    model = tiny_model(tied_head=tied, norm_eps=1e-12)
    step = grown_by(split=None if case == "pad" else "even", **GRADIENT_CASES[case])
    assert isinstance(step.spec, GrowStage)
    larger = build_model(grow(InMemory(model), step.spec)[0], "float64")
    model = model.double()
    gradients = []
    tokens = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(1))
    for each in (model, larger):
        torch.nn.functional.cross_entropy(
            each(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    old = Inherited(model.config, gradients[0].__getitem__)
    new = carried(old, [step], power=1)
    kept = carried(known(model.config), [step])
    for name, gradient in gradients[1].items():
        inherited = kept.load(name).bool()
        want, scale = new.load(name)[inherited].double(), gradient.abs().max()
        assert torch.allclose(gradient[inherited], want, atol=2e-6 * scale), name


# ---- whole stages ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting up in a vocabulary of 97, without a tokenizer."""
    out = tmp_path_factory.mktemp("counting")
    tokens = {}
    for split, documents in (("train", 80), ("validation", 8)):
        (out / split).mkdir()
        writer = ShardWriter(out / split, "up", token_dtype(V), 10**6)
        for number in range(documents):
            writer.add([(number * 7 + i) % 96 for i in range(40)] + [96])
        writer.close()
        tokens[split] = writer.tokens
    write_json(
        out / "manifest.json",
        {
            "hash": "counting",
            "tokenizer": {"vocab_size": V, "end_of_text_id": 96},
            "validation": {"fraction": 0.1, "length": 20, "tokens": 100},
            "sources": [{"name": "up", "weight": 1.0, "tokens": tokens}],
        },
    )
    return out


def train_spec(model: Path, corpus: Path, steps: int = 6, **changes: Any) -> TrainStage:
    optimizer = {"lr": 1e-2, "warmup": 0.0, **changes.pop("optimizer", {})}
    return TrainStage(
        stage="train", model=str(model), data=str(corpus), tokens=steps * 40, sequence_length=20,
        batch_size=2, dtype="float32", optimizer=optimizer, **changes,
    )  # fmt: skip


def made(stage: Any, spec: Any, out: Path) -> Path:
    out.mkdir(parents=True)
    work = out.with_name(f"{out.name}.run")
    work.mkdir()
    stage.run(spec, out, work)
    return out


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the moments of six steps."""
    home = tmp_path_factory.mktemp("trained")
    start = write_tiny(home / "start")
    return made(train_stage, train_spec(start, corpus, keep_optimizer=True), home / "small")


def grow_from(model: Path, out: Path, **options: Any) -> Path:
    spec = GrowStage(stage="grow", model=str(model), verify=False, **{"heads": 9, **options})
    return made(grow_stage, spec, out)


def upcycle_from(model: Path, out: Path, **options: Any) -> Path:
    spec = UpcycleStage(stage="upcycle", model=str(model), verify=False, **options)
    return made(upcycle_stage, spec, out)


def start_for(model: Path, corpus: Path, **optimizer: Any) -> Start:
    spec = train_spec(model, corpus, optimizer=optimizer)
    return train_stage.start_of(spec, load_model(model))


def test_moments_lie_with_the_model(trained: Path, corpus: Path) -> None:
    stored = load_file(trained / MOMENTS)
    names = [name for name, _ in parameter_views(load_model(trained))]
    assert set(stored) == {f"{n}/{k}" for n in names for k in ("exp_avg", "exp_avg_sq", "step")}
    assert stored["embed.weight/step"] == 6
    assert [file.name for file in trained.glob("*.safetensors")] == ["model.safetensors"]


def test_training_on_is_seamless(corpus: Path, tmp_path: Path) -> None:
    """Six steps and six more with the kept state are twelve steps, for a mixture of experts too."""
    home = upcycle_from(write_tiny(tmp_path / "start"), tmp_path / "moe", experts=4)
    constant = {"schedule": "constant"}
    whole = train_spec(home, corpus, 12, optimizer=constant, validate_every=100)
    straight = load_model(made(train_stage, whole, tmp_path / "whole"))
    half = train_spec(home, corpus, 6, optimizer=constant, keep_optimizer=True)
    middle = made(train_stage, half, tmp_path / "half")
    model = load_model(middle)
    rest = train_spec(middle, corpus, 12, optimizer={**constant, "state": "keep_old_zero_new"})
    start = train_stage.start_of(rest, model)
    assert not start.new
    assert not start.blank
    trainer = Trainer(model, Corpus(corpus), rest, tmp_path / "rest", start)
    trainer.loader.skip(12)
    for step in range(6):
        trainer._step(step)
    for (name, a), (_, b) in zip(parameter_views(straight), parameter_views(model)):
        assert torch.equal(a, b), name


def test_masks_count_what_is_new(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Elements of the grown model less those of the small one, through a chain of two steps."""
    wide = grow_from(
        trained, tmp_path / "wide", hidden=54, ffn=60, heads=12, kv_heads=3, layers=4, vocab=100
    )
    moe = upcycle_from(wide, tmp_path / "moe", experts=4)
    small, large = load_model(trained), load_model(moe)
    base, steps = ancestry(moe)
    assert base == trained
    assert [step.spec.stage for step in steps] == ["grow", "upcycle"]
    for state in ("keep_old_zero_new", "copy"):
        start = start_for(moe, corpus, state=state, new_warmup=2)
        new = sum(int(mask.sum()) for mask in start.new.values())
        assert new == large.config.params_total() - small.config.params_total()
        blank = sum(int(mask.sum()) for mask in start.blank.values())
        assert 0 < blank < new  # routers and silent layers have no state at all
    assert start.state.keys() < dict(large.named_parameters()).keys()


def test_states_of_stacked_experts(trained: Path, corpus: Path, tmp_path: Path) -> None:
    moe = upcycle_from(trained, tmp_path / "moe", experts=4, expert_init="noise", noise=0.1)
    stored = load_file(trained / MOMENTS)
    gate_up = torch.cat([stored[f"layers.0.mlp.{part}.weight/exp_avg_sq"] for part in ("gate", "up")])  # fmt: skip  # noqa: E501
    keep = start_for(moe, corpus, state="keep_old_zero_new").state["layers.0.moe.experts.up"]
    assert torch.equal(keep["exp_avg_sq"][0], gate_up)
    assert not keep["exp_avg_sq"][1:].any()
    assert keep["step"] == 6
    copied = start_for(moe, corpus, state="copy").state["layers.0.moe.experts.up"]
    assert torch.equal(copied["exp_avg_sq"], gate_up.expand(4, -1, -1))


OPTIMIZER = {"state": "keep_old_zero_new", "new_warmup": 3, "schedule": "constant"}


def test_new_elements_follow_their_own_rate(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Against a run without the warm-up: in every step old elements move alike from the same
    place, new ones by the factor."""
    wide = grow_from(trained, tmp_path / "wide", hidden=54, ffn=60)
    slow = train_spec(wide, corpus, optimizer=OPTIMIZER)
    plain = train_spec(wide, corpus, optimizer={**OPTIMIZER, "new_warmup": 0})
    for step in (0, 1, 2, 4):
        ends = []
        for number, spec in enumerate((slow, plain)):
            model = load_model(wide)
            start = train_stage.start_of(spec, model)
            trainer = Trainer(model, Corpus(corpus), spec, tmp_path / f"{step}.{number}", start)
            trainer._step(step)
            ends.append(dict(model.named_parameters()))
        begun = dict(load_model(wide).named_parameters())
        factor = {0: 1.3 / 3, 1: 2.6 / 3, 2: 1.3, 4: 1.1}[step]
        assert new_rate(step, 6, slow.optimizer) == pytest.approx(factor)
        for name, mask in start.new.items():
            a, b, origin = ends[0][name], ends[1][name], begun[name]
            assert torch.equal(a[~mask], b[~mask]), name
            assert torch.allclose((a - origin)[mask], factor * (b - origin)[mask], atol=1e-6)
            assert (b - origin)[mask].any(), name


def test_elements_without_moments_step_like_a_fresh_optimizer() -> None:
    """A parameter whose second half has no moments, against two parameters of their own."""
    spec = OptimizerModel(lr=0.1, beta2=0.999, new_warmup=0)
    gradients = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    old = {
        "step": torch.tensor(40.0), "exp_avg": torch.full((4,), 0.3),
        "exp_avg_sq": torch.full((4,), 0.5),
    }  # fmt: skip

    def run(model: torch.nn.Module, start: Start) -> torch.Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.999))
        for name, parameter in model.named_parameters():
            if name in start.state:
                optimizer.state[parameter] = {k: v.clone() for k, v in start.state[name].items()}
        newcomers = Newcomers(model, start, spec, 5)
        for step in range(5):
            row = gradients[step]
            for parameter in model.parameters():
                parameter.grad = row[: parameter.numel()].clone()
                row = row[parameter.numel() :]
            with newcomers.paced(step):
                optimizer.step()
        return torch.cat([p.detach() for p in model.parameters()])

    def holding(*sizes: int) -> torch.nn.Module:
        return torch.nn.ParameterList([torch.zeros(size) for size in sizes])

    mask = torch.arange(8) >= 4
    wide = {"step": old["step"]} | {
        key: torch.cat((old[key], torch.zeros(4))) for key in ("exp_avg", "exp_avg_sq")
    }
    together = run(holding(8), Start({"0": wide}, {"0": mask}, {"0": mask}))
    apart = run(holding(4, 4), Start({"0": old}))
    assert torch.allclose(together, apart, atol=2e-3)  # decay is scaled with the update
    assert bias_ratio(0, 1e9, 0.9, 0.95) == pytest.approx(0.05**0.5 / 0.1)
    assert bias_ratio(7, 0, 0.9, 0.95) == 1


def test_new_rate_rises_and_returns() -> None:
    share = OptimizerModel(new_warmup=0.2, new_lr_ratio=1.5)
    rates = [new_rate(step, 20, share) for step in range(9)]
    assert rates == pytest.approx([0.375, 0.75, 1.125, 1.5, 1.375, 1.25, 1.125, 1.0, 1.0])
    assert new_rate(0, 20, OptimizerModel()) == 1.0


def test_resume_is_bit_exact(trained: Path, corpus: Path, tmp_path: Path) -> None:
    wide = grow_from(trained, tmp_path / "wide", hidden=54, layers=4)
    spec = train_spec(wide, corpus, 8, optimizer=OPTIMIZER, checkpoint_every=3)

    def trainer(run: str) -> Trainer:
        model = load_model(wide)
        return Trainer(
            model, Corpus(corpus), spec, tmp_path / run, train_stage.start_of(spec, model)
        )

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut")
    step = cut._step

    def stopping(number: int) -> Any:
        if number == 5:
            raise InterruptedError
        return step(number)

    cut._step = stopping
    with pytest.raises(InterruptedError):
        cut.train()
    again = trainer("cut")
    assert (
        load_checkpoint(
            tmp_path / "cut" / "checkpoints", again.model, again.optimizer, again.routing
        ).step
        == 3
    )
    again.train()
    for (name, a), (_, b) in zip(parameter_views(whole.model), parameter_views(again.model)):
        assert torch.equal(a, b), name


def test_the_fingerprint_knows_the_start(trained: Path, corpus: Path, tmp_path: Path) -> None:
    wide = grow_from(trained, tmp_path / "wide", hidden=54)
    prints = set()
    for state in ("reset", "keep_old_zero_new", "copy"):
        for warmup in (0, 2):
            spec = train_spec(wide, corpus, optimizer={"state": state, "new_warmup": warmup})
            model = load_model(wide)
            start = train_stage.start_of(spec, model)
            prints.add(Trainer(model, Corpus(corpus), spec, tmp_path, start).fingerprint)
            if start.state:
                next(iter(start.state.values()))["exp_avg"].add_(1)
                prints.add(Trainer(model, Corpus(corpus), spec, tmp_path, start).fingerprint)
    assert len(prints) == 10


def test_errors_say_what_to_do(trained: Path, corpus: Path, tmp_path: Path) -> None:
    bare = write_tiny(tmp_path / "bare")
    wide = grow_from(bare, tmp_path / "wide", hidden=54)
    with pytest.raises(UsageError, match=r"moments of .*bare; train it with keep_optimizer: true"):
        start_for(wide, corpus, state="copy")
    with pytest.raises(UsageError, match=r"nothing is new in .*small"):
        start_for(trained, corpus, new_warmup=2)
    assert start_for(wide, corpus, new_warmup=2).new  # what is new is known without moments
    same = grow_from(trained, tmp_path / "same", hidden=36)
    with pytest.raises(UsageError, match="no element of .*same is new since"):
        start_for(same, corpus, new_warmup=2)
    bare.rename(tmp_path / "gone")
    other = write_tiny(bare, ffn_size=48)
    with pytest.raises(UsageError, match=r"bare has changed"):
        start_for(wide, corpus, new_warmup=2)
    other.rename(tmp_path / "other")
    with pytest.raises(UsageError, match=r"made from .*bare, which is not there"):
        start_for(wide, corpus, new_warmup=2)
    with pytest.raises(ValueError, match="not a new one"):
        TrainStage(
            stage="train", preset="x", data="x", tokens=1, optimizer={"state": "copy"}
        )  # fmt: skip
