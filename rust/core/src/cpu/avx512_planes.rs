//! 256-entry codes with AVX-512 VBMI: sixty-four look-ups at a time, in tables cut into planes of bytes.
//!
//! These do whole blocks of ordinary numbers, as [`super::avx512_code256`] does. Same results, to the bit.

use std::arch::x86_64::*;

use super::avx512::{Wide, block_maximum};
use super::avx512_code256::Search;
use super::decades::Decades;
use super::path::Path;

/// 256 floats: their lowest bytes, then the next ones.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Planes([[u8; 256]; 4]);

impl Planes {
    /// The planes of `values`, where this processor looks bytes up and the path in use is the widest.
    pub fn new(values: &[f32; 256]) -> Option<Box<Self>> {
        let wanted = Path::chosen() == Path::Avx512Bf16 && is_x86_feature_detected!("avx512vbmi");
        wanted.then(|| Box::new(Self(std::array::from_fn(|plane| values.map(|value| value.to_le_bytes()[plane])))))
    }

    /// The values of sixty-four indices, below 128 unless `WHOLE`: register `k` has those of bytes 4 k to 4 k + 3 of each 128 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
    fn look_up<const WHOLE: bool>(&self, indices: __m512i) -> [__m512; 4] {
        let upper = _mm512_movepi8_mask(indices);
        let plane = |plane: usize| {
            // SAFETY: sixty-four bytes from each multiple of sixty-four.
            let part = |i: usize| unsafe { _mm512_loadu_epi8(self.0[plane].as_ptr().add(64 * i).cast()) };
            let half = |i: usize| _mm512_permutex2var_epi8(part(i), indices, part(i + 1));
            if WHOLE { _mm512_mask_blend_epi8(upper, half(0), half(2)) } else { half(0) }
        };
        let (a, b, c, d) = (plane(0), plane(1), plane(2), plane(3));
        let (low, low_upper) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let (high, high_upper) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        [
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, low_upper)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, low_upper)),
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, high_upper)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, high_upper)),
        ]
    }
}

/// Exchanges the two halves of the number of four bytes: bytes in order become those of [`Planes::look_up`], and back.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
fn transpose(bytes: __m512i) -> __m512i {
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(order, bytes)
}

/// The low bytes of sixty-four numbers, negative ones as 0, in the order of [`Planes::look_up`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
fn pack([a, b, c, d]: [__m512i; 4]) -> __m512i {
    _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d))
}

/// Dequantizes `count` 8-bit codes of one block, a multiple of 64. `false`, with nothing written, if the scale is not finite.
///
/// # Safety
/// AVX-512 VBMI is there; the values are finite; `codes` holds `count` bytes, `out` has room for `count` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
pub unsafe fn dequantize_8bit<T: Wide>(
    codes: *const u8,
    values: &Planes,
    scale: f32,
    out: *mut T,
    count: usize,
) -> bool {
    if !scale.is_finite() {
        return false;
    }
    let scale = _mm512_set1_ps(scale);
    for i in (0..count).step_by(64) {
        // SAFETY: the caller's promise.
        unsafe {
            let found = values.look_up::<true>(transpose(_mm512_loadu_si512(codes.add(i).cast())));
            for (k, found) in found.into_iter().enumerate() {
                T::store16(_mm512_mul_ps(found, scale), out.add(i + 16 * k));
            }
        }
    }
    true
}

/// Quantizes a block of `count` elements, a multiple of 64. `None`, with nothing written, unless its maximum is finite and normal,
/// or zero.
///
/// # Safety
/// AVX-512 VBMI is there; `x` holds `count` elements, `codes` has room for `count` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
pub unsafe fn quantize_8bit<T: Wide>(
    x: *const T,
    count: usize,
    code: &Decades,
    thresholds: &Planes,
    codes: *mut u8,
) -> Option<f32> {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = block_maximum(x, count)?;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        if code.mirrored {
            encode::<T, true, false>(x, count, inverse, code, thresholds, codes);
        } else {
            encode::<T, false, true>(x, count, inverse, code, thresholds, codes);
        }
        Some(scale)
    }
}

/// # Safety
/// AVX-512 VBMI is there; `x` holds `count` elements, none of them NaN, `codes` has room for `count` bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2")]
unsafe fn encode<T: Wide, const MIRRORED: bool, const WHOLE: bool>(
    x: *const T,
    count: usize,
    inverse: f32,
    code: &Decades,
    thresholds: &Planes,
    codes: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let search = Search::<MIRRORED>::new(code);
        let inverse = _mm512_set1_ps(inverse);
        for i in (0..count).step_by(64) {
            let t: [__m512; 4] = std::array::from_fn(|k| _mm512_mul_ps(T::widen16(x.add(i + 16 * k)), inverse));
            let places = t.map(|t| search.place(t));
            let found = thresholds.look_up::<WHOLE>(pack(places));
            let ranks = std::array::from_fn(|k| search.rank(t[k], places[k], found[k]));
            _mm512_storeu_si512(codes.add(i).cast(), transpose(pack(ranks)));
        }
    }
}
