"""How a model's weights are held for inference: by the native kernels, by torch, or on a GPU."""

from growmoe.errors import UsageError
from growmoe.inference.offloaded import Offload
from growmoe.inference.packing import build_packed
from growmoe.inference.prepacked import build_prepacked
from growmoe.models.checkpoint import Source, build_model
from growmoe.models.footprint import check_device
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
    check_device(device, form, offload is not None)
    if device != "cpu":
        return build_model(source, form, device)
    if native.available():
        return build_packed(source, form, offload)
    return build_prepacked(source, form)
