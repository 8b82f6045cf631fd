//! With AVX-512 VNNI: four products of a byte without sign and one with are added to each lane by one instruction.
//!
//! The weight's elements become bytes without sign by adding 128, which is flipping a bit; the sums then hold 128 times the sum of
//! the token's elements too much, and are begun with so much less ([`OFFSET`]). Nothing saturates: sums are right modulo 2^32.

use std::arch::x86_64::*;

use super::kernels::GROUP;
use super::tiles::ROWS;

/// What is added to the weight's elements.
pub const OFFSET: i32 = 128;

/// Elements of a vector.
const LANES: usize = 64;

/// Up to so many tokens the weight comes from memory as fast as it is used: rows are asked for ahead.
const PREFETCHING: usize = 4;

/// # Safety
/// As [`super::kernels::Kernel`]; the processor has AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
pub unsafe fn kernel<const M: usize>(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32) {
    let flip = _mm512_set1_epi8(i8::MIN);
    let mut totals = [[_mm512_setzero_si512(); GROUP]; M];
    let whole = depth / LANES * LANES;
    for column in (0..whole).step_by(LANES) {
        // SAFETY: the rows hold these elements; a prefetch reads nothing that could fault.
        unsafe {
            let weights = b.map(|b| {
                if M <= PREFETCHING {
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(GROUP * stride + column));
                }
                _mm512_xor_si512(_mm512_loadu_si512(b.add(column).cast()), flip)
            });
            for (token, totals) in totals.iter_mut().enumerate() {
                let x = _mm512_loadu_si512(a.add(token * stride + column).cast());
                for row in 0..GROUP {
                    totals[row] = _mm512_dpbusd_epi32(totals[row], weights[row], x);
                }
            }
        }
    }
    if whole < depth {
        let present = (1u64 << (depth - whole)) - 1;
        // SAFETY: only elements that are present are read; the others of the tokens are 0.
        unsafe {
            let weights = b.map(|b| _mm512_xor_si512(_mm512_maskz_loadu_epi8(present, b.add(whole)), flip));
            for (token, totals) in totals.iter_mut().enumerate() {
                let x = _mm512_maskz_loadu_epi8(present, a.add(token * stride + whole));
                for row in 0..GROUP {
                    totals[row] = _mm512_dpbusd_epi32(totals[row], weights[row], x);
                }
            }
        }
    }
    for (token, totals) in totals.into_iter().enumerate() {
        // SAFETY: the caller's sums have a group of rows for each token.
        unsafe {
            let to = sums.add(token * ROWS).cast::<__m128i>();
            _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), across(totals)));
        }
    }
}

/// The sums of the lanes of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
fn across([a, b, c, d]: [__m512i; GROUP]) -> __m128i {
    let pairs = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (ab, cd) = (pairs(a, b), pairs(c, d));
    let all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64::<1>(all));
    _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half))
}
