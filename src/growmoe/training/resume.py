"""Checkpoints of a run: weights, optimizer, random state and position, whole or not at all.

Plain safetensors and JSON. A checkpoint is written aside and renamed; the one before it is kept
until then, so a kill at any moment leaves a usable one.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from growmoe.errors import GrowmoeError
from growmoe.files import publish, write_json
from growmoe.models.checkpoint import named_views
from growmoe.models.config import ModelConfig
from growmoe.models.safetensors_header import Stored
from growmoe.models.safetensors_io import write_shard

MOMENTS = "optimizer/adamw.safetensors"
"""Below a model directory, not in it: engines take every safetensors file there for weights."""
_NAME = "step-{:08d}"


class Stateful(Protocol):
    """What else a run has to remember."""

    def state(self) -> dict[str, torch.Tensor]:
        """Named tensors."""
        ...

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """The reverse; raises KeyError where something is missing."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a run stands: finished optimizer steps, and what it has cost so far."""

    step: int
    tokens: int
    seconds: float
    fingerprint: str


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position,
    more: Stateful,
) -> None:  # fmt: skip
    """Write a checkpoint below `folder`, then remove the older ones."""
    out = folder / _NAME.format(position.step)
    staged = folder / f".{out.name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file({name: p.data for name, p in model.named_parameters()}, staged / "model.safetensors")
    state = {}
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            state[f"{names[parameter]}/{key}"] = value
    state["/rng"] = torch.get_rng_state()
    state |= {f"/more/{name}": tensor for name, tensor in more.state().items()}
    save_file(state, staged / "optimizer.safetensors")
    write_json(staged / "position.json", asdict(position))
    shutil.rmtree(out, ignore_errors=True)
    publish(staged, out)
    for old in checkpoints(folder):
        if old != out:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "position.json").exists())


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: Stateful
) -> Position | None:
    """Restore the newest checkpoint below `folder`; None when there is none.

    Raises GrowmoeError when it is damaged or belongs to another model.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    try:
        position = Position(**json.loads((path / "position.json").read_text()))
        weights = load_file(path / "model.safetensors")
        state = load_file(path / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        parameters = dict(model.named_parameters())
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            if name in parameters:
                optimizer.state[parameters[name]][field] = value
        torch.set_rng_state(state["/rng"])
        kept = {k.removeprefix("/more/"): v for k, v in state.items() if k.startswith("/more/")}
        more.load(kept)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise GrowmoeError(
            f"{path} is damaged or of another model ({error}); remove it to start over"
        ) from None
    return position


def save_moments(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: ModelConfig
) -> None:
    """Write AdamW's state beside the weights in `out`, tensor by tensor, as `NAME/exp_avg`,
    `NAME/exp_avg_sq` and `NAME/step` with the names of the weights (experts one by one)."""
    views: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:  # no gradient ever reached it
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            for canonical, view in named_views([(name, state[key])], config):
                views[f"{canonical}/{key}"] = view
                views[f"{canonical}/step"] = state["step"].reshape(1)
    path = out / MOMENTS
    path.parent.mkdir(exist_ok=True)
    stored = {name: Stored(tuple(view.shape), "float32") for name, view in views.items()}
    write_shard(path, stored, views.__getitem__, lambda done: None)
