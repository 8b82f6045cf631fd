"""Which tests prove which cell of the compatibility table: ``docs/tables.py`` renders it from their outcomes.

A cell that is claimed here and not proved, because a test is gone, failed, or did not run, stops the build of the
documentation. What no test tries is not claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

from outcomes import DTYPES

NATIVE = ("cpu", "cuda")
EVERYWHERE = (*NATIVE, "portable")


@dataclass(frozen=True)
class Proof:
    """A test function; `dtypes` names those that it tries within itself, where its ids do not."""

    test: str
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feature:
    """A row: what it is, and the tests of its values, under ``torch.compile``, and in a CUDA graph."""

    name: str
    values: tuple[Proof, ...]
    compiled: tuple[Proof, ...] = ()
    captured: tuple[Proof, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    devices: tuple[str, ...] = EVERYWHERE


def proofs(*tests: str) -> tuple[Proof, ...]:
    return tuple(map(Proof, tests))


FEATURES = (
    Feature(
        "quantize and dequantize, 8-bit and 4-bit blocks",
        proofs("test_blockwise.py::test_every_dtype_and_blocksize"),
        proofs("test_compile.py::test_functions"),
        proofs("test_blockwise_cuda.py::test_graph_capture", "test_ops_registration.py::test_capture_in_a_graph"),
    ),
    Feature(
        "double quantization",
        proofs("test_double_quant.py::test_sum_of_every_magnitude", "test_double_quant.py::test_largest_block_maxima"),
        proofs("test_compile.py::test_functions"),
        proofs("test_ops_registration.py::test_capture_in_a_graph"),
    ),
    Feature(
        "`matmul_4bit`",
        proofs("test_matmul4.py::test_as_exact_as_torch"),
        proofs("test_compile.py::test_functions"),
        proofs("test_matmul4.py::test_capture_in_a_graph"),
    ),
    Feature(
        "`Linear4bit`, forward",
        proofs("test_linear4bit_values.py::test_forward_is_a_dense_linear"),
        proofs("test_compile.py::test_inductor"),
        proofs("test_matmul4.py::test_capture_in_a_graph"),
    ),
    Feature(
        "`Linear4bit`, gradients",
        proofs("test_linear4bit_values.py::test_gradients_are_a_dense_linears"),
        proofs("test_compile.py::test_training", "test_compile.py::test_inductor"),
        proofs("test_matmul4.py::test_capture_in_a_graph"),
    ),
    Feature(
        "`Embedding4bit`",
        (Proof("test_embedding4bit.py::test_rows", DTYPES),),
        proofs("test_embedding4bit.py::test_compiled"),
        proofs("test_embedding4bit.py::test_capture_in_a_graph"),
    ),
    Feature(
        "the `int8_` functions",
        proofs("test_int8_functional.py::test_vectorwise_quant", "test_int8_functional.py::test_mixed_scaled_mm"),
        proofs("test_linear8bit_compile.py::test_functions_compile"),
    ),
    Feature(
        "`Linear8bitLt`, forward",
        proofs("test_linear8bit.py::test_products"),
        proofs("test_linear8bit_compile.py::test_fullgraph"),
        proofs("test_linear8bit_compile.py::test_cuda_graph"),
    ),
    Feature(
        "`Linear8bitLt`, gradients, frozen weight",
        proofs("test_linear8bit_training.py::test_gradients_of_a_frozen_weight"),
        proofs("test_linear8bit_compile.py::test_fullgraph"),
    ),
    Feature(
        "`Linear8bitLt`, training its weight",
        proofs("test_linear8bit_training.py::test_training_a_floating_point_weight"),
        proofs("test_linear8bit_compile.py::test_fullgraph"),
        dtypes=("float32", "bfloat16"),
    ),
    Feature(
        "`Embedding8bit`",
        proofs("test_embedding8bit.py::test_embedding"),
        proofs("test_linear8bit_compile.py::test_embedding_compiles"),
    ),
    Feature(
        "`nn.parametrize`: any parameter in 4 bits",
        proofs("test_parametrize.py::test_reading_gives_the_dequantized_tensor"),
        devices=("cpu",),
    ),
    Feature(
        "optimizers, the 8-bit classes",
        proofs("test_optim_8bit.py::test_bytes_of_the_oracle"),
        captured=proofs("test_optim_paging.py::test_captured_step_follows_the_schedule"),
    ),
    Feature(
        "optimizers, each rule in 8 and 32 bits, any dtype of gradients",
        proofs("test_optim_native.py::test_step_is_the_oracle"),
        captured=proofs("test_optim_cuda.py::test_a_captured_step_follows_the_learning_rate"),
        devices=NATIVE,
    ),
    Feature(
        "optimizers, resumed from a checkpoint",
        proofs("test_optim_state.py::test_resume_bit_for_bit"),
        dtypes=("float32", "bfloat16"),
    ),
    Feature(
        "optimizers, paged",
        (Proof("test_optim_8bit.py::test_paged_is_the_same", ("bfloat16",)),),
        captured=proofs("test_optim_paging.py::test_captured_step_follows_the_schedule"),
        dtypes=("bfloat16",),
        devices=("cuda",),  # elsewhere they are those that are not paged
    ),
)

# With transformers, peft, accelerate and trl, on the CPU: what a user does, the tests, and in which sets of versions.
WORKFLOWS = (
    ("load in 4 and in 8 bits", "test_hf_models.py::test_layers_are_quantized", ("hf4", "hf5")),
    ("`device_map`", "test_hf_models.py::test_device_maps", ("hf4", "hf5")),
    ("`generate`", "test_hf_models.py::test_generate", ("hf4", "hf5")),
    ("`save_pretrained` and reload, equal logits", "test_hf_models.py::test_save_and_reload", ("hf4", "hf5")),
    ("`dequantize()`", "test_hf_models.py::test_dequantize", ("hf4", "hf5")),
    ("layers on disk, quantized as they come", "test_hf_offload.py::test_quantized_on_the_fly", ("hf4", "hf5")),
    ("`Trainer` with each `optim=` name", "test_hf_training.py::test_optimizers_of_the_trainer", ("hf4", "hf5")),
    ("resume", "test_hf_training.py::test_resume", ("hf4", "hf5")),
    ("LoRA and DoRA, saved, reloaded, merged", "test_hf_training.py::test_adapters", ("hf4", "hf5")),
    ("training after an evaluation", "test_hf_training.py::test_learning_goes_on_after_an_evaluation", ("hf4", "hf5")),
    ("`torch.compile` of a loaded model", "test_hf_training.py::test_compiled_model", ("hf4", "hf5")),
    ("trl's `SFTTrainer`", "test_hf_training.py::test_sft_trainer", ("hf5",)),
    ("diffusers: load, save and reload", "test_hf_diffusers.py::test_load_save_and_reload", ("hf5",)),
    ("accelerate's FSDP2", "test_hf_accelerate.py::test_prepare", ("hf4", "hf5")),
    ("`Trainer` with FSDP2, saved and resumed", "test_hf_accelerate.py::test_trainer", ("hf4", "hf5")),
    ('`tp_plan="auto"`', "test_hf_tensor_parallel.py::test_logits", ("hf5",)),
    ("installed after the libraries", "test_hf_late.py::test_transformers_and_accelerate", ("hf4", "hf5")),
)
