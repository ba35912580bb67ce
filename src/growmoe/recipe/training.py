"""The fields of a train stage. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from growmoe.recipe.fields import (
    Count,
    ExpertLayout,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Seed,
    Strict,
)


class InitMoE(ExpertLayout):
    """The experts of a new model."""

    ffn_size: Count | None = None
    """Width of one expert; default that of the dense feed-forward."""
    fixed_ffn_size: Count | None = None
    """Width of the fixed branch; default that of the dense feed-forward."""
    renormalize: bool | None = None
    """Divide the weights of the chosen experts by their sum; default when there are several, since
    a single one would always weigh 1 and teach the router nothing."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False

    @model_validator(mode="after")
    def _branch(self) -> "InitMoE":
        if self.fixed_ffn_size is not None and self.residual == "none":
            raise ValueError("fixed_ffn_size needs residual")
        return self


class InitModel(Strict):
    """A new model; its vocabulary is the corpus's, rounded up to a multiple of 64. Models with gelu
    have biases everywhere, as GPT does."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    ffn_size: Count
    max_positions: Count = 2048
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned"] = "rope"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    rope_theta: Positive = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    init_std: Positive = 0.02
    moe: InitMoE | None = None

    @model_validator(mode="after")
    def _divides(self) -> "InitModel":
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide by {kv_heads} kv heads")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}; "
                "give head_dim"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even for rotary positions")
        return self


class OptimizerModel(Strict):
    """AdamW and its learning rate over the run."""

    lr: Positive = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.02
    """Share of the steps with a linearly rising rate."""
    decay: Fraction = 0.2
    """wsd: share of the steps at the end with a falling rate."""
    min_lr_ratio: Fraction = 0.1
    weight_decay: NonNegative = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    clip: Positive = 1.0
    state: Literal["reset", "keep_old_zero_new", "copy"] = "reset"
    """AdamW's moments at the start: zeros, or those of the model that this one was grown from (it
    was trained with keep_optimizer), on inherited elements only or on their copies too."""
    new_warmup: NonNegative = 0.0
    """Steps (below 1: share of the steps) in which the rate of elements that growth made rises from
    0 to `new_lr_ratio` times the others'; over as many steps more it returns to theirs. 0: off."""
    new_lr_ratio: Positive = 1.3


ZKind = Literal["router_logsumexp", "router_max", "output_logsumexp", "output_max"]


def _z_by_kind(value: Any) -> Any:
    """A number is the coefficient of the default kind."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"router_logsumexp": value} if value else {}
    return value


class LossModel(Strict):
    """Router losses, computed per layer and averaged over layers."""

    balance: NonNegative = 0.001
    balance_scope: Literal["micro", "sequence", "global"] = "global"
    """Tokens whose load is balanced: of a micro batch, of each sequence, or of the whole step."""
    z: Annotated[dict[ZKind, NonNegative], BeforeValidator(_z_by_kind)] = Field(
        default={"router_logsumexp": 0.01}
    )
    """Coefficient per kind; a number alone is that of router_logsumexp."""


class RankingModel(Strict):
    """Loss-ranked routing: experts that lower the loss more are chosen a little more often."""

    eta: Positive = 0.02
    """Largest shift of a selection score."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Memory of an expert's credit, per step."""
    warmup: Fraction = 0.1
    """Share of the steps before the shift begins."""
    ramp: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Share of the steps in which it rises, and at the end falls to zero again."""
    max_load: Annotated[float, Field(gt=1)] = 2.0
    """A layer whose largest load passes this many times the mean has its shift halved, and given
    back by a tenth per step when it no longer does."""
    min_tokens: Count = 1
    """Experts with fewer rows in a step keep their credit."""

    @model_validator(mode="after")
    def _fits(self) -> "RankingModel":
        if self.warmup + 2 * self.ramp > 1:
            raise ValueError(
                f"warmup {self.warmup} and twice ramp {self.ramp} are more than the whole run"
            )
        return self


class RoutingModel(Strict):
    """What routers do in training only."""

    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The router's input is multiplied by U(1 - jitter, 1 + jitter)."""
    capacity_factor: Positive | None = None
    """No expert takes more than ceil(factor T k / E) rows of a micro batch; null drops nothing."""
    drop: Literal["position", "probability"] = "position"
    """Rows that go over capacity: late tokens and second choices, or those of least score."""
    bias_rate: NonNegative = 0.0
    """Step of the selection bias that balances the load without a loss; 0.001 in the papers."""
    ranking: RankingModel | None = None

    @model_validator(mode="after")
    def _used(self) -> "RoutingModel":
        if self.capacity_factor is None and self.drop != "position":
            raise ValueError("drop needs capacity_factor")
        return self


class TrainStage(Strict):
    """Train a new model (`init` or `preset`) or an existing one (`model`)."""

    stage: Literal["train"]
    name: Name = "train"
    model: str | None = None
    init: InitModel | None = None
    preset: str | None = None
    data: str
    weights: dict[str, NonNegative] | None = None
    """Mixture weights in place of the corpus's own."""
    tokens: Count
    sequence_length: Count = 512
    batch_size: Count = 8
    """Sequences per micro batch."""
    accumulation: Count = 1
    optimizer: OptimizerModel = OptimizerModel()
    keep_optimizer: bool = False
    """Leave AdamW's moments with the model, for `optimizer.state` of what is grown from it."""
    losses: LossModel = LossModel()
    routing: RoutingModel = RoutingModel()
    activation_checkpointing: bool = False
    """Keep only what enters each layer, and compute the rest again in backward."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights and optimizer are float32. auto: bfloat16 where the
    processor multiplies it natively."""
    seed: Seed = 0
    pretrained_tokens: Count | None = None
    """Training tokens of `model`, where its lineage does not say; for the plan's warnings."""
    validate_every: Count = 100
    checkpoint_every: Count = 100

    @model_validator(mode="after")
    def _one_start(self) -> "TrainStage":
        given = [key for key in ("model", "init", "preset") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, init and preset, not {given or 'none'}")
        if self.model is None and (self.optimizer.state != "reset" or self.optimizer.new_warmup):
            raise ValueError(
                "optimizer.state and optimizer.new_warmup are for a model, not a new one"
            )
        warmup = self.optimizer.new_warmup
        if self.optimizer.new_lr_ratio != OptimizerModel().new_lr_ratio and not warmup:
            raise ValueError("optimizer.new_lr_ratio needs optimizer.new_warmup")
        if 0 < warmup < 1 and round(warmup * self.steps) < 1:
            raise ValueError(
                f"optimizer.new_warmup: a share of {warmup} of {self.steps} steps is none"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.sequence_length * self.batch_size * self.accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps that `tokens` make, at least one."""
        return max(1, round(self.tokens / self.tokens_per_step))
