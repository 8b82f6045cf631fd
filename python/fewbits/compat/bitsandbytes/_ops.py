"""The operations ``torch.ops.bitsandbytes``."""

from fewbits.compat._ops import register

register()
