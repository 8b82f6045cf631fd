//! 256-entry codes with AVX-512: tables in registers, sixteen elements at a time.
//!
//! These do whole blocks of ordinary numbers; callers fall back to the plain loops for the others. Same results, to the bit.

use std::arch::x86_64::*;

use super::avx512::{Wide, block_maximum};
use super::decades::{Decades, NEGATIVE, SMALLEST};

/// A table of sixteen entries a register.
pub struct Table<const REGISTERS: usize>([__m512; REGISTERS]);

/// A 256-entry table.
pub type Table256 = Table<16>;

impl<const REGISTERS: usize> Table<REGISTERS> {
    /// Loads as many of the values as there is room for.
    ///
    /// # Safety
    /// AVX-512 is there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub unsafe fn new(values: &[f32; 256]) -> Self {
        const { assert!(REGISTERS == 8 || REGISTERS == 16) };
        // SAFETY: sixteen values from each multiple of sixteen.
        Self(std::array::from_fn(|i| unsafe { _mm512_loadu_ps(values.as_ptr().add(16 * i)) }))
    }

    /// Sixteen values: look-ups by an index's low five bits, of which the higher ones choose one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub fn look_up(&self, indices: __m512i) -> __m512 {
        let found = |k: usize| _mm512_permutex2var_ps(self.0[2 * k], indices, self.0[2 * k + 1]);
        let bit = |b: i32| _mm512_test_epi32_mask(indices, _mm512_set1_epi32(b));
        let (b32, b64) = (bit(32), bit(64));
        let pair = |k: usize| _mm512_mask_blend_ps(b32, found(k), found(k + 1));
        let four = |k: usize| _mm512_mask_blend_ps(b64, pair(k), pair(k + 2));
        if REGISTERS == 16 { _mm512_mask_blend_ps(bit(128), four(0), four(4)) } else { four(0) }
    }
}

/// Dequantizes `count` 8-bit codes of one block, a multiple of 16. `false`, with nothing written, if the scale is not finite.
///
/// # Safety
/// AVX-512 is there; `codes` holds `count` bytes, `out` has room for `count` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub unsafe fn dequantize_8bit<T: Wide>(
    codes: *const u8,
    table: &Table256,
    scale: f32,
    out: *mut T,
    count: usize,
) -> bool {
    if !scale.is_finite() {
        return false;
    }
    let scale = _mm512_set1_ps(scale);
    for i in (0..count).step_by(16) {
        // SAFETY: the caller's promise.
        unsafe {
            let indices = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i).cast()));
            T::store16(_mm512_mul_ps(table.look_up(indices), scale), out.add(i));
        }
    }
    true
}

/// Quantizes a block of `count` elements, a multiple of 16. `None`, with nothing written, unless its maximum is finite and normal,
/// or zero.
///
/// # Safety
/// AVX-512 is there; `x` holds `count` elements, `codes` has room for `count` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
pub unsafe fn quantize_8bit<T: Wide>(x: *const T, count: usize, code: &Decades, codes: *mut u8) -> Option<f32> {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = block_maximum(x, count)?;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        if code.mirrored {
            encode::<T, true, 8>(x, count, inverse, code, codes);
        } else {
            encode::<T, false, 16>(x, count, inverse, code, codes);
        }
        Some(scale)
    }
}

/// # Safety
/// AVX-512 is there; `x` holds `count` elements, none of them NaN, `codes` has room for `count` bytes; a mirrored code has at most
/// 128 thresholds of magnitudes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
unsafe fn encode<T: Wide, const MIRRORED: bool, const REGISTERS: usize>(
    x: *const T,
    count: usize,
    inverse: f32,
    code: &Decades,
    codes: *mut u8,
) {
    // SAFETY: the tables have 32, 16 and 256 entries, the caller holds `count` elements and room for `count` bytes.
    unsafe {
        let edges = code.edges.as_ptr().cast::<i32>();
        let (low_edges, high_edges) = (_mm512_loadu_epi32(edges), _mm512_loadu_epi32(edges.add(16)));
        let (slopes, offsets) = (_mm512_loadu_ps(code.slopes.as_ptr()), _mm512_loadu_ps(code.offsets.as_ptr()));
        let thresholds = Table::<REGISTERS>::new(&code.thresholds);
        let (inverse, one) = (_mm512_set1_ps(inverse), _mm512_set1_epi32(1));
        for i in (0..count).step_by(16) {
            let t = _mm512_mul_ps(T::widen16(x.add(i)), inverse);
            let magnitude = if MIRRORED { _mm512_abs_ps(t) } else { t };
            let magnitude = _mm512_max_ps(magnitude, _mm512_set1_ps(SMALLEST));
            let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(magnitude));
            let edge = _mm512_permutex2var_epi32(low_edges, exponent, high_edges);
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, _mm512_castsi512_ps(edge));
            // The permutations read four bits of it.
            let decade = _mm512_mask_add_epi32(edge, above, edge, one);
            let slope = _mm512_permutexvar_ps(decade, slopes);
            let offset = _mm512_permutexvar_ps(decade, offsets);
            let place = _mm512_cvttps_epi32(_mm512_fmadd_ps(magnitude, slope, offset));
            let threshold = thresholds.look_up(place);
            let rank = if MIRRORED {
                let bits = _mm512_castps_si512(t);
                let sign_bit = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MIN));
                let threshold = _mm512_or_si512(_mm512_castps_si512(threshold), sign_bit);
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(t, _mm512_castsi512_ps(threshold));
                // Below 0 places are counted downwards.
                let from_zero = _mm512_xor_si512(place, _mm512_srai_epi32::<31>(bits));
                let rank = _mm512_add_epi32(from_zero, _mm512_set1_epi32(NEGATIVE as i32));
                // A mirrored code ends before -1.
                _mm512_max_epi32(_mm512_mask_add_epi32(rank, above, rank, one), _mm512_setzero_si512())
            } else {
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, threshold);
                _mm512_mask_add_epi32(place, above, place, one)
            };
            _mm_storeu_si128(codes.add(i).cast(), _mm512_cvtepi32_epi8(rank));
        }
    }
}
