"""inspect: what is in a directory."""

from pathlib import Path
from typing import Any

from growmoe.errors import UsageError
from growmoe.files import read_json
from growmoe.planning.derived import describe


def run(path: Path, tensors: bool) -> dict[str, Any]:
    """Shape, parameters and lineage of a model; counts of a corpus; stages of a run."""
    if (path / "summary.json").exists():
        return {"kind": "run", "stages": read_json(path / "summary.json")}
    if (path / "manifest.json").exists():
        return {"kind": "corpus", **read_json(path / "manifest.json")}
    if path.is_dir() and not (path / "config.json").exists():
        raise UsageError(f"{path} is neither a model, a corpus nor a run directory")
    from growmoe.models.checkpoint import Directory, open_source
    from growmoe.models.config import tensor_shapes

    source = open_source(path)
    result: dict[str, Any] = {"kind": "model", "dtype": source.dtype, **describe(source.config)}
    if isinstance(source, Directory):
        result["lineage"] = source.lineage()
    if tensors:
        result["tensors"] = {k: list(shape) for k, shape in tensor_shapes(source.config).items()}
    return result
