"""Whether the CPU kernels are installed, for those who plan. Imports no torch."""

import os
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "native" / "libgrowmoe.so"


def installed() -> bool:
    """Whether the compiled kernels are there and not left out by GROWMOE_NATIVE=0; only
    `ops.native.available` knows whether this machine can load them."""
    return os.environ.get("GROWMOE_NATIVE") != "0" and LIBRARY.exists()
