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
use super::path::{Path, has_amx_bf16};
use crate::matmul4::{PANELS, Rows, Weight, forced_name};
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

impl Method {
    const ALL: [Self; 2] = [Self::Few, Self::Tiles];

    fn name(self) -> &'static str {
        match self {
            Self::Few => "few",
            Self::Tiles => "tiles",
        }
    }
}

/// What the methods are called in `FEWBITS_MATMUL4`.
pub fn names() -> impl Iterator<Item = String> {
    Method::ALL.into_iter().map(|method| method.name().to_string())
}

/// The method for `m` tokens, or `None` where dequantized panels and the ordinary product are faster.
///
/// Time of few tokens grows with each of them; time of tiles with every sixteen, from a higher start: that of writing the tile. On a
/// Zen 4 core, 4096 x 4096, milliseconds:
///
/// | | M = 4 | 8 | 14 | 16 | 24 | 28 | 32 | 40 | 48 |
/// |---|---|---|---|---|---|---|---|---|---|
/// | AVX-512 BF16, few | 0.9 | 1.7 | 3.0 | 3.5 | 5.2 | 5.9 | 7.0 | 8.7 | 10.4 |
/// | AVX-512 BF16, tiles | 3.3 | 3.4 | 3.4 | 3.5 | 6.0 | 6.0 | 6.0 | 8.5 | 8.7 |
/// | AVX-512, few | 1.5 | 3.0 | 5.1 | 5.9 | 8.9 | 10.2 | 11.8 | 14.9 | 17.9 |
/// | AVX-512, tiles | 5.9 | 5.9 | 6.0 | 6.0 | 10.8 | 10.8 | 10.8 | 15.8 | 15.7 |
/// | AVX2, few | 7.6 | 13 | | | | | | | |
/// | AVX2, tiles | 7.2 | 7.4 | | | | | | | |
/// | portable, few | 17.6 | 26 | | | | | | | |
/// | portable, tiles | 21.6 | 21.6 | | | | | | | |
///
/// Rows that are not whole blocks decode more slowly, which tiles do once: they are ahead from two tokens on.
///
/// Where torch has a fast product of the dtype, panels win with many tokens: its threads go on spinning after each of its
/// operations, and are there at once where ours must share processors with them. Time of tiles over that of panels, two cores, a softmax
/// by torch before each call:
///
/// | | M = 32 | 64 | 128 | 256 |
/// |---|---|---|---|---|
/// | bfloat16, 256 x 256 | 0.47 | 0.74 | 1.03 | 1.24 |
/// | bfloat16, 1024 x 1024 | 0.71 | 1.00 | 1.41 | 1.49 |
/// | bfloat16, 4096 x 4096 | 0.99 | 1.12 | 1.26 | 1.20 |
/// | float32, 256 x 256 | 0.52 | 0.71 | 1.08 | 1.40 |
/// | float32, 1024 x 1024 | 0.70 | 0.87 | 1.12 | 1.15 |
/// | float32, 4096 x 4096 | 0.67 | 0.86 | 0.87 | 0.96 |
///
/// Few rows of the weight are few tiles, for which all tokens are packed, so that panels win earlier:
///
/// | | M = 64 | 128 | 256 | 1024 |
/// |---|---|---|---|---|
/// | bfloat16, 64 x 64 | 0.73 | 1.22 | 2.1 | 6.0 |
/// | bfloat16, 128 x 128 | 0.91 | 1.54 | 2.2 | 4.3 |
/// | bfloat16, 64 x 512 | 1.85 | 2.9 | 4.5 | 7.4 |
/// | bfloat16, 77 x 4096 | 2.1 | 2.8 | 3.1 | 4.5 |
/// | float32, 64 x 64 | 1.45 | 2.6 | 3.3 | 6.2 |
/// | float32, 128 x 128 | 1.23 | 1.92 | 2.2 | 3.1 |
/// | float32, 64 x 512 | 1.81 | 3.1 | 3.1 | 3.5 |
/// | float32, 77 x 4096 | 1.21 | 2.1 | 2.2 | 2.2 |
fn method(path: Path, dtype: Dtype, m: usize, n: usize, k: usize, whole_blocks: bool) -> Option<Method> {
    let elements = n * k;
    let few = match path {
        Path::Avx512Bf16 | Path::Avx512 if !whole_blocks => m == 1,
        Path::Avx512Bf16 | Path::Avx512 => m <= 40 && m * 8 < m.next_multiple_of(16) * 7,
        Path::Avx2 => m <= 3,
        Path::Portable => m <= 5,
    };
    if few {
        return Some(Method::Few);
    }
    let few_tiles = n <= 2 * tiles::ROWS && elements >= 1 << 15;
    let panels = match (path, dtype) {
        (_, Dtype::F16) => false,
        // Without vectors wider than everybody's, libraries with kernels of their own are ahead.
        (Path::Portable, _) => m >= 32,
        (Path::Avx512Bf16, Dtype::Bf16) => m >= 128 || (m >= 64 && (elements >= 1 << 22 || few_tiles)),
        (Path::Avx512Bf16 | Path::Avx512, Dtype::F32) => (m >= 128 && elements < 1 << 23) || (m >= 64 && few_tiles),
        _ => dtype == Dtype::Bf16 && m >= 128 && has_amx_bf16(),
    };
    (!panels).then_some(Method::Tiles)
}

/// # Safety
/// As [`crate::matmul4::matmul_4bit`].
pub(crate) unsafe fn matmul_4bit(weight: Weight, rows: Rows, threads: usize) -> Result<bool> {
    let path = Path::chosen();
    let forced = forced_name().and_then(|name| Method::ALL.into_iter().find(|method| method.name() == name));
    let whole_blocks = weight.k.is_multiple_of(weight.blocksize);
    let chosen = || method(path, rows.dtype, rows.m, weight.n, weight.k, whole_blocks);
    let Some(method) = forced.or_else(chosen).filter(|_| forced_name() != Some(PANELS)) else {
        return Ok(false);
    };
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
