//! Activations to int8, row by row.

use std::sync::{Mutex, PoisonError};

use crate::Result;
use crate::cpu::element::{Element, F32, for_dtype, for_runs};
use crate::cpu::path::multiversion;
use crate::cpu::pool;
use crate::int8::{Codes, Rows};

/// Elements handled at a time, and bits of a word of the mask.
const LANES: usize = 32;

/// Bits of the largest magnitude that is no NaN.
const INFINITY: u32 = 0x7f80_0000;

fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Which magnitudes are outliers: the bits of positive numbers are in the order of the numbers.
#[derive(Clone, Copy)]
struct Outliers(u32);

impl Outliers {
    fn from(threshold: f32) -> Self {
        Self(if threshold > 0.0 { threshold.to_bits() } else { u32::MAX })
    }
    fn holds(self, magnitude: u32) -> bool {
        (magnitude >= self.0) & (magnitude <= INFINITY)
    }
}

/// A code from a scaled value; NaN gives 0, which is not a number of any element's own row.
fn code(scaled: f32) -> i8 {
    let bounded = scaled.clamp(-127.0, 127.0);
    // 1.5 * 2^23: the sum's last bits are the integer, rounded to nearest, ties to even.
    let bits = (bounded + 12_582_912.0).to_bits();
    if scaled.is_nan() { 0 } else { bits as i8 }
}

/// The largest magnitude of the elements that are no outliers, as bits, where any NaN is above all numbers.
#[inline(always)]
fn largest_of<const N: usize>(x: [f32; N], outliers: Outliers, most: &mut [u32; N], found: &mut u32) {
    let mut any = 0;
    for i in 0..N {
        let magnitude = magnitude(x[i]);
        let outlier = outliers.holds(magnitude);
        most[i] = most[i].max(if outlier { 0 } else { magnitude });
        any |= u32::from(outlier);
    }
    *found |= any;
}

/// Quantizes a row and returns its scale; sets bits of `mask`, where there is one.
#[inline(always)]
unsafe fn row_body<T: Element>(
    x: *const T,
    k: usize,
    outliers: Outliers,
    codes: *mut i8,
    mask: &mut [u32],
    scale: &mut f32,
) {
    let (mut most, mut found) = ([0u32; LANES], 0u32);
    let mut of_rest = [0u32; LANES];
    let mut found_in_rest = 0;
    // SAFETY: the caller's row holds `k` elements.
    unsafe {
        for_runs::<T, LANES>(
            x,
            k,
            |_, x| largest_of(x, outliers, &mut most, &mut found),
            |_, x, _| largest_of(x, outliers, &mut of_rest, &mut found_in_rest),
        );
    }
    let largest = most.into_iter().chain(of_rest).max().unwrap_or(0);
    *scale = f32::from_bits(largest);
    if found | found_in_rest != 0 && !mask.is_empty() {
        // SAFETY: the caller's row holds `k` elements.
        unsafe { mark::<T>(x, k, outliers, mask) };
    }
    // SAFETY: the caller's rows hold `k` elements.
    unsafe {
        if largest == 0 || largest > INFINITY {
            codes.write_bytes(0, k);
        } else if largest == INFINITY {
            for i in 0..k {
                let x = x.add(i).read_unaligned().widen();
                codes.add(i).write(if x.is_infinite() { code(x) } else { 0 });
            }
        } else {
            let factor = 127.0 / *scale;
            let quantize = |x: f32| if outliers.holds(magnitude(x)) { 0 } else { code(x * factor) };
            for_runs::<T, LANES>(
                x,
                k,
                |i, x| codes.add(i).cast::<[i8; LANES]>().write_unaligned(x.map(quantize)),
                |i, x, count| codes.add(i).copy_from_nonoverlapping(x.map(quantize).as_ptr(), count),
            );
        }
    }
}

/// Sets the bits of the columns where a row has outliers.
///
/// # Safety
/// `x` holds `k` elements.
unsafe fn mark<T: Element>(x: *const T, k: usize, outliers: Outliers, mask: &mut [u32]) {
    for (word, start) in mask.iter_mut().zip((0..k).step_by(LANES)) {
        for i in start..k.min(start + LANES) {
            // SAFETY: the caller's row holds `k` elements.
            let x = unsafe { x.add(i).read_unaligned() }.widen();
            *word |= u32::from(outliers.holds(magnitude(x))) << (i - start);
        }
    }
}

multiversion! {
    unsafe fn quantize_row[T: Element][T](
        x: *const T, k: usize, outliers: Outliers, codes: *mut i8, mask: &mut [u32], scale: &mut f32,
    ) => row_body
}

/// # Safety
/// As [`crate::int8::quantize_rows`].
pub unsafe fn quantize(rows: Rows, k: usize, threshold: f32, to: Codes, threads: usize) -> Result<()> {
    let words = if to.mask == 0 { 0 } else { k.div_ceil(LANES) };
    let all = Mutex::new(vec![0u32; words]);
    for_dtype!(rows.dtype, T => pool::run(rows.m, k * (1 + size_of::<T>()), threads, |first, last| {
        let mut mask = vec![0u32; words];
        for row in first..last {
            let mut scale = 0.0;
            // SAFETY: the row exists; parts are different rows; the caller promised the memory.
            unsafe {
                let (x, codes) = ((rows.x as *const T).add(row * k), (to.codes as *mut i8).add(row * k));
                quantize_row::<T>(x, k, Outliers::from(threshold), codes, &mut mask, &mut scale);
                (to.scales as *mut F32).add(row).write_unaligned(F32::narrow(scale));
            }
        }
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter_mut().zip(mask).for_each(|(all, word)| *all |= word);
    }))?;
    for (i, word) in all.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().enumerate() {
        let to = (to.mask as *mut u32).wrapping_add(i);
        // SAFETY: the caller's mask has the words.
        unsafe { to.write_unaligned(to.read_unaligned() | word) };
    }
    Ok(())
}
