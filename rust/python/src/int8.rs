//! LLM.int8(). Arguments: `_native.pyi`.

use fewbits_core::int8::{self, Codes, Output, Rectangle, Rows, Weight};
use fewbits_core::{Dtype, Target};
use pyo3::prelude::*;

use crate::blockwise::run;
use crate::error::Result;
use crate::target::{dtype, target};

/// Quantizes rows to int8 and sets the bits of columns with outliers.
#[pyfunction]
pub fn int8_quantize_rows(
    py: Python<'_>,
    x: u64,
    m: usize,
    k: usize,
    dtype: usize,
    threshold: f32,
    codes: u64,
    row_scale: u64,
    mask: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let rows = Rows { x, m, dtype: self::dtype(dtype)? };
    let (to, target) = (Codes { codes, scales: row_scale, mask }, target(device, queue)?);
    // SAFETY: callers in `fewbits` pass addresses of tensors of these sizes on this device and keep them alive for the call.
    run(py, target, move || unsafe { int8::quantize_rows(rows, k, threshold, to, target) })
}

/// Multiplies quantized rows with an int8 weight, outlier columns in full precision.
#[pyfunction]
pub fn int8_matmul(
    py: Python<'_>,
    x: u64,
    dtype: usize,
    codes: u64,
    m: usize,
    k: usize,
    row_scale: u64,
    weight: u64,
    n: usize,
    col_scale: u64,
    mask: u64,
    bias: u64,
    out: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let rows = Rows { x, m, dtype: self::dtype(dtype)? };
    let codes = Codes { codes, scales: row_scale, mask };
    let (weight, output) = (Weight { codes: weight, n, k, scales: col_scale }, Output { bias, out });
    let target = target(device, queue)?;
    // SAFETY: as in `int8_quantize_rows`.
    run(py, target, move || unsafe { int8::matmul(rows, codes, weight, output, target) })
}

/// Quantizes rows and multiplies them with an int8 weight.
#[pyfunction]
pub fn int8_linear(
    py: Python<'_>,
    x: u64,
    m: usize,
    k: usize,
    dtype: usize,
    threshold: f32,
    weight: u64,
    n: usize,
    col_scale: u64,
    bias: u64,
    out: u64,
    workspace: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let weight = Weight { codes: weight, n, k, scales: col_scale };
    multiply(py, weight, x, m, self::dtype(dtype)?, threshold, bias, out, workspace, 0, target(device, queue)?)
}

/// Bytes of memory on the device that `int8_linear` needs; 0 on the CPU.
#[pyfunction]
pub fn int8_linear_workspace_size(m: usize, n: usize, k: usize, device: i64) -> Result<usize> {
    Ok(int8::linear_workspace_size(m, n, k, target(device, 1)?)?)
}

/// The plain int32 product of `a` (m x k) with the transpose of `b` (n x k).
#[pyfunction]
pub fn int8_matmul_int32(
    py: Python<'_>,
    a: u64,
    m: usize,
    k: usize,
    b: u64,
    n: usize,
    out: u64,
    device: i64,
    queue: u64,
) -> Result<()> {
    let target = target(device, queue)?;
    // SAFETY: as in `int8_quantize_rows`.
    run(py, target, move || unsafe { int8::matmul_int32(a, m, k, b, n, out, target) })
}

/// Expands a rectangle of an int8 weight.
#[pyfunction]
pub fn int8_dequantize_panel(
    py: Python<'_>,
    weight: u64,
    n: usize,
    k: usize,
    col_scale: u64,
    first_row: usize,
    rows: usize,
    first_column: usize,
    columns: usize,
    out: u64,
    dtype: usize,
    device: i64,
    queue: u64,
) -> Result<()> {
    let weight = Weight { codes: weight, n, k, scales: col_scale };
    let part = Rectangle { first_row, rows, first_column, columns };
    let (dtype, target) = (self::dtype(dtype)?, target(device, queue)?);
    // SAFETY: as in `int8_quantize_rows`.
    run(py, target, move || unsafe { int8::dequantize_panel(weight, part, out, dtype, target) })
}

/// An int8 weight whose addresses and sizes are passed once, for callers that count every tenth of a microsecond.
#[pyclass(frozen)]
pub struct Int8Weight(Weight);

#[pymethods]
impl Int8Weight {
    #[new]
    fn new(weight: u64, n: usize, k: usize, col_scale: u64) -> Self {
        Self(Weight { codes: weight, n, k, scales: col_scale })
    }

    /// As the function `int8_linear`; the bitmasks of outlier columns lie at `mask`, where that is not 0.
    fn linear(
        &self,
        py: Python<'_>,
        x: u64,
        m: usize,
        dtype: usize,
        threshold: f32,
        bias: u64,
        out: u64,
        workspace: u64,
        mask: u64,
        device: i64,
        queue: u64,
    ) -> Result<()> {
        multiply(py, self.0, x, m, self::dtype(dtype)?, threshold, bias, out, workspace, mask, target(device, queue)?)
    }

    /// Where in its workspace `linear` left the bitmask of outlier columns, and of how many masks that is the union; 0 and 0 on the CPU.
    fn masks(&self, x: u64, m: usize, workspace: u64, device: i64) -> Result<(u64, usize)> {
        Ok(int8::masks(m, x, self.0, workspace, target(device, 1)?)?)
    }
}

fn multiply(
    py: Python<'_>,
    weight: Weight,
    x: u64,
    m: usize,
    dtype: Dtype,
    threshold: f32,
    bias: u64,
    out: u64,
    workspace: u64,
    mask: u64,
    target: Target,
) -> Result<()> {
    let (rows, output) = (Rows { x, m, dtype }, Output { bias, out });
    // SAFETY: as in `int8_quantize_rows`.
    run(py, target, move || unsafe { int8::linear(rows, threshold, weight, output, workspace, mask, target) })
}
