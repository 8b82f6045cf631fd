//! The sum of magnitudes without rounding, hence the same in every order and on every device; `exact_sum.cuh` is the GPU's.

/// Words of 32 bits in units of 2^-149: 2^30 values below 2^128 take 307 bits.
const LIMBS: usize = 10;

/// The exact sum of finite, non-negative `values`, at most 2^30, rounded once to float64, ties to even.
pub(crate) fn exact_sum(values: &[f32]) -> f64 {
    let (sum, grain) = plain_sum(values);
    // Below 2^53 grains no addition has rounded.
    if sum < grain * 2f64.powi(53) { sum } else { limb_sum(values) }
}

/// The float64 sum, and a power of two of which every value is a multiple.
fn plain_sum(values: &[f32]) -> (f64, f64) {
    // Side by side: none waits for its own last sum.
    let mut sums = [0.0f64; 16];
    let mut smallest = [u32::MAX; 16];
    for run in values.chunks(16) {
        for ((sum, smallest), value) in sums.iter_mut().zip(&mut smallest).zip(run) {
            *sum += f64::from(*value);
            *smallest = (*smallest).min(value.to_bits().wrapping_sub(1)); // zeros become the largest
        }
    }
    let smallest = smallest.into_iter().min().unwrap_or(u32::MAX).wrapping_add(1);
    (sums.iter().sum(), 2f64.powi((smallest >> 23).max(1) as i32 - 150))
}

fn limb_sum(values: &[f32]) -> f64 {
    let mut limbs = [0u64; LIMBS];
    for value in values {
        let (exponent, fraction) = (value.to_bits() >> 23, value.to_bits() & 0x7f_ffff);
        let position = exponent.max(1) as usize - 1;
        let word = u64::from(fraction | u32::from(exponent > 0) << 23) << (position % 32);
        limbs[position / 32] += word & 0xffff_ffff;
        limbs[position / 32 + 1] += word >> 32;
    }
    let mut carry = 0;
    for limb in &mut limbs {
        carry += *limb;
        *limb = carry & 0xffff_ffff;
        carry >>= 32;
    }
    let Some(top) = limbs.iter().rposition(|&limb| limb != 0) else { return 0.0 };
    // The highest 64 bits, the lowest of which tells whether anything lies below.
    let limb = |below: usize| top.checked_sub(below).map_or(0, |i| limbs[i]);
    let zeros = limb(0).leading_zeros() - 32;
    let third = limb(2) << zeros;
    let bits = (limb(0) << 32 | limb(1)) << zeros | third >> 32;
    let more = third & 0xffff_ffff != 0 || limbs[..top.saturating_sub(2)].iter().any(|&limb| limb != 0);
    (bits | u64::from(more)) as f64 * 2f64.powi(32 * (top as i32 - 1) - zeros as i32 - 149)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_agree_on_what_float64_holds() {
        let values: Vec<f32> = (0..100_000).map(|i| (i % 1000) as f32 * 0.25).collect();
        let expected = values.iter().map(|&v| f64::from(v)).sum::<f64>();
        assert_eq!((exact_sum(&values), limb_sum(&values)), (expected, expected));
        for value in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1.0, f32::MAX] {
            assert_eq!((exact_sum(&[value]), limb_sum(&[value])), (f64::from(value), f64::from(value)));
        }
        assert_eq!((exact_sum(&[]), limb_sum(&[])), (0.0, 0.0));
    }

    #[test]
    fn the_sum_is_rounded_once_and_ties_go_to_even() {
        let (huge, tiny) = (2f32.powi(53), f32::from_bits(1));
        assert_eq!(exact_sum(&[huge, 1.0]), 2f64.powi(53));
        assert_eq!(exact_sum(&[huge, 1.0, tiny]), 2f64.powi(53) + 2.0);
        assert_eq!(exact_sum(&[tiny, 1.0, huge]), 2f64.powi(53) + 2.0);
        assert_eq!(exact_sum(&[huge, 3.0]), 2f64.powi(53) + 4.0);
        assert_eq!(exact_sum(&[f32::MAX, f32::MAX, tiny]), 2.0 * f64::from(f32::MAX));
    }
}
