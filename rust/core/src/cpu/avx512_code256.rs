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
    // SAFETY: the caller's promise.
    unsafe {
        let search = Search::<MIRRORED>::new(code);
        let thresholds = Table::<REGISTERS>::new(&code.thresholds);
        let inverse = _mm512_set1_ps(inverse);
        for i in (0..count).step_by(16) {
            let t = _mm512_mul_ps(T::widen16(x.add(i)), inverse);
            let place = search.place(t);
            let rank = search.rank(t, place, thresholds.look_up(place));
            let rank = _mm512_max_epi32(rank, _mm512_setzero_si512());
            _mm_storeu_si128(codes.add(i).cast(), _mm512_cvtepi32_epi8(rank));
        }
    }
}

/// The arithmetic of [`Decades`], apart from the look-up of thresholds.
pub struct Search<const MIRRORED: bool> {
    edges: [__m512i; 2],
    slopes: __m512,
    offsets: __m512,
}

impl<const MIRRORED: bool> Search<MIRRORED> {
    /// # Safety
    /// AVX-512 is there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub unsafe fn new(code: &Decades) -> Self {
        let edges = code.edges.as_ptr().cast::<i32>();
        // SAFETY: there are 32 edges, 16 slopes and 16 offsets.
        unsafe {
            Self {
                edges: [_mm512_loadu_epi32(edges), _mm512_loadu_epi32(edges.add(16))],
                slopes: _mm512_loadu_ps(code.slopes.as_ptr()),
                offsets: _mm512_loadu_ps(code.offsets.as_ptr()),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    fn magnitude(t: __m512) -> __m512 {
        _mm512_max_ps(if MIRRORED { _mm512_abs_ps(t) } else { t }, _mm512_set1_ps(SMALLEST))
    }

    /// The places of sixteen quotients.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub fn place(&self, t: __m512) -> __m512i {
        let magnitude = Self::magnitude(t);
        let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(magnitude));
        let edge = _mm512_permutex2var_epi32(self.edges[0], exponent, self.edges[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, _mm512_castsi512_ps(edge));
        // The permutations read four bits of it.
        let decade = _mm512_mask_add_epi32(edge, above, edge, _mm512_set1_epi32(1));
        let slope = _mm512_permutexvar_ps(decade, self.slopes);
        let offset = _mm512_permutexvar_ps(decade, self.offsets);
        _mm512_cvttps_epi32(_mm512_fmadd_ps(magnitude, slope, offset))
    }

    /// Their ranks, with the thresholds of their places; what lies below a mirrored code's first value may get -1.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
    pub fn rank(&self, t: __m512, place: __m512i, threshold: __m512) -> __m512i {
        let one = _mm512_set1_epi32(1);
        if !MIRRORED {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(Self::magnitude(t), threshold);
            return _mm512_mask_add_epi32(place, above, place, one);
        }
        let bits = _mm512_castps_si512(t);
        let sign_bit = _mm512_and_si512(bits, _mm512_set1_epi32(i32::MIN));
        let threshold = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(threshold), sign_bit));
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(t, threshold);
        // Below 0 places are counted downwards.
        let from_zero = _mm512_xor_si512(place, _mm512_srai_epi32::<31>(bits));
        let rank = _mm512_add_epi32(from_zero, _mm512_set1_epi32(NEGATIVE as i32));
        _mm512_mask_add_epi32(rank, above, rank, one)
    }
}
