//! With AVX2: elements widened to 16 bits, whose products are added in pairs, exactly. (The instruction that multiplies bytes saturates.)

use std::arch::x86_64::*;

use super::kernels::GROUP;
use super::tiles::ROWS;

/// Elements of a vector.
const LANES: usize = 16;

/// # Safety
/// As [`super::kernels::Kernel`]; the processor has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn kernel<const M: usize>(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32) {
    // As many sums as the registers hold: two tokens at a time.
    for token in (0..M / 2 * 2).step_by(2) {
        // SAFETY: the caller's promise, handed on.
        unsafe { few::<2>(a.add(token * stride), stride, b, depth, sums.add(token * ROWS)) };
    }
    if M % 2 == 1 {
        // SAFETY: the caller's promise, handed on.
        unsafe { few::<1>(a.add((M - 1) * stride), stride, b, depth, sums.add((M - 1) * ROWS)) };
    }
}

#[inline]
#[target_feature(enable = "avx2")]
unsafe fn few<const M: usize>(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32) {
    let mut totals = [[_mm256_setzero_si256(); GROUP]; M];
    let whole = depth / LANES * LANES;
    for column in (0..whole).step_by(LANES) {
        // SAFETY: the rows hold these elements.
        unsafe {
            let weights = b.map(|b| _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(column).cast())));
            for (token, totals) in totals.iter_mut().enumerate() {
                let x = _mm256_cvtepi8_epi16(_mm_loadu_si128(a.add(token * stride + column).cast()));
                for row in 0..GROUP {
                    let products = _mm256_madd_epi16(weights[row], x);
                    totals[row] = _mm256_add_epi32(totals[row], products);
                }
            }
        }
    }
    for (token, totals) in totals.into_iter().enumerate() {
        for (row, total) in totals.into_iter().enumerate() {
            // SAFETY: the rows hold these elements, the caller's sums a group of rows for each token.
            unsafe {
                let mut sum = across(total);
                for column in whole..depth {
                    let (x, weight) = (a.add(token * stride + column).read(), b[row].add(column).read());
                    sum = sum.wrapping_add(i32::from(x) * i32::from(weight));
                }
                let to = sums.add(token * ROWS + row);
                *to = (*to).wrapping_add(sum);
            }
        }
    }
}

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn across(total: __m256i) -> i32 {
    let half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256::<1>(total));
    let pair = _mm_add_epi32(half, _mm_shuffle_epi32::<0b_01_00_11_10>(half));
    _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32::<0b_10_11_00_01>(pair)))
}
