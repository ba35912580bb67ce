"""Packed experts whose weights come from an `ExpertStore`.

While a layer's experts compute, those of the next layer are read ahead: the next layer's router is
asked about this layer's input, which differs from its own by one residual step (Eliseev and Mazur,
arXiv 2312.17238). Letters as in `packing`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from growmoe.errors import UsageError
from growmoe.inference.offload import ExpertStore, Field, Record, Request
from growmoe.models.config import ModelConfig
from growmoe.models.footprint import size
from growmoe.ops import native
from growmoe.ops.native import ExpertTable, Form, PackedExpert, PackedRouter, Routed


class OffloadedExperts:
    """The routed experts of one layer, computed as `native.experts` computes them, bit for bit.

    `table` has a place for each, and the layer's fixed expert behind them where it has one.
    """

    def __init__(
        self, store: ExpertStore[PackedExpert], layer: int, table: ExpertTable, router: PackedRouter
    ) -> None:
        self.store, self.layer, self.table, self.router = store, layer, table, router
        self.following: OffloadedExperts | None = None
        """Experts to read ahead for, while these compute; None: no reading ahead."""

    def __call__(self, x_TD: Tensor, routed: Routed, hidden: int) -> Tensor:
        """y_TD. Each expert is read at most once; raises GrowmoeError when that fails."""
        top_k = self.router.top_k
        wanted = routed.chosen_TK[:, :top_k].unique().tolist()
        whole = len(wanted) <= len(self.store.slots)
        with self.store.request(self.layer, wanted, whole) as request:
            if self.following is not None:
                self.following.predict(x_TD)
            if not whole:
                return self._in_waves(x_TD, routed, hidden, request)
            for expert, packed in request.all():
                self.table.put(expert, packed)
            return native.experts(x_TD, routed.chosen_TK, routed.shares_TK, self.table, hidden)

    def _in_waves(
        self, x_TD: Tensor, routed: Routed, hidden: int, request: Request[PackedExpert]
    ) -> Tensor:
        """More experts than slots: the rows of those that are there, then of the next."""
        (T, K), flat_S = routed.chosen_TK.shape, routed.chosen_TK.flatten()
        rows_SD = torch.empty(T * K, hidden)

        def run(experts: list[int]) -> None:
            at_S = torch.isin(flat_S, torch.tensor(experts, dtype=torch.int32)).nonzero()[:, 0]
            chosen_S1, ones_S1 = flat_S[at_S, None], torch.ones(len(at_S), 1)
            rows_SD[at_S] = native.experts(x_TD[at_S // K], chosen_S1, ones_S1, self.table, hidden)

        if self.router.top_k < K:
            run([len(self.table.experts) - 1])
        for batch in request:
            for expert, packed in batch:
                self.table.put(expert, packed)
            run([expert for expert, _ in batch])
        return native.combine(rows_SD.view(T, K, hidden), routed.shares_TK)

    def predict(self, x_TD: Tensor) -> None:
        """Read ahead what this layer's router makes of another layer's input, the most wanted
        first."""
        chosen_TK = native.route(x_TD, self.router).chosen_TK[:, : self.router.top_k]
        experts, counts = chosen_TK.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        self.store.prefetch(self.layer, experts[order].tolist())


def read_ahead(layers: list[OffloadedExperts]) -> None:
    """Let every layer's experts read ahead for the next one that has some."""
    for layer, following in zip(layers, layers[1:]):
        layer.following = following


class PackedRecord:
    """How a packed expert of a model lies in a slot, there and back."""

    def __init__(self, config: ModelConfig, form: Form) -> None:
        assert config.moe is not None
        self.form, D, F = form, config.hidden_size, config.moe.ffn_size
        rows = 2 * (-(-F // 16) * 16) if config.activation == "swiglu" else F
        self.shapes = {"up": (rows, D), "down": (D, F)}
        fields = [
            Field(name, torch.uint8, (native.packed_bytes(form, *shape),))
            for name, shape in self.shapes.items()
        ]
        if config.mlp_bias:
            fields += [
                Field(f"{name}_bias", torch.float32, (shape[0],))
                for name, shape in self.shapes.items()
            ]
        self.record = Record(fields)

    def expert(self, tensors: Mapping[str, Tensor]) -> PackedExpert:
        """The expert that lies in these tensors of a slot."""
        up, down = (
            native.packed_from(tensors[name], self.form, *shape, tensors.get(f"{name}_bias"))
            for name, shape in self.shapes.items()
        )
        return PackedExpert(up, down)

    def tensors(self, expert: PackedExpert) -> dict[str, Tensor]:
        """What a slot holds of an expert."""
        found = {"up": expert.up.data, "down": expert.down.data}
        for name, packed in (("up_bias", expert.up), ("down_bias", expert.down)):
            if packed.bias is not None:
                found[name] = packed.bias
        return found


class Offload:
    """A store for the packed experts of a model within `budget` bytes; raises UsageError when that
    holds fewer than a token visits at a time."""

    def __init__(
        self, config: ModelConfig, form: Form, budget: int, folder: Path | None = None,
        prefetch: bool = True, page_cache: bool = True,
    ) -> None:  # fmt: skip
        if not native.available():
            raise UsageError("experts on disk need the native kernels; see `growmoe doctor`")
        if config.moe is None:
            raise UsageError("experts on disk need a model with experts, and this one is dense")
        self.packing, self.prefetch = PackedRecord(config, form), prefetch
        each, slots = self.packing.record.nbytes, budget // self.packing.record.nbytes
        if slots < config.moe.top_k:
            raise UsageError(
                f"{size(budget)} hold {slots} experts of {size(each)}, but a token visits "
                f"{config.moe.top_k} at a time; give at least {size(each * config.moe.top_k)}"
            )
        self.store: ExpertStore[PackedExpert] = ExpertStore(
            self.packing.record, config.moe.experts, slots, self.packing.expert, folder, page_cache
        )
        self.layers: list[OffloadedExperts] = []

    def add(self, layer: int, table: ExpertTable, router: PackedRouter) -> OffloadedExperts:
        """The experts of a layer, which `put` has stored."""
        self.layers.append(OffloadedExperts(self.store, layer, table, router))
        return self.layers[-1]

    def put(self, layer: int, expert: int, packed: PackedExpert) -> None:
        """Store one expert."""
        self.store.put(layer, expert, self.packing.tensors(packed))

    def seal(self) -> None:
        """Every expert of every layer is stored."""
        self.store.seal()
        if self.prefetch:
            read_ahead(self.layers)
