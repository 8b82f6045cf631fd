"""Helpers."""

from fewbits.utils import (
    INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    OutlierTracer,
    execute_and_return,
    find_outlier_dims,
    outlier_hook,
    pack_dict_to_tensor,
    replace_linear,
    sync_gpu,
    unpack_tensor_to_dict,
)
