//! Products with 4-bit weights. Arguments: `_native.pyi`.

use fewbits_core::matmul4::{self, Rows, Weight};
use fewbits_core::{Dtype, Target};
use pyo3::prelude::*;

use crate::blockwise::run;
use crate::error::Result;
use crate::target::{dtype, target, weight};

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
    workspace: u64,
    device: i64,
    queue: u64,
) -> Result<bool> {
    let weight =
        weight(codes, n, k, blocksize, quant_type, absmax, nested_code, nested_absmax, nested_blocksize, offset)?;
    multiply(py, weight, x, m, self::dtype(dtype)?, bias, out, workspace, target(device, queue)?)
}

/// Bytes of memory on the device that `matmul_4bit` of `m` rows with a weight of `n` x `k` goes faster with; 0 on the CPU.
#[pyfunction]
pub fn matmul_4bit_workspace_size(m: usize, n: usize, k: usize, device: i64) -> Result<usize> {
    Ok(matmul4::workspace_size(m, n, k, target(device, 1)?)?)
}

/// A 4-bit weight whose addresses and sizes are passed once, for callers that count every tenth of a microsecond.
#[pyclass(frozen)]
pub struct Weight4bit(Weight);

#[pymethods]
impl Weight4bit {
    #[new]
    fn new(
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
    ) -> Result<Self> {
        let weight =
            weight(codes, n, k, blocksize, quant_type, absmax, nested_code, nested_absmax, nested_blocksize, offset)?;
        Ok(Self(weight))
    }

    /// As the function `matmul_4bit`.
    fn matmul(
        &self,
        py: Python<'_>,
        x: u64,
        m: usize,
        dtype: usize,
        bias: u64,
        out: u64,
        workspace: u64,
        device: i64,
        queue: u64,
    ) -> Result<bool> {
        multiply(py, self.0, x, m, self::dtype(dtype)?, bias, out, workspace, target(device, queue)?)
    }
}

fn multiply(
    py: Python<'_>,
    weight: Weight,
    x: u64,
    m: usize,
    dtype: Dtype,
    bias: u64,
    out: u64,
    workspace: u64,
    target: Target,
) -> Result<bool> {
    let rows = Rows { x, m, dtype, bias, out, workspace };
    // SAFETY: `fewbits._matmul` and `fewbits._prepared` pass addresses of tensors of these sizes on this device and keep them alive
    // for the call.
    run(py, target, move || unsafe { matmul4::matmul_4bit(weight, rows, target) })
}
