//! LLM.int8() on CUDA.

use crate::int8::{Codes, Output, Rectangle, Rows, Weight};
use crate::{Dtype, Error, Result};

/// # Safety
/// As [`crate::int8::quantize_rows`].
pub unsafe fn quantize_rows(_: Rows, _k: usize, _threshold: f32, _: Codes, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::int8::matmul`]; the result has elements.
pub unsafe fn matmul(_: Rows, _: Codes, _: Weight, _: Output, _device: usize, _stream: u64) -> Result<()> {
    Err(Error::NoKernels)
}

/// Bytes that [`linear`] needs.
pub fn linear_workspace_size(_m: usize, _n: usize, _k: usize, _outliers: bool, _device: usize) -> Result<usize> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::int8::linear`]; the result has elements.
pub unsafe fn linear(
    _: Rows,
    _threshold: f32,
    _: Weight,
    _: Output,
    _workspace: u64,
    _device: usize,
    _stream: u64,
) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::int8::matmul_int32`]; the result has elements.
pub unsafe fn matmul_int32(
    _a: u64,
    _m: usize,
    _k: usize,
    _b: u64,
    _n: usize,
    _out: u64,
    _device: usize,
    _stream: u64,
) -> Result<()> {
    Err(Error::NoKernels)
}

/// # Safety
/// As [`crate::int8::dequantize_panel`]; the result has elements.
pub unsafe fn dequantize_panel(
    _: Weight,
    _: Rectangle,
    _out: u64,
    _: Dtype,
    _device: usize,
    _stream: u64,
) -> Result<()> {
    Err(Error::NoKernels)
}
