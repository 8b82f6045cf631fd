"""Which tensors of a checkpoint are quantized, and what they become.

A checkpoint names tensors, not modules, so "is this the weight of a linear layer" is decided by name and shape:

1. only floating-point tensors (float64, float32, float16, bfloat16) of two dimensions, at least one element and a
   name that ends in ``.weight`` are candidates;
2. embeddings, norms, output heads, mixture-of-experts routers, LoRA adapters and the layers that transformers keeps in
   float32 stay as they are (the patterns below);
3. so does every tensor that a ``skip`` pattern names;
4. so does every module that a loader would leave unquantized because of the resulting ``llm_int8_skip_modules``
   (``transformers`` compares by prefix, suffix and regular expression), so that file and loader always agree.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ._safetensors import Part, TensorEntry, part

Format = Literal["nf4", "fp4", "int8rows", "blockwise8"]
FORMATS: tuple[Format, ...] = ("nf4", "fp4", "int8rows", "blockwise8")
DEFAULT_BLOCKSIZE: dict[Format, int | None] = {"nf4": 64, "fp4": 64, "int8rows": None, "blockwise8": 256}
NESTED_BLOCKSIZE = 256
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

QUANTIZABLE = ("F64", "F32", "F16", "BF16")

# Judged on the last component of the module's name: `encoder.embeddings.dense` is a linear layer.
_EMBEDDING = re.compile(r"embed|embd|^(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate)$")
_ADAPTER = re.compile(r"^lora_")
# Judged on every component; the second set are heads only at the top of the model.
_HEAD = frozenset(
    {"lm_head", "generator_lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "predictions"}
    | {"vocab_projector", "pred_layer", "lm_loss", "output_projection"}
)
_TOP_HEAD = frozenset({"output", "head", "proj_out"})
# A head that is tied to the embedding has no tensor in the file, but the model has the module, and a loader that is not
# told to skip it makes a quantized layer of it. Names by a word of the model's architecture.
_TIED_HEADS = {
    "MaskedLM": ("cls.predictions.decoder", "predictions.decoder", "vocab_projector"),
    "PreTraining": ("cls.predictions.decoder", "predictions.decoder"),
    "ConditionalGeneration": ("proj_out",),
    "LMHead": ("pred_layer.proj",),
}
# Layers that transformers keeps in float32 and therefore never quantizes: T5's second feed-forward weight, BLIP-2's
# Q-Former, the indexer of sparse attention.
_FLOAT32 = re.compile(r"(^|\.)(DenseReluDense\.wo|qformer\..*|indexer\.weights_proj)$")

# Modules that store the weight as (in_features, out_features). Loaders build an ordinary linear layer for them and
# expect the quantized weight transposed.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor.

    Attributes
    ----------
    entry : TensorEntry
    quantize : bool
    reason : str
        Why it is kept as it is; empty when it is quantized.
    transpose : bool
        The weight is transposed before it is quantized (GPT-2's ``Conv1D``).
    """

    entry: TensorEntry
    quantize: bool
    reason: str = ""
    transpose: bool = False

    @property
    def module(self) -> str:
        """Name of the module that owns the weight."""
        return self.entry.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is quantized."""
        return self.entry.shape[::-1] if self.transpose else self.entry.shape


def matches(pattern: str, name: str) -> bool:
    """Tell whether a ``--skip`` pattern names a tensor.

    Parameters
    ----------
    pattern : str
        ``re:EXPRESSION``: a regular expression, found anywhere in the tensor's name. With ``*``, ``?`` or ``[``: a
        shell pattern for the whole name of the tensor or of its module. Otherwise one or more whole components of the
        name: ``lm_head``, ``layers.0``, ``model.layers.0.mlp``.
    name : str
        Name of the tensor, ``model.layers.0.mlp.up_proj.weight``.

    Examples
    --------
    >>> matches("layers.1", "model.layers.1.mlp.weight"), matches("layers.1", "model.layers.11.mlp.weight")
    (True, False)
    >>> matches("*.mlp.*", "model.layers.1.mlp.up.weight"), matches("re:up|down", "mlp.up.weight")
    (True, True)
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)
    return f".{pattern}." in f".{name}."


def _reason_to_keep(entry: TensorEntry, skip: Sequence[str]) -> str:
    if entry.dtype not in QUANTIZABLE:
        return "not a floating-point tensor of 16 bits or more"
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return f"{len(entry.shape)}-dimensional" if len(entry.shape) != 2 else "not named *.weight"
    if entry.numel == 0:
        return "no elements"
    components = entry.name.removesuffix(".weight").split(".")
    last = components[-1]
    if not _HEAD.isdisjoint(components) or (len(components) == 1 and last in _TOP_HEAD):
        return "output head"
    if _FLOAT32.search(".".join(components)):
        return "kept in float32 by transformers"
    for reason, pattern in (("embedding", _EMBEDDING), ("norm", _NORM), ("router", _ROUTER), ("adapter", _ADAPTER)):
        if pattern.search(last):
            return reason
    for wanted in skip:
        if matches(wanted, entry.name):
            return f"--skip {wanted}"
    return ""


class _LoaderSkip:
    """Tell which modules transformers (4 or 5) leaves alone when it is given a list of ``llm_int8_skip_modules``."""

    def __init__(self, skip_modules: Sequence[str]) -> None:
        # Version 5 reads an entry as a regular expression from the start of the name to the end of a component and as
        # a suffix, version 4 as text anywhere before a dot.
        self._prefix = re.compile("|".join(rf"(?:{re.escape(s)})(?:(?<=\.)|(?=\.|$))" for s in skip_modules))
        self._inside = re.compile("|".join(re.escape(f"{s}.") for s in skip_modules))
        self._suffixes = tuple(skip_modules)

    def __call__(self, module: str) -> bool:
        if module.endswith(self._suffixes) or self._prefix.match(module):
            return True
        return self._inside.search(module) is not None


def select(
    entries: Sequence[TensorEntry], skip: Sequence[str] = (), config: Mapping[str, Any] | None = None
) -> tuple[list[Choice], list[str]]:
    """Decide for every tensor whether it is quantized.

    Parameters
    ----------
    entries : sequence of TensorEntry
    skip : sequence of str
        Patterns of tensors to keep, see :func:`matches`.
    config : mapping, optional
        The model's ``config.json``.

    Returns
    -------
    choices : list of Choice
        One for each entry, in the same order.
    skip_modules : list of str
        Value for ``llm_int8_skip_modules``.
    """
    config = config or {}
    conv1d = config.get("model_type") in _CONV1D_MODELS
    choices = []
    for entry in entries:
        reason = _reason_to_keep(entry, skip)
        transpose = not reason and conv1d and entry.name.split(".")[-2] in _CONV1D
        choices.append(Choice(entry, not reason, reason, transpose))

    kept = {c.module for c in choices if not c.quantize and c.entry.name.endswith(".weight") and len(c.shape) == 2}
    kept.add("lm_head")
    architectures = " ".join(map(str, config.get("architectures") or []))
    for word, heads in _TIED_HEADS.items():
        if word in architectures:
            # Not at the price of a layer that has the same name without being a head.
            kept |= {h for h in heads if not any(c.quantize and _LoaderSkip([h])(c.module) for c in choices)}
    loader_skips = _LoaderSkip(sorted(kept))
    for i, choice in enumerate(choices):
        if choice.quantize and loader_skips(choice.module):
            choices[i] = Choice(choice.entry, False, "a loader would skip it: its name resembles a skipped module's")
    return choices, sorted(kept)


def quantized_parts(
    name: str, shape: Sequence[int], quant_format: Format, blocksize: int | None, double_quant: bool
) -> list[Part]:
    """List the tensors that replace one quantized weight, with their exact sizes.

    Parameters
    ----------
    name : str
        Name of the weight, ``X.weight``.
    shape : sequence of int
        ``(out_features, in_features)``.
    quant_format : {"nf4", "fp4", "int8rows", "blockwise8"}
    blocksize : int or None
        None for ``int8rows``, which has one scale a row.
    double_quant : bool

    Returns
    -------
    list of Part
        The packed quantization state is a blob: its length depends on the values.

    Examples
    --------
    >>> [(p.name, p.dtype, p.shape) for p in quantized_parts("a.weight", (8, 16), "nf4", 64, False)[:3]]
    [('a.weight', 'U8', (64, 1)), ('a.weight.absmax', 'F32', (2,)), ('a.weight.quant_map', 'F32', (16,))]
    """
    rows, columns = shape
    n = rows * columns
    if quant_format == "int8rows":
        module = name.removesuffix("weight")
        return [part(name, "I8", shape), part(f"{module}SCB", "F32", (rows,)), part(f"{module}weight_format", "U8", ())]
    if blocksize is None:
        raise ValueError(f"blocksize: got None, expected a block size for the format {quant_format}")
    blocks = -(-n // blocksize)
    if quant_format == "blockwise8":
        parts = [part(name, "U8", shape), part(f"{name}.absmax", "F32", (blocks,))]
        parts.append(part(f"{name}.quant_map", "F32", (256,)))
        return [*parts, Part(f"{name}.{BLOCKWISE8_STATE}", "U8", (), 0, blob=True)]
    parts = [part(name, "U8", ((n + 1) // 2, 1)), part(f"{name}.absmax", "U8" if double_quant else "F32", (blocks,))]
    parts.append(part(f"{name}.quant_map", "F32", (16,)))
    if double_quant:
        parts.append(part(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCKSIZE),)))
        parts.append(part(f"{name}.nested_quant_map", "F32", (256,)))
    return [*parts, Part(f"{name}.quant_state.bitsandbytes__{quant_format}", "U8", (), 0, blob=True)]


BLOCKWISE8_STATE = "quant_state.fewbits__blockwise8"


def quantization_config(
    quant_format: Format, blocksize: int | None, double_quant: bool, skip_modules: Sequence[str], compute_dtype: str
) -> dict[str, Any]:
    """Build the ``quantization_config`` of ``config.json``.

    For ``nf4``, ``fp4`` and ``int8rows`` it has the keys that transformers' ``BitsAndBytesConfig`` reads and writes;
    ``blockwise8`` is fewbits' own format (``quant_method`` "fewbits").
    """
    if quant_format == "blockwise8":
        return {
            "quant_method": "fewbits",
            "format": quant_format,
            "blocksize": blocksize,
            "skip_modules": list(skip_modules),
        }
    four = quant_format != "int8rows"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_format if four else "fp4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
