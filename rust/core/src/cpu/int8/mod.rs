//! LLM.int8() on the CPU.
//!
//! Rows are quantized ([`rows`]), blocks of rows of the weight are multiplied with all tokens ([`tiles`], by the [`kernels`] of the
//! processor) as exact integers, and each block is scaled, completed by its outlier columns and rounded ([`finish`]).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod finish;
mod kernels;
mod rows;
#[cfg(test)]
mod tests;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod vnni;

use super::buffer::Buffer;
use super::element::{Element, F32, for_dtype};
use super::path::multiversion;
use super::pool;
use crate::int8::{Codes, INVERSE_127, Output, Rectangle, Rows, Weight};
use crate::{Dtype, Result};

/// # Safety
/// As [`crate::int8::quantize_rows`].
pub(crate) unsafe fn quantize_rows(rows: Rows, k: usize, threshold: f32, to: Codes, threads: usize) -> Result<()> {
    // SAFETY: the caller's promise, handed on.
    unsafe { rows::quantize(rows, k, threshold, to, threads) }
}

/// # Safety
/// As [`crate::int8::matmul`].
pub(crate) unsafe fn matmul(rows: Rows, codes: Codes, weight: Weight, output: Output, threads: usize) -> Result<()> {
    let factors = tiles::Factors {
        a: codes.codes as *const i8,
        m: rows.m,
        b: weight.codes as *const i8,
        n: weight.n,
        k: weight.k,
    };
    // SAFETY: the caller's promise, handed on; `T` is the dtype's type.
    unsafe {
        for_dtype!(rows.dtype, T => {
            let finish = finish::Finish::<T>::new(rows, codes, weight, output);
            tiles::multiply(&factors, threads, |scratch, block, sums| finish.run(scratch, block, sums))
        })
    }
}

/// # Safety
/// As [`crate::int8::linear`].
pub(crate) unsafe fn linear(rows: Rows, threshold: f32, weight: Weight, output: Output, threads: usize) -> Result<()> {
    let (mut codes, mut scales) = (Buffer::<i8>::new(rows.m * weight.k), vec![0f32; rows.m]);
    let mut mask = vec![0u32; if threshold > 0.0 { weight.k.div_ceil(32) } else { 0 }];
    let mask = if mask.is_empty() { 0 } else { mask.as_mut_ptr() as u64 };
    let codes = Codes { codes: codes.as_mut_ptr() as u64, scales: scales.as_mut_ptr() as u64, mask };
    // SAFETY: the caller's promise, handed on; our memory has room for the codes.
    unsafe {
        rows::quantize(rows, weight.k, threshold, codes, threads)?;
        matmul(rows, codes, weight, output, threads)
    }
}

/// # Safety
/// As [`crate::int8::matmul_int32`].
pub(crate) unsafe fn matmul_int32(
    a: u64,
    m: usize,
    k: usize,
    b: u64,
    n: usize,
    out: u64,
    threads: usize,
) -> Result<()> {
    let factors = tiles::Factors { a: a as *const i8, m, b: b as *const i8, n, k };
    // SAFETY: the caller's promise, handed on; blocks are different parts of the result.
    unsafe {
        tiles::multiply(&factors, threads, |(): &mut (), block, sums| {
            for (token, sums) in sums.chunks(tiles::ROWS).take(block.tokens).enumerate() {
                let at = (block.first_token + token) * n + block.first_row;
                let to = (out as *mut i32).add(at).cast::<u8>();
                std::ptr::copy_nonoverlapping(sums.as_ptr().cast(), to, block.rows * size_of::<i32>());
            }
        })
    }
}

/// A row of a weight: `count` codes times one factor.
#[inline(always)]
unsafe fn expand_body<T: Element>(codes: *const i8, factor: f32, count: usize, out: *mut T) {
    for i in 0..count {
        // SAFETY: the caller's rows hold `count` elements.
        unsafe { out.add(i).write_unaligned(T::narrow(f32::from(codes.add(i).read()) * factor)) };
    }
}

multiversion! {
    unsafe fn expand[T: Element][T](codes: *const i8, factor: f32, count: usize, out: *mut T) => expand_body
}

/// # Safety
/// As [`crate::int8::dequantize_panel`].
pub(crate) unsafe fn dequantize_panel(
    weight: Weight,
    part: Rectangle,
    out: u64,
    dtype: Dtype,
    threads: usize,
) -> Result<()> {
    let Rectangle { first_row, rows, first_column, columns } = part;
    for_dtype!(dtype, T => pool::run(rows, columns * (1 + size_of::<T>()), threads, |first, last| {
        for row in first..last {
            // SAFETY: the rectangle lies within the weight, the result has its size; the caller promised the memory.
            unsafe {
                let of_weight = first_row + row;
                let scale = (weight.scales as *const F32).add(of_weight).read_unaligned().widen();
                let codes = (weight.codes as *const i8).add(of_weight * weight.k + first_column);
                expand::<T>(codes, scale * INVERSE_127, columns, (out as *mut T).add(row * columns));
            }
        }
    }))
}
