"""What others ask about kernels."""

from fewbits.codebook import get_4bit_type

CODE = {name: get_4bit_type(name, device="cpu") for name in ("nf4", "fp4")}

triton_available = False  # there are no Triton kernels here that could be used, or patched
GAUDI_SW_VER = None


def get_gaudi_sw_version() -> None:
    """Return None: there are no kernels for Gaudi."""
