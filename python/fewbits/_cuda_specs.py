"""What torch says about CUDA, in the form in which bitsandbytes tells it."""

from __future__ import annotations

import dataclasses

import torch

__all__ = [
    "CUDASpecs",
    "get_compute_capabilities",
    "get_cuda_specs",
    "get_cuda_version_string",
    "get_cuda_version_tuple",
    "get_rocm_gpu_arch",
]

HIP_ENVIRONMENT = torch.version.hip is not None


@dataclasses.dataclass(frozen=True)
class CUDASpecs:
    """The CUDA devices and the CUDA that torch was built for.

    Attributes
    ----------
    highest_compute_capability : tuple of int
        Of the devices.
    cuda_version_string : str
        Without the dot, such as ``"129"``.
    cuda_version_tuple : tuple of int
        Such as ``(12, 9)``.
    """

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the best device has integer tensor cores, as all since Turing."""
        return HIP_ENVIRONMENT or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the CUDA devices, lowest first."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Return the version of CUDA or ROCm that torch was built for; None if for neither."""
    version = torch.version.hip if HIP_ENVIRONMENT else torch.version.cuda
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """Return `get_cuda_version_tuple` as text, such as ``"129"``."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """Return what there is, or None without a device or without CUDA in torch."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], text, version)


def get_rocm_gpu_arch() -> str:
    """Return the architecture of the current ROCm device, such as ``"gfx942"``, or ``"unknown"``."""
    if not HIP_ENVIRONMENT or not torch.cuda.is_available():
        return "unknown"
    name: str = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName
    return name.partition(":")[0]


def __getattr__(name: str) -> str:
    if name == "ROCM_GPU_ARCH":  # asks the device: not before somebody wants to know
        return get_rocm_gpu_arch()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
