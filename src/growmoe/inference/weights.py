"""How a model's weights are held for inference: by the native kernels, by torch, or on a GPU."""

from growmoe.errors import UsageError
from growmoe.inference.offloaded import Offload
from growmoe.inference.packing import build_packed
from growmoe.inference.prepacked import build_prepacked
from growmoe.models.checkpoint import Source, build_model
from growmoe.models.transformer import Transformer
from growmoe.ops import native
from growmoe.ops.native import FORMS, Form


def build_for_inference(
    source: Source, form: Form, device: str = "cpu", offload: Offload | None = None
) -> Transformer:
    """The model of `source` with its weights in `form`, its routed experts in `offload` if given.

    On a CPU with the native kernels where they are installed, else with torch's; on a GPU as in
    training. Raises UsageError for a form that there is not, or not on this device.
    """
    if form not in FORMS:
        raise UsageError(f"weights '{form}' are none of {', '.join(FORMS)}")
    if device != "cpu":
        if form in ("int8", "int4"):
            raise UsageError(f"{form} weights run on CPUs only; give bfloat16 on {device}")
        if offload is not None:
            raise UsageError(f"experts on disk run on CPUs only; keep them in memory on {device}")
        return build_model(source, form, device)
    if native.available():
        return build_packed(source, form, offload)
    return build_prepacked(source, form)
