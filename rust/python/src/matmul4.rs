//! Products with 4-bit weights. Arguments: `_native.pyi`.

use fewbits_core::matmul4::{self, Kept, Rows};
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
    let (rows, target) = (Rows { x, m, dtype: self::dtype(dtype)?, bias, out, workspace }, target(device, queue)?);
    // SAFETY: `fewbits._matmul` passes addresses of tensors of these sizes on this device and keeps them alive for the call.
    run(py, target, move || unsafe { matmul4::matmul_4bit(weight, rows, target) })
}

/// A 4-bit weight whose addresses and sizes are passed once, for callers that count every tenth of a microsecond.
#[pyclass(frozen)]
pub struct Weight4bit(Kept);

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
        Ok(Self(Kept::new(weight)))
    }

    /// Bytes of memory on the device that the product of `m` rows goes faster with; 0 on the CPU.
    fn workspace_size(&self, m: usize, device: i64) -> Result<usize> {
        Ok(self.0.workspace_size(m, target(device, 1)?)?)
    }

    /// As the function `matmul_4bit`. `version` changes whenever somebody writes to the weight's tensors; -1 where nobody knows.
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
        version: i64,
    ) -> Result<bool> {
        let (rows, target) = (Rows { x, m, dtype: self::dtype(dtype)?, bias, out, workspace }, target(device, queue)?);
        // SAFETY: `fewbits._prepared` passes addresses of tensors of these sizes on this device, keeps them alive for the call, and
        // passes the versions that torch counts for them.
        run(py, target, move || unsafe { self.0.matmul_4bit(rows, u64::try_from(version).ok(), target) })
    }
}
