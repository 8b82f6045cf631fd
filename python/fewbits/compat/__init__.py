"""fewbits under the name of bitsandbytes, for programs that import that."""

from fewbits.compat._install import VERSION, install_as_bitsandbytes

__all__ = ["VERSION", "install_as_bitsandbytes"]
