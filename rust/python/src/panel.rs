//! Parts of 4-bit weights. Arguments: `_native.pyi`.

use fewbits_core::panel::{self, Panel, Rows};
use pyo3::prelude::*;

use crate::blockwise::run;
use crate::error::Result;
use crate::target::{dtype, target, weight};

/// Expands a rectangle of a 4-bit weight.
#[pyfunction]
pub fn dequantize_4bit_panel(
    py: Python<'_>,
    codes: u64,
    n: usize,
    k: usize,
    blocksize: usize,
    quant_type: usize,
    absmax: u64,
    nested_code: u64,
    nested_absmax: u64,
    nested_blocksize: usize,
    offset: u64,
    first_row: usize,
    rows: usize,
    first_column: usize,
    columns: usize,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let weight =
        weight(codes, n, k, blocksize, quant_type, absmax, nested_code, nested_absmax, nested_blocksize, offset)?;
    let panel = Panel { rows: Rows::From(first_row), count: rows, first_column, columns };
    let (dtype, target) = (self::dtype(dtype)?, target(device, queue)?);
    // SAFETY: `fewbits._matmul` passes addresses of tensors of these sizes on this device and keeps them alive for the call.
    run(py, target, move || unsafe { panel::dequantize(weight, panel, dtype, out, target) })
}

/// Expands the rows of a 4-bit weight that int32 or (`wide`) int64 indices name.
#[pyfunction]
pub fn dequantize_4bit_rows(
    py: Python<'_>,
    codes: u64,
    n: usize,
    k: usize,
    blocksize: usize,
    quant_type: usize,
    absmax: u64,
    nested_code: u64,
    nested_absmax: u64,
    nested_blocksize: usize,
    offset: u64,
    indices: u64,
    wide: bool,
    count: usize,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let weight =
        weight(codes, n, k, blocksize, quant_type, absmax, nested_code, nested_absmax, nested_blocksize, offset)?;
    let panel = Panel { rows: Rows::Indices { address: indices, wide }, count, first_column: 0, columns: k };
    let (dtype, target) = (self::dtype(dtype)?, target(device, queue)?);
    // SAFETY: as in `dequantize_4bit_panel`.
    run(py, target, move || unsafe { panel::dequantize(weight, panel, dtype, out, target) })
}
