"""What CUDA there is."""

from fewbits._cuda_specs import (
    CUDASpecs,
    get_compute_capabilities,
    get_cuda_specs,
    get_cuda_version_string,
    get_cuda_version_tuple,
    get_rocm_gpu_arch,
)
