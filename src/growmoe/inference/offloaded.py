"""Routed experts whose weights come from an `ExpertStore`, in place of `models.moe.Experts`.

While a layer's experts compute, those of the next layer are read ahead: the next layer's router is
asked about this layer's input, which differs from its own by one residual step (Eliseev and Mazur,
arXiv 2312.17238). Letters as in `ops.experts`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from growmoe.inference.offload import ExpertStore, Field, Record
from growmoe.models.checkpoint import Source, load_into, named_views
from growmoe.models.config import ModelConfig, moe_layers
from growmoe.models.router import Router, routers
from growmoe.models.safetensors_io import DTYPES
from growmoe.models.transformer import Transformer
from growmoe.ops.cpu_experts import OneExpert, combined, run_expert
from growmoe.ops.experts import Activation
from growmoe.ops.mapping import MappingTable, inverse


class OffloadedExperts(nn.Module):
    """The experts of one layer; computes what `Experts` does, bit for bit."""

    def __init__(self, store: ExpertStore, layer: int, activation: Activation) -> None:
        super().__init__()
        self.store, self.layer, self.activation = store, layer, activation
        self.predict: Callable[[Tensor], None] | None = None

    def forward(self, x_TD: Tensor, table: MappingTable, weights_TK: Tensor) -> Tensor:
        """y_TD: what the experts of each token give, weighted and added up. Each expert is read
        at most once, whatever the budget; raises GrowmoeError when that fails."""
        (T, K), D = weights_TK.shape, x_TD.shape[1]
        counts = table.counts_E.tolist()
        rows_E = table.order_S.split(counts)
        y_SD = x_TD.new_empty(T * K, D)
        out_E = y_SD.split(counts)
        with self.store.request(self.layer, [e for e, n in enumerate(counts) if n]) as request:
            if self.predict is not None:
                self.predict(x_TD)
            for batch in request:
                for expert, tensors in batch:
                    x_SD = x_TD.index_select(0, rows_E[expert] // K)
                    run_expert(x_SD, _expert(tensors), self.activation, out_E[expert])
        y_TKD = y_SD.index_select(0, inverse(table.order_S)).view(T, K, D)
        return combined(y_TKD, weights_TK)


def prefetcher(store: ExpertStore, layer: int, router: Router) -> Callable[[Tensor], None]:
    """Predicts the experts of `layer` from the input of the layer before it, the most wanted
    first."""

    def predict(x_TD: Tensor) -> None:
        counts_E = router(x_TD)[1].counts_E
        order_E = counts_E.argsort(descending=True, stable=True)
        store.prefetch(layer, order_E[: int((counts_E > 0).sum())].tolist())

    return predict


def link(model: Transformer, modules: dict[int, OffloadedExperts]) -> None:
    """Let every layer's experts read ahead for the next layer that has some."""
    layers = sorted(modules)
    for layer, following, router in zip(layers, layers[1:], routers(model)[1:]):
        modules[layer].predict = prefetcher(modules[layer].store, following, router)


def _expert(tensors: Mapping[str, Tensor]) -> OneExpert:
    return OneExpert(
        tensors["up"], tensors["down"], tensors.get("up_bias"), tensors.get("down_bias")
    )


def plain_record(config: ModelConfig, dtype: torch.dtype) -> Record:
    """An expert as `Experts` stacks it: gate rows first, then up; biases where there are any."""
    assert config.moe is not None
    D, F = config.hidden_size, config.moe.ffn_size
    rows = 2 * F if config.activation == "swiglu" else F
    fields = [Field("up", dtype, (rows, D)), Field("down", dtype, (D, F))]
    if config.mlp_bias:
        fields += [Field("up_bias", dtype, (rows,)), Field("down_bias", dtype, (D,))]
    return Record(fields)


@torch.no_grad()
def build_offloaded(
    source: Source, store: ExpertStore, dtype: str = "float32", prefetch: bool = True
) -> Transformer:  # fmt: skip
    """The model of `source` with its routed experts in `store`, which is filled and sealed."""
    config = source.config
    activation: Activation = "swiglu" if config.activation == "swiglu" else "gelu"
    with torch.device("meta"):
        model = Transformer(config)
    modules = {}
    for layer in moe_layers(config):
        modules[layer] = OffloadedExperts(store, layer, activation)
        model.layers[layer].moe.experts = modules[layer]  # type: ignore[union-attr]
    model.to(dtype=DTYPES[dtype]).to_empty(device="cpu")
    load_into(dict(named_views(model.named_parameters(), config)), source.load)
    _fill(store, source)
    if prefetch:
        link(model, modules)
    return model.eval()


def _fill(store: ExpertStore, source: Source) -> None:
    """Experts of all layers, one tensor at a time."""
    config = source.config
    gated = config.activation == "swiglu"
    for layer in moe_layers(config):
        for expert in range(config.experts_in(layer)):
            place = f"layers.{layer}.moe.experts.{expert}"
            tensors = {}
            for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 2 if config.mlp_bias else 1]:
                up = [source.load(f"{place}.{part}.{kind}") for part in ("gate", "up")[not gated :]]
                tensors[f"up{suffix}"] = torch.cat(up) if gated else up[0]
                tensors[f"down{suffix}"] = source.load(f"{place}.down.{kind}")
            store.put(layer, expert, tensors)
    store.seal()
