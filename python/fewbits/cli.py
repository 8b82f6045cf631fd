"""The command line: ``fewbits quantize``, ``fewbits plan``, ``fewbits info``, ``fewbits shim``.

Exit codes: 0 done; 1 failed (corrupt file, full disk, failed self-test); 2 the request cannot be served; 130 and 143
after an interrupt (Ctrl-C) and a termination signal. ``FEWBITS_TRACEBACK=1`` shows where an error was raised.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .checkpoint import Report
    from .memory_plan import MemoryPlan

_EPILOG = """\
examples:
  fewbits quantize Llama-3.2-1B Llama-3.2-1B-nf4 --double-quant
  fewbits plan Llama-3.2-1B --vram 8
  fewbits info
  fewbits shim install
"""

_QUANTIZE = """\
Quantize the linear layers of a checkpoint, one tensor at a time: the memory needed is about that of the largest tensor.
SRC is a directory with *.safetensors (one file, or shards with an index) and perhaps config.json; DST is created. The
result loads in transformers (nf4, fp4, int8rows: bitsandbytes' layout) and in fewbits.
"""
_QUANTIZE_EPILOG = """\
formats:
  nf4, fp4     4 bits, one scale for each block of --blocksize weights; --double-quant quantizes the scales too
  int8rows     8 bits, one scale a row (LLM.int8())
  blockwise8   8 bits, one scale a block; fewbits' own layout (see fewbits.checkpoint)

quantized: two-dimensional *.weight tensors. Left alone: embeddings, norms, output heads, expert routers, and --skip.

--skip PATTERN, as often as needed:
  lm_head, layers.0        whole components of a tensor's name, anywhere in it
  'model.*.down_proj'      shell pattern for the whole name of the tensor or its module
  're:layers\\.(0|1)\\.'     regular expression, anywhere in the name

the printed error of a weight W is ||W - dequantized|| / ||W|| (Frobenius norms); worst is the largest of them.

examples:
  fewbits quantize Llama-3.2-1B Llama-3.2-1B-nf4 --double-quant
  fewbits quantize Llama-3.2-1B Llama-3.2-1B-int8 --format int8rows --skip layers.0
  fewbits quantize big big-fp4 --format fp4 --blocksize 128 --device cuda --overwrite
"""

_PLAN = """\
Show how much memory a model needs in 16, 8 and 4 bits, for inference and for training LoRA adapters (QLoRA). Weights
are computed from the real tensors' shapes; everything else is an estimate whose formula is printed.
"""
_PLAN_EPILOG = """\
examples:
  fewbits plan Llama-3.2-1B
  fewbits plan Llama-3.2-1B --vram 8 --context 8192 --batch 4
  fewbits plan Llama-3.3-70B --gpus 2 --strategy fsdp --vram 24
"""

_INFO = """\
Show version, build, driver, devices and CPU features, and run a one-second self-test: round trips on the CPU against
known error bounds, and kernels on each GPU compared byte for byte with the CPU. Exit code 1 if it fails.
"""


_SHIM = """\
Let `import bitsandbytes` give fewbits in every process of this Python environment, for launchers and tools that give
no place for fewbits.install_as_bitsandbytes(). A wheel of a few kB called bitsandbytes is made here and installed with
pip; it takes the place of the real one, if that is installed. Nothing is downloaded.
"""
_SHIM_EPILOG = """\
examples:
  fewbits shim install         asks first
  fewbits shim install --yes   for scripts
  fewbits shim status
  fewbits shim remove          afterwards, `pip install bitsandbytes` brings the real one back
"""


class _Interrupted(BaseException):
    """A signal asked the process to end; not an Exception, so that no handler on the way swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _on_signal(number: int, _frame: FrameType | None) -> None:
    # A second signal must not break into the clean-up that the first one starts.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise _Interrupted(number)


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of the ``fewbits`` command."""
    from . import __version__
    from ._selection import BLOCKSIZES, FORMATS

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fewbits",
        description="Quantize PyTorch models to 8 and 4 bits.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"fewbits {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize",
        help="quantize a directory of safetensors",
        description=_QUANTIZE,
        epilog=_QUANTIZE_EPILOG,
        formatter_class=raw,
    )
    quantize.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    quantize.add_argument("destination", metavar="DST", help="directory to write; new or empty")
    quantize.add_argument("--format", choices=FORMATS, default="nf4", help="default: nf4")
    quantize.add_argument("--double-quant", action="store_true", help="quantize the 4-bit scales too")
    quantize.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCKSIZES,
        metavar="N",
        help="weights that share a scale: 32, 64 ... 4096 (default: 64; blockwise8: 256)",
    )
    quantize.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="leave these weights alone")
    quantize.add_argument("--device", default="cpu", help="cpu, cuda, xpu or mps (default: cpu)")
    quantize.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    quantize.add_argument(
        "--max-shard-gb", type=_positive(float), default=5.0, metavar="GB", help="size of one file (default: 5)"
    )

    plan = commands.add_parser(
        "plan", help="memory needed in each format", description=_PLAN, epilog=_PLAN_EPILOG, formatter_class=raw
    )
    plan.add_argument("source", metavar="SRC", help="directory of an unquantized checkpoint")
    plan.add_argument(
        "--vram", type=_positive(float), metavar="GB", help="memory to fit into, in 10^9 bytes (default: the GPU's)"
    )
    plan.add_argument("--context", type=_positive(int), default=2048, metavar="N", help="tokens (default: 2048)")
    plan.add_argument("--batch", type=_positive(int), default=1, metavar="N", help="sequences (default: 1)")
    plan.add_argument("--lora-rank", type=_positive(int), default=16, metavar="R", help="default: 16")
    plan.add_argument(
        "--gpus", type=_positive(int), default=1, metavar="N", help="memory of each of N GPUs (default: 1)"
    )
    plan.add_argument(
        "--strategy",
        choices=("ddp", "fsdp", "tp"),
        default="ddp",
        help="how they share the model: copies, shards gathered layer by layer, parts of each layer (default: ddp)",
    )

    info = commands.add_parser("info", help="version, devices, self-test", description=_INFO, formatter_class=raw)
    info.add_argument("--json", action="store_true", help="print JSON")

    shim = commands.add_parser(
        "shim",
        help="stand in for bitsandbytes everywhere",
        description=_SHIM,
        epilog=_SHIM_EPILOG,
        formatter_class=raw,
    )
    shim.add_argument("action", choices=("install", "remove", "status"))
    shim.add_argument("--yes", action="store_true", help="do not ask")
    shim.add_argument("--wheel", metavar="DIR", help="with install: only write the wheel, into DIR")
    return parser


def _size(size: float) -> str:
    """Format a number of bytes with three digits and a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            value = size / scale
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{size:.0f} bytes"


def report_table(report: Report) -> Table:
    """Summarize a quantization as a table: tensors, bytes before and after, errors, seconds."""
    from rich.table import Table

    table = Table(show_header=False)
    kept = sum(map(len, report.kept.values()))
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    table.add_row("tensors", f"{len(report.errors)} quantized, {kept} copied")
    table.add_row("size before", f"{_size(report.bytes_before)} ({report.bytes_before} bytes)")
    table.add_row("size after", f"{_size(report.bytes_after)} ({report.bytes_after} bytes), {ratio:.2f} x smaller")
    if report.errors:
        name, worst = report.worst
        table.add_row("mean relative error", f"{report.mean_error:.4f}")
        table.add_row("worst relative error", f"{worst:.4f}  {name}")
    table.add_row("time", f"{report.seconds:.1f} s")
    return table


def _quantize(args: argparse.Namespace, out: Console, err: Console) -> int:
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .checkpoint import quantize_checkpoint

    columns = (
        TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Drawn on stderr: what is on stdout is the result.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("reading headers", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=escape(name), completed=done, total=total)

        report = quantize_checkpoint(
            args.source,
            args.destination,
            quant_format=args.format,
            double_quant=args.double_quant,
            blocksize=args.blocksize,
            skip=args.skip,
            device=args.device,
            overwrite=args.overwrite,
            max_shard_bytes=max(1, int(min(args.max_shard_gb * 1e9, sys.maxsize))),
            progress=show,
        )
    out.print(report_table(report))
    for reason, names in sorted(report.kept.items()):
        out.print(f"copied ({reason}): {len(names)}, first {names[0]}", markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return 0


def plan_table(plan: MemoryPlan, vram: float | None) -> Table:
    """Show a memory plan as a table; ``vram`` in bytes adds which rows fit."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def fits(size: int) -> list[str]:
        if vram is None:
            return []
        return ["[green]yes[/]" if size <= vram else "[red]no[/]"]

    table = Table(box=SIMPLE_HEAD)
    headings = ["", "linear", "weights", "inference", *(["fits"] if vram is not None else [])]
    headings += ["QLoRA", *(["fits"] if vram is not None else [])]
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.label,
            _size(row.quantized_bytes),
            _size(row.weight_bytes),
            f"~{_size(row.inference_bytes)}",
            *fits(row.inference_bytes),
            f"~{_size(row.training_bytes)}",
            *fits(row.training_bytes),
        )
    return table


def _plan(args: argparse.Namespace, out: Console, _err: Console) -> int:
    import torch

    from .memory_plan import plan_memory

    plan = plan_memory(
        args.source,
        context=args.context,
        batch=args.batch,
        lora_rank=args.lora_rank,
        gpus=args.gpus,
        strategy=args.strategy,
    )
    vram, origin = (args.vram * 1e9, "--vram") if args.vram is not None else (None, "")
    if vram is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        vram, origin = float(properties.total_memory), properties.name
    out.print(
        f"{plan.linear_layers} linear layers, {plan.linear_parameters / 1e6:.1f} M parameters;"
        f" other tensors: {plan.other_parameters / 1e6:.1f} M, {_size(plan.rows[0].other_bytes)} in 16 bits",
        highlight=False,
    )
    if args.gpus > 1:
        out.print(f"{args.gpus} GPUs, {args.strategy}: inference and QLoRA are the memory of each GPU", highlight=False)
    out.print(plan_table(plan, vram))
    if vram is not None:
        out.print(f"VRAM: {_size(vram)} ({origin})", markup=False, highlight=False)
    out.print("Linear layers and weights (all tensors) are exact. Estimates (~) add:", highlight=False)
    for estimate in plan.estimates:
        where = {(True, True): "both", (True, False): "training"}.get(
            (estimate.training, estimate.inference), "inference"
        )
        line = f"  {estimate.name} ({where}): {_size(estimate.bytes)} = {estimate.formula}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return 0


def _info(args: argparse.Namespace, out: Console, _err: Console) -> int:
    from rich.markup import escape
    from rich.table import Table

    from ._backend import FORCED
    from .info import report

    facts = report()
    tested = facts["self_test"]
    if args.json:
        # Not through rich, which would wrap long lines.
        print(json.dumps(facts, indent=2, default=list))
        return 0 if tested["passed"] else 1
    build, driver, cpu, framework = facts["build"], facts["driver"], facts["cpu"], facts["torch"]
    table = Table(show_header=False)
    table.add_row("fewbits", facts["version"])
    table.add_row("python", f"{facts['python']}, {facts['platform']}")
    table.add_row("torch", f"{framework['version']} (CUDA {framework['cuda'] or 'none'})")
    served = ", ".join(f"{kind} {who}" for kind, who in facts["backend"].items())
    table.add_row("backend", f"{served}, forced by FEWBITS_BACKEND" if FORCED else served)
    table.add_row(
        "build", f"CUDA images: {', '.join(build['images'])}" if build["cuda"] else "CPU only: no CUDA images"
    )
    if driver.get("version"):
        table.add_row("driver", f"CUDA {'.'.join(map(str, driver['version']))}")
    else:
        table.add_row("driver", escape(f"none ({driver.get('error') or 'no driver library'})"))
    table.add_row("bitsandbytes", escape(facts["bitsandbytes"]))
    for i, device in enumerate(driver.get("devices", ())):
        capability = ".".join(map(str, device["compute_capability"]))
        words = f"{device['name']}, {_size(device['memory'])}, compute capability {capability}"
        table.add_row(f"device {i}", escape(f"{words}, image {device['image']}"))
    forced = f", forced by {cpu['forced_by']}" if "forced_by" in cpu else ""
    table.add_row("CPU", escape(f"path {cpu['path']}{forced}, {cpu['threads']} threads"))
    table.add_row("CPU features", ", ".join(cpu["features"]))
    for check in tested["checks"]:
        mark = "[green]passed[/]" if check["passed"] else "[red]FAILED[/]"
        table.add_row("self-test", f"{mark} {escape(check['name'])}: {escape(check['detail'])}")
    table.add_row("self-test time", f"{tested['seconds']} s")
    out.print(table)
    return 0 if tested["passed"] else 1


def _shim(args: argparse.Namespace, out: Console, _err: Console) -> int:
    from . import shim
    from ._reader import UsageError
    from .compat import VERSION

    def say(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    def ask(question: str) -> bool:
        if args.yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(f"{question} Say --yes where nobody can be asked")
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    if args.wheel is not None and args.action != "install":
        raise UsageError(f"--wheel goes with install, got {args.action}")
    before = shim.installed_version()
    if args.action == "status":
        say(f"bitsandbytes: {shim.describe()}")
    elif args.wheel is not None:
        say(str(shim.build_wheel(args.wheel)))
    elif args.action == "install":
        replaced = "" if before is None else f" in place of the installed {before}"
        if not ask(f"Install {VERSION} as bitsandbytes for {sys.executable}{replaced}?"):
            say("nothing was changed")
            return 1
        say(f"installed bitsandbytes {shim.install()}, which is fewbits{replaced}")
    else:
        if shim.is_shim(before) and not ask(f"Remove bitsandbytes {before} from {sys.executable}?"):
            say("nothing was changed")
            return 1
        say(f"removed bitsandbytes {shim.remove()}; `pip install bitsandbytes` installs the real one")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"fewbits: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name. Default: those of the process.

    Returns
    -------
    int
        The exit code.

    Examples
    --------
    >>> main(["plan", "no such directory"])
    2
    """
    args = build_parser().parse_args(argv)
    from rich.console import Console

    from ._reader import CheckpointError, UsageError
    from .shim import ShimError

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python takes handlers only there
        before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    run = {"quantize": _quantize, "plan": _plan, "info": _info, "shim": _shim}[args.command]
    try:
        return run(args, Console(), Console(stderr=True))
    except _Interrupted as stop:
        return _fail("interrupted; nothing was written", stop.exit_code)
    except BrokenPipeError:
        # The reader (`fewbits plan ... | head`) has seen enough. Python flushes stdout at exit: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FEWBITS_TRACEBACK"):
            raise
        if isinstance(error, UsageError):
            return _fail(str(error), 2)
        if isinstance(error, (CheckpointError, ShimError, OSError)):
            return _fail(str(error), 1)
        return _fail(f"{type(error).__name__}: {error} (FEWBITS_TRACEBACK=1 shows where)", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
