//! Blockwise quantization. Arguments: `_native.pyi`.

use fewbits_core::blockwise::{self, Absmax, Blocks};
use fewbits_core::double_quant::{self, Nested};
use fewbits_core::{QuantType, Target, codebook as tables};
use pyo3::prelude::*;

use crate::error::{CoreError, Result, unknown};
use crate::target::{dtype, quant_type, target};

/// Runs an operation: a launch is over sooner than the interpreter's lock changes hands, CPU work is not.
pub fn run<T: Send>(
    py: Python<'_>,
    target: Target,
    work: impl FnOnce() -> fewbits_core::Result<T> + Send,
) -> Result<T> {
    match target {
        Target::Cpu { .. } => py.detach(work),
        Target::Cuda { .. } => work(),
    }
    .map_err(CoreError::from)
}

/// Quantizes to 8-bit codes.
#[pyfunction]
pub fn quantize_blockwise(
    py: Python<'_>,
    x: u64,
    n: usize,
    dtype: usize,
    blocksize: usize,
    code: u64,
    codes: u64,
    absmax: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (blocks, target) = (Blocks::new(n, blocksize, self::dtype(dtype)?)?, target(device, queue)?);
    // SAFETY: `fewbits._launch` passes addresses of tensors of these sizes on this device and keeps them alive for the call.
    run(py, target, move || unsafe { blockwise::quantize_8bit(blocks, x, code, codes, absmax, target) })
}

/// Expands 8-bit codes.
#[pyfunction]
pub fn dequantize_blockwise(
    py: Python<'_>,
    codes: u64,
    n: usize,
    blocksize: usize,
    code: u64,
    absmax: u64,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (blocks, target) = (Blocks::new(n, blocksize, self::dtype(dtype)?)?, target(device, queue)?);
    // SAFETY: as in `quantize_blockwise`.
    run(py, target, move || unsafe { blockwise::dequantize_8bit(blocks, codes, code, absmax, out, target) })
}

/// Quantizes to packed 4-bit codes.
#[pyfunction]
pub fn quantize_4bit(
    py: Python<'_>,
    x: u64,
    n: usize,
    dtype: usize,
    blocksize: usize,
    quant_type: usize,
    codes: u64,
    absmax: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (blocks, target) = (Blocks::new(n, blocksize, self::dtype(dtype)?)?, target(device, queue)?);
    let quant_type = self::quant_type(quant_type)?;
    // SAFETY: as in `quantize_blockwise`.
    run(py, target, move || unsafe { blockwise::quantize_4bit(blocks, x, quant_type, codes, absmax, target) })
}

/// Quantizes to packed 4-bit codes and the block maxima to 8-bit ones.
#[pyfunction]
pub fn quantize_4bit_nested(
    py: Python<'_>,
    x: u64,
    n: usize,
    dtype: usize,
    blocksize: usize,
    quant_type: usize,
    codes: u64,
    absmax_codes: u64,
    nested_absmax: u64,
    offset: u64,
    workspace: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (blocks, target) = (Blocks::new(n, blocksize, self::dtype(dtype)?)?, target(device, queue)?);
    let quant_type = self::quant_type(quant_type)?;
    let nested = Nested { absmax_codes, nested_absmax, offset };
    // SAFETY: as in `quantize_blockwise`; the workspace has `nested_workspace_size` bytes.
    run(py, target, move || unsafe {
        double_quant::quantize_4bit_nested(blocks, x, quant_type, codes, nested, workspace, target)
    })
}

/// Bytes of workspace that `quantize_4bit_nested` needs.
#[pyfunction]
pub fn nested_workspace_size(n: usize, blocksize: usize) -> Result<usize> {
    Ok(double_quant::workspace_size(Blocks::new(n, blocksize, fewbits_core::Dtype::F32)?))
}

/// Expands packed 4-bit codes.
#[pyfunction]
pub fn dequantize_4bit(
    py: Python<'_>,
    codes: u64,
    n: usize,
    blocksize: usize,
    quant_type: usize,
    absmax: u64,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    expand_4bit(py, codes, n, blocksize, quant_type, Absmax::Plain(absmax), out, dtype, device, queue)
}

/// Expands packed 4-bit codes whose block maxima are 8-bit codes.
#[pyfunction]
pub fn dequantize_4bit_nested(
    py: Python<'_>,
    codes: u64,
    n: usize,
    blocksize: usize,
    quant_type: usize,
    absmax_codes: u64,
    nested_code: u64,
    nested_absmax: u64,
    nested_blocksize: usize,
    offset: u64,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let absmax = Absmax::Nested {
        codes: absmax_codes,
        code: nested_code,
        absmax: nested_absmax,
        blocksize: nested_blocksize,
        offset,
    };
    expand_4bit(py, codes, n, blocksize, quant_type, absmax, out, dtype, device, queue)
}

fn expand_4bit(
    py: Python<'_>,
    codes: u64,
    n: usize,
    blocksize: usize,
    quant_type: usize,
    absmax: Absmax,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let (blocks, target) = (Blocks::new(n, blocksize, self::dtype(dtype)?)?, target(device, queue)?);
    let quant_type = self::quant_type(quant_type)?;
    // SAFETY: as in `quantize_blockwise`.
    run(py, target, move || unsafe { blockwise::dequantize_4bit(blocks, codes, quant_type, absmax, out, target) })
}

/// The values of a code table.
#[pyfunction]
pub fn codebook(name: &str) -> Result<Vec<f32>> {
    Ok(match name {
        "nf4" => QuantType::Nf4.values().to_vec(),
        "fp4" => QuantType::Fp4.values().to_vec(),
        "dynamic" => tables::dynamic_map(true).to_vec(),
        "dynamic_unsigned" => tables::dynamic_map(false).to_vec(),
        _ => return Err(unknown("name", name, "nf4, fp4, dynamic or dynamic_unsigned")),
    })
}
