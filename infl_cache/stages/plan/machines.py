"""A table of machines that are not here: what their data sheets say, and what part of it is counted on."""

from __future__ import annotations

from dataclasses import dataclass

# What part of the data sheet's rates a stage is thought to reach: a guess, not a measurement. Large matrix products
# reach more, networks of small layers less.
EFFICIENCY = 0.4
# The same of memory bandwidth, and of the bus between host and device.
BUS_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Machine:
    """Operations a second (a multiplication and an addition are two) by type, bytes a second, bytes of memory.

    `float32` is what plain float32 reaches without tensor cores: PyTorch multiplies matrices so unless it is told
    otherwise. `tf32` and `bfloat16` are with tensor cores, without sparsity.
    """

    title: str
    float64: float
    float32: float
    tf32: float
    bfloat16: float
    bandwidth: float
    bus: float
    memory: float

    @property
    def operations(self) -> float:
        """Float32 operations a second that are counted on."""
        return EFFICIENCY * self.float32

    @property
    def operations64(self) -> float:
        """The same of float64."""
        return EFFICIENCY * self.float64

    @property
    def moved(self) -> float:
        """Bytes a second between host and device that are counted on."""
        return BUS_EFFICIENCY * self.bus


# All rates are the vendors' peaks, without sparsity; `EFFICIENCY` and `BUS_EFFICIENCY` say what is counted on.
MACHINES: dict[str, Machine] = {
    # NVIDIA, H100 Tensor Core GPU data sheet (2023), SXM5: FP64 tensor 67, FP32 67, TF32 989 and BF16 1,979 TFLOPS with
    # sparsity (half of it without), 3.35 TB/s, 80 GB, PCIe Gen5 128 GB/s (both directions together).
    "h100": Machine("NVIDIA H100 SXM 80 GB", 67e12, 67e12, 494.5e12, 989.5e12, 3.35e12, 64e9, 80e9),
    # NVIDIA, H200 Tensor Core GPU data sheet (2024), SXM: the rates of the H100, 4.8 TB/s, 141 GB.
    "h200": Machine("NVIDIA H200 SXM 141 GB", 67e12, 67e12, 494.5e12, 989.5e12, 4.8e12, 64e9, 141e9),
    # NVIDIA, A100 80GB data sheet (2021), SXM: FP64 tensor 19.5, FP32 19.5, TF32 156, BF16 312 TFLOPS, 2,039 GB/s,
    # PCIe Gen4 64 GB/s (both directions together).
    "a100": Machine("NVIDIA A100 SXM 80 GB", 19.5e12, 19.5e12, 156e12, 312e12, 2.039e12, 32e9, 80e9),
    # NVIDIA, Ada GPU architecture white paper (2022), GeForce RTX 4090: FP32 82.6, FP64 a 64th of it, TF32 82.6 and
    # BF16 165.2 TFLOPS (float32 accumulation), 1,008 GB/s, 24 GB, PCIe Gen4 x16.
    "rtx4090": Machine("NVIDIA GeForce RTX 4090", 1.29e12, 82.6e12, 82.6e12, 165.2e12, 1.008e12, 32e9, 24e9),
    # AMD, EPYC 9004 data sheet (2022), EPYC 9554: 64 cores at 3.1 GHz, twelve channels of DDR5-4800, 460.8 GB/s.
    # Reckoned from its cores: two multiply-adds of 256 bits a cycle, twice as many of bfloat16. With 768 GB, as it may
    # be fitted. There is no bus; a copy reads and writes the memory.
    "epyc9554": Machine("AMD EPYC 9554, 768 GB", 3.17e12, 6.35e12, 6.35e12, 12.7e12, 460.8e9, 230.4e9, 768e9),
}
