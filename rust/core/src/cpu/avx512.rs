//! Blocks with AVX-512, where the compiler finds no vector code: tables in registers.
//!
//! These do whole blocks of ordinary numbers; callers fall back to the plain loops for the others. Same results, to the bit.

use std::arch::x86_64::*;

use super::element::{Bf16, Element, F16, F32};
use crate::codebook::LinearBuckets;

/// An element that sixteen lanes load and look up at a time.
pub trait Wide: Element {
    /// Sixteen elements as float32.
    ///
    /// # Safety
    /// AVX-512 is there; `x` holds sixteen elements.
    unsafe fn widen16(x: *const Self) -> __m512;

    /// Expands `count` codes, a multiple of 32, by the sixteen finite `results` of their block.
    ///
    /// # Safety
    /// AVX-512 is there; `codes` holds `count / 2` bytes, `out` has room for `count` elements.
    unsafe fn expand(codes: *const u8, results: __m512, out: *mut Self, count: usize);

    /// Rounds and stores sixteen finite values.
    ///
    /// # Safety
    /// AVX-512 is there; `out` has room for sixteen elements.
    unsafe fn store16(values: __m512, out: *mut Self);
}

impl Wide for F32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn widen16(x: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(x.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn store16(values: __m512, out: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(out.cast(), values) };
    }

    /// High and low nibbles looked up apart, then interleaved.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn expand(codes: *const u8, results: __m512, out: *mut Self, count: usize) {
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for i in (0..count).step_by(32) {
            // SAFETY: the caller's promise; the permutation reads four bits of an index.
            unsafe {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i / 2).cast()));
                let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), results);
                let low = _mm512_permutexvar_ps(bytes, results);
                let out = out.add(i).cast::<f32>();
                _mm512_storeu_ps(out, _mm512_permutex2var_ps(high, first, low));
                _mm512_storeu_ps(out.add(16), _mm512_permutex2var_ps(high, second, low));
            }
        }
    }
}

impl Wide for Bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn widen16(x: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(x.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn expand(codes: *const u8, results: __m512, out: *mut Self, count: usize) {
        // SAFETY: the caller's promise.
        unsafe { expand16(codes, round_bf16(results), out.cast(), count) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn store16(values: __m512, out: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(out.cast(), round_bf16(values)) };
    }
}

/// Sixteen finite values as bfloat16, ties to even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn round_bf16(values: __m512) -> __m256i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
}

impl Wide for F16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn widen16(x: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn expand(codes: *const u8, results: __m512, out: *mut Self, count: usize) {
        // SAFETY: the caller's promise.
        unsafe { expand16(codes, round_f16(results), out.cast(), count) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    unsafe fn store16(values: __m512, out: *mut Self) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(out.cast(), round_f16(values)) };
    }
}

/// Sixteen finite values as float16, ties to even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn round_f16(values: __m512) -> __m256i {
    _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values)
}

/// Each byte becomes two 16-bit indices, one permutation looks both up.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
unsafe fn expand16(codes: *const u8, table: __m256i, out: *mut u16, count: usize) {
    // The permutation reads five bits of an index; the table stands there twice, so bit 4 does not matter.
    let table = _mm512_broadcast_i64x4(table);
    for i in (0..count).step_by(32) {
        // SAFETY: the caller holds `count / 2` codes and room for `count` results.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i / 2).cast()));
            let indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
            _mm512_storeu_si512(out.add(i).cast(), _mm512_permutexvar_epi16(indices, table));
        }
    }
}

/// Dequantizes a block of `count` codes, a multiple of 32. `false`, with nothing written, if its scale is not finite.
///
/// # Safety
/// AVX-512 is there; `codes` holds `count / 2` bytes, `out` has room for `count` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub unsafe fn dequantize_block<T: Wide>(
    codes: *const u8,
    values: &[f32; 16],
    scale: f32,
    out: *mut T,
    count: usize,
) -> bool {
    if !scale.is_finite() {
        return false; // a NaN among the results has its own bits
    }
    // SAFETY: the caller's promise.
    unsafe {
        let results = _mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), _mm512_set1_ps(scale));
        T::expand(codes, results, out, count);
    }
    true
}

/// The largest magnitude of `count` elements, a multiple of 16, if it is finite and normal, or zero.
///
/// # Safety
/// AVX-512 is there; `x` holds `count` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub unsafe fn block_maximum<T: Wide>(x: *const T, count: usize) -> Option<f32> {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut largest = _mm512_setzero_si512();
    for i in (0..count).step_by(16) {
        // SAFETY: the caller holds `count` elements.
        let bits = _mm512_castps_si512(unsafe { T::widen16(x.add(i)) });
        // Magnitudes are ordered as their bits are; those of a NaN come last.
        largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
    }
    let scale = f32::from_bits(_mm512_reduce_max_epu32(largest));
    (scale == 0.0 || scale.is_normal()).then_some(scale)
}

/// Quantizes a block of `count` elements, a multiple of 32. `None`, with nothing written, unless its maximum is finite and normal,
/// or zero.
///
/// # Safety
/// AVX-512 is there; `x` holds `count` elements, `codes` has room for `count / 2` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub unsafe fn quantize_block<T: Wide>(x: *const T, count: usize, table: &LinearBuckets, codes: *mut u8) -> Option<f32> {
    // SAFETY: the caller's promise.
    let scale = unsafe { block_maximum(x, count)? };
    let inverse = _mm512_set1_ps(if scale == 0.0 { 0.0 } else { 1.0 / scale });
    // SAFETY: the tables have 32 entries, the caller holds `count` elements and room for `count / 2` bytes.
    unsafe {
        let at = |table: *const u32, i: usize| _mm512_loadu_si512(table.add(i).cast());
        let thresholds = table.thresholds.as_ptr();
        let (low, high) = (_mm512_loadu_ps(thresholds), _mm512_loadu_ps(thresholds.add(16)));
        let (low_codes, high_codes) = (at(table.codes.as_ptr(), 0), at(table.codes.as_ptr(), 16));
        for i in (0..count).step_by(16) {
            let t = _mm512_mul_ps(T::widen16(x.add(i)), inverse);
            // The product by 16 is exact, and so is its floor.
            let floor = _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
                t,
                _mm512_set1_ps(16.0),
            ));
            // A maximum past 2^126 has a subnormal reciprocal, which may take t a little past 1.
            let bucket = _mm512_add_epi32(floor, _mm512_set1_epi32(16));
            let bucket = _mm512_max_epi32(_mm512_min_epi32(bucket, _mm512_set1_epi32(31)), _mm512_setzero_si512());
            let threshold = _mm512_permutex2var_ps(low, bucket, high);
            let pair = _mm512_permutex2var_epi32(low_codes, bucket, high_codes);
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(t, threshold);
            let code = _mm512_mask_srli_epi32::<8>(pair, above, pair);
            // Two codes in 64 bits: their low bytes become one.
            let packed = _mm512_or_si512(_mm512_slli_epi64::<4>(code), _mm512_srli_epi64::<32>(code));
            _mm_storel_epi64(codes.add(i / 2).cast(), _mm512_cvtepi64_epi8(packed));
        }
    }
    Some(scale)
}
