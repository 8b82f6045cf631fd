//! Sixteen-entry tables: packed 4-bit codes to results, and results to memory.
//!
//! The compiler finds no vector code for a table look-up, so AVX-512 and AVX2 have it written out.

use super::element::{Bf16, Element, F16, F32};
#[cfg(target_arch = "x86_64")]
use super::path::Path;

/// An element with the vector look-up of its size.
pub trait Lookup: Element {
    /// Stores the first `count` of `results`, past the caches if `stream` and the address allows it.
    ///
    /// # Safety
    /// `out` has room for `count` elements, at most 32.
    #[inline(always)]
    unsafe fn store(results: &[Self; 32], out: *mut Self, count: usize, stream: bool) {
        // SAFETY: the caller's promise; `results` holds 32 elements.
        unsafe {
            if count == 32 && stream && out.addr().is_multiple_of(16) {
                stream_bytes(results.as_ptr().cast(), out.cast(), 32 * size_of::<Self>());
            } else {
                std::ptr::copy_nonoverlapping(
                    results.as_ptr().cast::<u8>(),
                    out.cast::<u8>(),
                    count * size_of::<Self>(),
                );
            }
        }
    }

    /// Expands `count` codes, a multiple of 32, where this processor has a vector kernel; `false` where it has none.
    ///
    /// # Safety
    /// `codes` holds `count / 2` bytes, `out` has room for `count` elements.
    unsafe fn expand_vector(codes: *const u8, table: &[Self; 16], out: *mut Self, count: usize, stream: bool) -> bool;
}

/// Copies a multiple of 16 bytes to a multiple of 16, past the caches.
#[inline(always)]
unsafe fn stream_bytes(from: *const u8, to: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        for i in (0..bytes).step_by(16) {
            // SAFETY: both ranges are the caller's; the target's alignment was checked.
            unsafe { _mm_stream_si128(to.add(i).cast::<__m128i>(), _mm_loadu_si128(from.add(i).cast::<__m128i>())) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // SAFETY: both ranges are the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    }
}

/// Expands `count` packed codes, high nibble first.
///
/// # Safety
/// `codes` holds `(count + 1) / 2` bytes, `out` has room for `count` elements.
#[inline(always)]
pub unsafe fn expand<T: Lookup>(codes: *const u8, table: &[T; 16], out: *mut T, count: usize, stream: bool) {
    let whole = count / 32 * 32;
    // SAFETY: the caller's promise.
    unsafe {
        let start = if T::expand_vector(codes, table, out, whole, stream) { whole } else { 0 };
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
    ($element:ty, $avx512:path, $avx2:path) => {
        impl Lookup for $element {
            #[inline(always)]
            unsafe fn expand_vector(
                codes: *const u8,
                table: &[Self; 16],
                out: *mut Self,
                count: usize,
                stream: bool,
            ) -> bool {
                #[cfg(target_arch = "x86_64")]
                {
                    match Path::chosen() {
                        // SAFETY: this path is chosen only where the processor has AVX-512; the rest is the caller's promise.
                        Path::Avx512 => unsafe { $avx512(codes, table.as_ptr().cast(), out.cast(), count, stream) },
                        // SAFETY: this path is chosen only where the processor has AVX2; the rest is the caller's promise.
                        Path::Avx2 => unsafe { $avx2(codes, table.as_ptr().cast(), out.cast(), count, stream) },
                        Path::Portable => return false,
                    }
                    true
                }
                #[cfg(not(target_arch = "x86_64"))]
                {
                    let _ = (codes, table, out, count, stream);
                    false
                }
            }
        }
    };
}
lookup!(F32, x86::expand32_avx512, x86::expand32_avx2);
lookup!(F16, x86::expand16_avx512, x86::expand16_avx2);
lookup!(Bf16, x86::expand16_avx512, x86::expand16_avx2);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    #[inline(always)]
    unsafe fn put512(to: *mut u8, value: __m512i, stream: bool) {
        // SAFETY: 64 bytes of the caller's; streamed only to a whole address.
        unsafe { if stream { _mm512_stream_si512(to.cast(), value) } else { _mm512_storeu_si512(to.cast(), value) } }
    }

    #[inline(always)]
    unsafe fn put256(to: *mut u8, value: __m256i, stream: bool) {
        // SAFETY: 32 bytes of the caller's; streamed only to a whole address.
        unsafe { if stream { _mm256_stream_si256(to.cast(), value) } else { _mm256_storeu_si256(to.cast(), value) } }
    }

    /// 32 codes a step: each byte becomes two 16-bit indices, one permutation looks both up.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn expand16_avx512(codes: *const u8, table: *const u8, out: *mut u8, count: usize, stream: bool) {
        let stream = stream && out.addr().is_multiple_of(64);
        // SAFETY: the caller holds 32 bytes of table, `count / 2` codes and room for `count` results.
        unsafe {
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.cast()));
            for i in (0..count).step_by(32) {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i / 2).cast()));
                // The permutation reads five bits of an index; the table stands there twice, so bit 4 does not matter.
                let indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
                put512(out.add(i * 2), _mm512_permutexvar_epi16(indices, table), stream);
            }
        }
    }

    /// 32 codes a step: high and low nibbles looked up apart, then interleaved.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn expand32_avx512(codes: *const u8, table: *const u8, out: *mut u8, count: usize, stream: bool) {
        let stream = stream && out.addr().is_multiple_of(64);
        // SAFETY: the caller holds 64 bytes of table, `count / 2` codes and room for `count` results.
        unsafe {
            let table = _mm512_loadu_si512(table.cast());
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            for i in (0..count).step_by(32) {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(i / 2).cast()));
                // The permutation reads four bits of an index.
                let high = _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(bytes), table);
                let low = _mm512_permutexvar_epi32(bytes, table);
                put512(out.add(i * 4), _mm512_permutex2var_epi32(high, first, low), stream);
                put512(out.add(i * 4 + 64), _mm512_permutex2var_epi32(high, second, low), stream);
            }
        }
    }

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
    pub unsafe fn expand16_avx2(codes: *const u8, table: *const u8, out: *mut u8, count: usize, stream: bool) {
        let stream = stream && out.addr().is_multiple_of(32);
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
                    put256(out.add((i + half * 16) * 2), results, stream);
                }
            }
        }
    }

    /// 32 codes a step: two eight-entry permutations, the index's bit 3 chooses.
    #[target_feature(enable = "avx2")]
    pub unsafe fn expand32_avx2(codes: *const u8, table: *const u8, out: *mut u8, count: usize, stream: bool) {
        let stream = stream && out.addr().is_multiple_of(32);
        // SAFETY: the caller holds 64 bytes of table, `count / 2` codes and room for `count` results.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(table.cast()), _mm256_loadu_ps(table.add(32).cast()));
            for i in (0..count).step_by(32) {
                let (first, second) = nibbles(_mm_loadu_si128(codes.add(i / 2).cast()));
                let quarters = [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)];
                for (quarter, indices) in quarters.into_iter().enumerate() {
                    let indices = _mm256_cvtepu8_epi32(indices);
                    let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
                    let results = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(a, indices),
                        _mm256_permutevar8x32_ps(b, indices),
                        choice,
                    );
                    put256(out.add((i + quarter * 8) * 4), _mm256_castps_si256(results), stream);
                }
            }
        }
    }
}
