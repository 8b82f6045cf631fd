//! Packed 4-bit codes to results through a sixteen-entry table.
//!
//! The compiler finds no vector code for a table look-up, so AVX2 has it written out. AVX-512 has whole blocks of its own in
//! [`super::avx512`] and comes here for what is left over.

#[cfg(target_arch = "x86_64")]
use super::avx512::Wide;
#[cfg(not(target_arch = "x86_64"))]
use super::element::Element as Wide;
use super::element::{Bf16, F16, F32};
#[cfg(target_arch = "x86_64")]
use super::path::Path;

/// An element with the vector look-up of its size.
pub trait Lookup: Wide {
    /// Expands `count` codes, a multiple of 32, where this processor has a vector kernel; `false` where it has none.
    ///
    /// # Safety
    /// `codes` holds `count / 2` bytes, `out` has room for `count` elements.
    unsafe fn expand_vector(codes: *const u8, table: &[Self; 16], out: *mut Self, count: usize) -> bool;
}

/// Expands `count` packed codes, high nibble first.
///
/// # Safety
/// `codes` holds `(count + 1) / 2` bytes, `out` has room for `count` elements.
#[inline(always)]
pub unsafe fn expand<T: Lookup>(codes: *const u8, table: &[T; 16], out: *mut T, count: usize) {
    let whole = count / 32 * 32;
    // SAFETY: the caller's promise.
    unsafe {
        let start = if T::expand_vector(codes, table, out, whole) { whole } else { 0 };
        for i in (start..count).step_by(2) {
            let byte = *codes.add(i / 2);
            out.add(i).write_unaligned(table[usize::from(byte >> 4)]);
            if i + 1 < count {
                out.add(i + 1).write_unaligned(table[usize::from(byte & 15)]);
            }
        }
    }
}

macro_rules! lookup {
    ($element:ty, $avx2:path) => {
        impl Lookup for $element {
            #[inline(always)]
            unsafe fn expand_vector(codes: *const u8, table: &[Self; 16], out: *mut Self, count: usize) -> bool {
                #[cfg(target_arch = "x86_64")]
                if Path::chosen() != Path::Portable {
                    // SAFETY: the other paths are chosen only where the processor has AVX2; the rest is the caller's promise.
                    unsafe { $avx2(codes, table.as_ptr().cast(), out.cast(), count) };
                    return true;
                }
                let _ = (codes, table, out, count);
                false
            }
        }
    };
}
lookup!(F32, x86::expand32);
lookup!(F16, x86::expand16);
lookup!(Bf16, x86::expand16);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Sixteen bytes as 32 indices in order.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn nibbles(bytes: __m128i) -> (__m128i, __m128i) {
        let mask = _mm_set1_epi8(15);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
        let low = _mm_and_si128(bytes, mask);
        (_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low))
    }

    /// 32 codes a step: the two bytes of a result are looked up apart, then interleaved.
    #[target_feature(enable = "avx2")]
    pub unsafe fn expand16(codes: *const u8, table: *const u8, out: *mut u8, count: usize) {
        // SAFETY: the caller holds 32 bytes of table, `count / 2` codes and room for `count` results.
        unsafe {
            let (a, b) = (_mm_loadu_si128(table.cast()), _mm_loadu_si128(table.add(16).cast()));
            let mask = _mm_set1_epi16(0xff);
            let low_bytes = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
            let high_bytes = _mm_packus_epi16(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b));
            for i in (0..count).step_by(32) {
                let (first, second) = nibbles(_mm_loadu_si128(codes.add(i / 2).cast()));
                for (half, indices) in [first, second].into_iter().enumerate() {
                    let low = _mm_shuffle_epi8(low_bytes, indices);
                    let high = _mm_shuffle_epi8(high_bytes, indices);
                    let results = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
                    _mm256_storeu_si256(out.add((i + half * 16) * 2).cast(), results);
                }
            }
        }
    }

    /// 32 codes a step: two eight-entry permutations, the index's bit 3 chooses.
    #[target_feature(enable = "avx2")]
    pub unsafe fn expand32(codes: *const u8, table: *const u8, out: *mut u8, count: usize) {
        // SAFETY: the caller holds 64 bytes of table, `count / 2` codes and room for `count` results.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(table.cast()), _mm256_loadu_ps(table.add(32).cast()));
            for i in (0..count).step_by(32) {
                let (first, second) = nibbles(_mm_loadu_si128(codes.add(i / 2).cast()));
                let quarters = [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)];
                for (quarter, indices) in quarters.into_iter().enumerate() {
                    let indices = _mm256_cvtepu8_epi32(indices);
                    let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
                    let (low, high) = (_mm256_permutevar8x32_ps(a, indices), _mm256_permutevar8x32_ps(b, indices));
                    _mm256_storeu_ps(out.add((i + quarter * 8) * 4).cast(), _mm256_blendv_ps(low, high, choice));
                }
            }
        }
    }
}
