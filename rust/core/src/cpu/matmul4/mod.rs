//! Products with a 4-bit weight: `y[m][n] = sum over k of x[m][k] * W[n][k] + bias[n]`.
//!
//! Two methods. For few tokens the time is that of reading the weight, so each row of codes is decoded in registers and multiplied
//! at once ([`few`], with AVX-512 [`avx512`]). For more, [`tiles`] decodes a tile of the weight that stays in the cache and multiplies it
//! with all tokens. Neither writes the weight out. Sums are float32; their order depends on the path, the method and `K` only, not
//! on threads nor on the other tokens.
//!
//! float32 and float16 activations are multiplied in float32. bfloat16 ones are too, but where the processor has dot products of
//! bfloat16: there the weight's factors are bfloat16, rounded once, as they are in a weight dequantized to bfloat16.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod few;
mod pack;
#[cfg(test)]
mod tests;
mod tiles;

use super::dequantize::{Scales, Tensor4};
use super::element::{Element, for_dtype};
use super::path::Path;
use crate::matmul4::{Rows, Weight};
use crate::{Dtype, Result};

/// A product whose addresses have become pointers. `T` is the type of the tokens, the bias and the result.
struct Product<'a, T> {
    weight: Tensor4<'a>,
    n: usize,
    k: usize,
    x: *const T,
    m: usize,
    bias: *const T,
    out: *mut T,
    path: Path,
}

// SAFETY: the pointers are to memory that the caller lends for the length of the call; threads write different elements of `out`.
unsafe impl<T> Sync for Product<'_, T> {}

impl<T: Element> Product<'_, T> {
    /// # Safety
    /// `row < n`.
    unsafe fn bias(&self, row: usize) -> f32 {
        // SAFETY: the bias, where there is one, has `n` elements.
        if self.bias.is_null() { 0.0 } else { unsafe { self.bias.add(row).read_unaligned() }.widen() }
    }
}

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Few,
    Tiles,
}

/// The method for `m` tokens, or `None` where dequantized panels and the ordinary product are faster.
fn method(path: Path, _dtype: Dtype, m: usize) -> Option<Method> {
    let few = if path.is_avx512() { few::MOST_TOKENS } else { 4 };
    Some(if m <= few { Method::Few } else { Method::Tiles })
}

/// # Safety
/// As [`crate::matmul4::matmul_4bit`].
pub(crate) unsafe fn matmul_4bit(weight: Weight, rows: Rows, threads: usize) -> Result<bool> {
    let path = Path::chosen();
    let Some(method) = method(path, rows.dtype, rows.m) else { return Ok(false) };
    // SAFETY: the caller's promise, handed on.
    unsafe { multiply(weight, rows, threads, path, method) }?;
    Ok(true)
}

/// # Safety
/// As [`crate::matmul4::matmul_4bit`]; the processor runs `path`.
unsafe fn multiply(weight: Weight, rows: Rows, threads: usize, path: Path, method: Method) -> Result<()> {
    let Weight { n, k, blocksize, .. } = weight;
    // SAFETY: the caller's promise, handed on; `T` is the dtype's type.
    unsafe {
        let scales = Scales::new(weight.absmax);
        let weight = Tensor4 {
            codes: weight.codes as *const u8,
            values: weight.quant_type.values(),
            scales: &scales,
            blocksize,
        };
        for_dtype!(rows.dtype, T => {
            let (x, bias, out) = (rows.x as *const T, rows.bias as *const T, rows.out as *mut T);
            let product = Product { weight, n, k, x, m: rows.m, bias, out, path };
            match method {
                Method::Few => few::multiply(&product, rows.dtype, threads),
                Method::Tiles => tiles::multiply(&product, rows.dtype, threads),
            }
        })
    }
}
