"""The native library. There is one for all versions of CUDA, and it has been loaded already."""

from fewbits._clib import (
    CudaBNBNativeLibrary,
    ErrorHandlerMockBNBNativeLibrary,
    XpuBNBNativeLibrary,
    get_available_cuda_binary_versions,
    get_cuda_bnb_library_path,
    get_native_library,
    get_xpu_bnb_library_path,
    lib,
    parse_cuda_version,
)
from fewbits._clib import NativeLibrary as BNBNativeLibrary
from fewbits._cuda_specs import (
    HIP_ENVIRONMENT,
    ROCM_GPU_ARCH,
    CUDASpecs,
    get_cuda_specs,
    get_cuda_version_tuple,
    get_rocm_gpu_arch,
)

from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR

BNB_BACKEND = "CUDA" if lib.compiled_with_cuda else "CPU"
