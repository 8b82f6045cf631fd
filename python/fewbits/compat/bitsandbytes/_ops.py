"""The operations ``torch.ops.bitsandbytes``, which an import of the package registers."""

from fewbits.compat._ops import register
