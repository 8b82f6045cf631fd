//! Products with 4-bit weights. Arguments: `_native.pyi`.

use fewbits_core::matmul4::{self, Rows, Weight};
use pyo3::prelude::*;

use crate::blockwise::run;
use crate::error::Result;
use crate::target::{absmax, dtype, quant_type, target};

/// Multiplies with a 4-bit weight; `nested_blocksize` 0 means plain float32 maxima. Returns whether a kernel took it.
#[pyfunction]
pub fn matmul_4bit(
    py: Python<'_>,
    x: u64,
    m: usize,
    dtype: usize,
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
    bias: u64,
    out: u64,
    device: i64,
    queue: u64,
) -> Result<bool> {
    let absmax = self::absmax(absmax, nested_code, nested_absmax, nested_blocksize, offset);
    let weight = Weight { codes, n, k, blocksize, quant_type: self::quant_type(quant_type)?, absmax };
    let rows = Rows { x, m, dtype: self::dtype(dtype)?, bias, out };
    let target = target(device, queue)?;
    // SAFETY: `fewbits._matmul` passes addresses of tensors of these sizes on this device and keeps them alive for the call.
    run(py, target, move || unsafe { matmul4::matmul_4bit(weight, rows, target) })
}
