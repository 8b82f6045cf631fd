"""fewbits, under the names of bitsandbytes 0.50.2. This package has names only: the code is in fewbits."""

from importlib.metadata import entry_points as _entry_points

from fewbits.autograd import MatmulLtState, matmul, matmul_4bit
from fewbits.compat._finder import VERSION as _VERSION
from fewbits.compat._install import stand_in as _stand_in

from . import _ops, autograd, backends, cextension, consts, cuda_specs, functional, nn, optim, utils
from .backends.cpu import ops as cpu_ops
from .backends.cuda import ops as cuda_ops
from .backends.default import ops as default_ops
from .nn import modules
from .optim import adam

__version__ = _VERSION

# By these, transformers, diffusers and accelerate know that there need not be a GPU, and which devices will do.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "mps", "xpu"}


def _import_backends() -> None:
    """Load what other packages offer as the entry points ``bitsandbytes.backends``."""
    for point in _entry_points(group="bitsandbytes.backends"):
        try:
            point.load()()
        except Exception as error:
            raise RuntimeError(f"bitsandbytes: failed to load backend {point.name}: {error}") from error


if __name__ == "bitsandbytes":
    _stand_in()
    _import_backends()
