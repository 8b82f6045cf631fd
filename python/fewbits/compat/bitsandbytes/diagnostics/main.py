"""``python -m bitsandbytes``."""

from fewbits.cli import main as _fewbits


def sanity_check() -> None:
    """Run the self-test.

    Raises
    ------
    RuntimeError
        Naming what failed.
    """
    from fewbits.info import self_test

    failed = [f"{check.name}: {check.detail}" for check in self_test() if not check.passed]
    if failed:
        raise RuntimeError("; ".join(failed))


def main() -> int:
    """Tell which build this is and whether it works, as ``fewbits info``; return the exit code."""
    return _fewbits(["info"])
