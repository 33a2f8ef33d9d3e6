"""Devices that are not here: what their makers say of them."""

from dataclasses import dataclass

from sartor.errors import unknown

# Shares of the data sheet that trainers of language models reach: 31-41 % of the matrix peak with adapters on one H100
# (NVIDIA NeMo's and Hugging Face's published runs of 8B models). A forecast from them is no measurement.
PRODUCTS_REACHED, BANDWIDTH_REACHED = 0.4, 0.7
# What Python takes to launch a layer's kernels: small models cannot go below it (15-30 ms for 16-32 layers, reported
# for decoding with transformers). The backward pass launches twice as many.
SECONDS_PER_LAYER = 0.9e-3
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """Dense bf16 peak in FLOP/s and memory bandwidth in bytes/s, from the data sheet; memory in bytes, as it shows."""

    name: str
    flops: float
    bandwidth: float
    memory: float


DEVICES = {
    device.name: device
    for device in (  # NVIDIA's SXM forms where there are several; memory as nvidia-smi has it
        Device("b200", 2250e12, 8.0e12, 183_359 * MIB),
        Device("h200", 989e12, 4.8e12, 143_771 * MIB),
        Device("h100", 989e12, 3.35e12, 81_559 * MIB),
        Device("a100", 312e12, 2.04e12, 81_920 * MIB),
        Device("a100-40gb", 312e12, 1.56e12, 40_960 * MIB),
        Device("l40s", 362e12, 0.86e12, 46_068 * MIB),
        Device("l4", 121e12, 0.3e12, 23_034 * MIB),
        Device("rtx4090", 165e12, 1.01e12, 24_564 * MIB),
        Device("rtx3090", 71e12, 0.94e12, 24_576 * MIB),
    )
}


def device_named(name: str) -> Device:
    """A device by its name.

    Raises:
        UserError: no such device in the table.
    """
    if name.lower() not in DEVICES:
        raise unknown("--device", name, ["here", *DEVICES])
    return DEVICES[name.lower()]
