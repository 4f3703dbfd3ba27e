"""What the machine itself can do: its own matrix product and its own copy, measured with the clock of the rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from flashtile.cli.timing import Plain, device_times, quantiles


@dataclass(frozen=True)
class Limits:
    """matmul_tflops: one large matrix product in the dtype. copy_gbps: bytes read and written by a device copy."""

    matmul_tflops: float
    copy_gbps: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


# An H100 SXM, 80 GB HBM3, measured as below in bfloat16.
H100 = Limits(matmul_tflops=800.0, copy_gbps=3020.0)

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
QUICK_MATMUL_SIZE = 512
QUICK_COPY_BYTES = 2**22


def measure(dtype: torch.dtype, device: str, seconds: float = 0.2, quick: bool = False) -> Limits:
    """The limits of this machine, best of the repeats' 20 % quantiles; `quick` is for trying the command only."""
    size = QUICK_MATMUL_SIZE if quick else MATMUL_SIZE.get(device, 2048)
    count = (QUICK_COPY_BYTES if quick else COPY_BYTES.get(device, 2**27)) // 4
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    (times,) = device_times([Plain(lambda: torch.matmul(a, b, out=product))], device, seconds)
    _, fast, _ = quantiles(times)
    matmul_tflops = 2 * size**3 / (fast * 1e-3) / 1e12
    source = torch.zeros(count, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    (times,) = device_times([Plain(lambda: target.copy_(source))], device, seconds)
    _, fast, _ = quantiles(times)
    return Limits(matmul_tflops, 2 * source.nbytes / (fast * 1e-3) / 1e9)
