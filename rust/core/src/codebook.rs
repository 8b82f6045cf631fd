//! The code tables, their thresholds and the bucket tables that find the nearest code: the only copy.
//!
//! `build.rs` includes this file too and writes what the kernels need of it into a header, so that
//! CPU and GPU read the same numbers.
//!
//! Nearest code: with the values ascending, value `i + 1` is taken over value `i` exactly when
//! `t > fl32((v_i + v_{i+1}) / 2)`. The *rank* of `t` is the number of thresholds below it.

/// NF4: quantiles of the standard normal distribution, normalised to [-1, 1] (QLoRA, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4: a sign bit and eight magnitudes (twelfths of 0, 1/16, 8, 12, 4, 6, 2, 3). Code 8 is minus zero.
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The dynamic 8-bit map (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", section 2):
/// seven decades below 1, each with twice as many linear steps as the one below, plus 0 and 1.
/// The signed map gives half of its codes to negative values.
///
/// The steps are `(a + b) / 2 * 10^(i - 6)` with `a`, `b` neighbours of a float32 `linspace(0.1, 1)`,
/// every operation in float32: existing checkpoints carry these bits.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = Vec::with_capacity(256);
    for exponent in 0..7u32 {
        let steps = if signed { 1usize << exponent } else { 2usize << exponent };
        let scale = 10f64.powi(exponent as i32 - 6) as f32;
        for step in 0..steps {
            let mean = (boundary(step, steps) + boundary(step + 1, steps)) / 2.0;
            values.push(scale * mean);
            if signed {
                values.push(-(scale * mean));
            }
        }
    }
    values.push(0.0);
    values.push(1.0);
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Point `i` of a float32 `linspace(0.1, 1, steps + 1)` counted from its nearer end, as torch does.
fn boundary(i: usize, steps: usize) -> f32 {
    let width = (1.0f32 - 0.1f32) / steps as f32;
    if i < steps.div_ceil(2) { width.mul_add(i as f32, 0.1) } else { (-width).mul_add((steps - i) as f32, 1.0) }
}

/// The largest float below zero: the threshold between -0 and +0.
const BELOW_ZERO: f32 = -f32::from_bits(1);

/// The values of a code ascending, with where each stands in the code.
#[derive(Debug, Clone)]
pub struct Ranks {
    /// `thresholds[i]` separates rank `i` from rank `i + 1`.
    pub thresholds: Vec<f32>,
    /// The code of each rank.
    pub codes: Vec<u8>,
}

impl Ranks {
    /// Sorts a code of at most 256 values; equal values keep their order, and zeros are equal whatever their sign.
    pub fn new(values: &[f32]) -> Self {
        // Adding +0 turns -0 into +0.
        Self::with_signed_zeros(&values.iter().map(|value| value + 0.0).collect::<Vec<_>>())
    }

    /// The same for a code in which -0 stands below +0: it is taken by every `t < 0` nearest to zero, +0 by `t >= 0`.
    pub fn with_signed_zeros(values: &[f32]) -> Self {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        let threshold = |low: f32, high: f32| {
            let between_zeros = low == 0.0 && high == 0.0 && low.is_sign_negative() && high.is_sign_positive();
            if between_zeros { BELOW_ZERO } else { ((f64::from(low) + f64::from(high)) / 2.0) as f32 }
        };
        let thresholds = order.windows(2).map(|pair| threshold(values[pair[0]], values[pair[1]])).collect();
        Self { thresholds, codes: order.iter().map(|&i| i as u8).collect() }
    }

    /// The rank of `t`: how many thresholds lie below it.
    #[inline]
    pub fn rank(&self, t: f32) -> usize {
        self.thresholds.partition_point(|&threshold| t > threshold)
    }
}

/// A table that gives the rank of `t` with one read.
///
/// `t` in [-1, 1] is scaled by the power of two `scale`, so that magnitudes below every threshold become subnormal
/// and share a few buckets. `key = ordered(bits)` is the float as an integer in ascending order; a bucket is `key >> shift`
/// and holds at most one threshold `T`. `entry + (key << lift)` then has the rank in its top `8` (or `4`) bits: the entry holds the
/// bucket's first rank minus its index, and `2^shift - 1 - low(T)`, whose carry out of the low bits *is* the comparison `t > T`.
#[derive(Debug, Clone)]
pub struct BucketTable {
    /// Power of two that `t` is multiplied by.
    pub scale: f32,
    /// Low bits of a key that lie within a bucket.
    pub shift: u32,
    /// How far a key is shifted left before the entry is added.
    pub lift: u32,
    /// Index of the bucket of key 0 in `entries`: `entries[(key >> shift) + origin]`.
    pub origin: i32,
    /// One word a bucket.
    pub entries: Vec<u32>,
}

/// The bits of a float as an integer that ascends with the float (-0 just below +0).
#[inline(always)]
pub fn ordered(t: f32) -> i32 {
    let bits = t.to_bits() as i32;
    bits ^ ((bits >> 31) & 0x7fff_ffff)
}

impl BucketTable {
    /// Builds the table of `ranks` with `rank_bits` result bits, or `None` if some bucket would hold two thresholds.
    pub fn new(ranks: &Ranks, rank_bits: u32, mantissa_bits: u32) -> Option<Self> {
        let shift = 23 - mantissa_bits;
        let lift = 32 - rank_bits - shift;
        // Between -0 and +0 the sign decides, which survives underflow; no other threshold does.
        let magnitudes = ranks.thresholds.iter().filter(|&&t| t != BELOW_ZERO).map(|t| t.abs());
        let smallest = magnitudes.fold(1.0f32, f32::min);
        // The smallest threshold keeps the smallest normal exponent, so every threshold is scaled exactly.
        let octave = ((smallest.to_bits() >> 23) as i32) - 127; // -127 for 0 and subnormals: no table
        if !(-125..=0).contains(&octave) {
            return None;
        }
        let scale = f32::from_bits(((1 - octave) as u32) << 23);
        let scaled = |t: f32| t * scale;
        let key_of_threshold: Vec<i32> = ranks.thresholds.iter().map(|&t| ordered(scaled(t))).collect();
        let last = ordered(scaled(1.0)) >> shift;
        let first = ordered(scaled(-1.0)) >> shift;
        let mut entries = Vec::with_capacity((last - first + 1) as usize);
        let mut below = 0;
        for bucket in first..=last {
            let start = bucket << shift;
            let base = below as u32;
            let mut carry = 0;
            if let Some(&key) = key_of_threshold.get(below).filter(|&&key| key < start + (1 << shift)) {
                // Keys above the threshold's own carry.
                carry = (1u32 << shift) - 1 - (key - start) as u32;
                below += 1;
            }
            if key_of_threshold.get(below).is_some_and(|&key| key < start + (1 << shift)) {
                return None;
            }
            let index = (start as u32).wrapping_shl(lift);
            entries.push((base << (32 - rank_bits)).wrapping_sub(index).wrapping_add(carry << lift));
        }
        Some(Self { scale, shift, lift, origin: -first, entries })
    }

    /// The ranks of several `t`, each in [-1, 1].
    #[inline(always)]
    pub fn ranks<const N: usize>(&self, t: [f32; N]) -> [u32; N] {
        // Adding +0 turns -0 into +0, but leaves the -0 of a negative `t` that underflows.
        let keys = t.map(|t| ordered(if t == 0.0 { 0.0 } else { t * self.scale }));
        let last = self.entries.len() as u32 - 1;
        let indices = keys.map(|key| (((key >> self.shift) + self.origin) as u32).min(last));
        let mut entries = [0; N];
        for (index, entry) in indices.iter().zip(&mut entries) {
            // Volatile, so that the look-ups stay scalar loads and stores between vector code: gathers and insertions take longer.
            // SAFETY: both are elements of local arrays; the index is clamped to the last entry, and `new` makes no empty table.
            unsafe {
                let found = *self.entries.get_unchecked(std::ptr::read_volatile(index) as usize);
                std::ptr::write_volatile(entry, found);
            }
        }
        std::array::from_fn(|i| entries[i].wrapping_add((keys[i] as u32) << self.lift) >> (self.shift + self.lift))
    }
}

/// The 16 codes of a 4-bit type by 32 buckets of equal width over [-1, 1], each of which holds at most one threshold.
///
/// The edge at 0 itself separates -0 from +0.
#[derive(Debug, Clone)]
pub struct LinearBuckets {
    /// The bucket's threshold, or infinity.
    pub thresholds: [f32; 32],
    /// The code up to the threshold, and above it the one past it, eight bits higher.
    pub codes: [u32; 32],
}

impl LinearBuckets {
    /// Builds the buckets of `ranks`, or `None` if some bucket would hold two thresholds.
    pub fn new(ranks: &Ranks) -> Option<Self> {
        let mut buckets = Self { thresholds: [f32::INFINITY; 32], codes: [0; 32] };
        for bucket in 0..32 {
            let (start, end) = ((bucket as f32 - 16.0) / 16.0, (bucket as f32 - 15.0) / 16.0);
            let base = ranks.thresholds.iter().filter(|&&threshold| threshold < start).count();
            let mut inside = ranks.thresholds.iter().filter(|&&t| t != BELOW_ZERO && (start..end).contains(&t));
            let next = match inside.next() {
                Some(&threshold) => {
                    buckets.thresholds[bucket] = threshold;
                    base + 1
                }
                None => base,
            };
            if inside.next().is_some() {
                return None;
            }
            buckets.codes[bucket] = u32::from(ranks.codes[base]) | u32::from(ranks.codes[next]) << 8;
        }
        Some(buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> [(&'static str, Ranks, BucketTable); 4] {
        [
            ("nf4", NF4.to_vec(), 4, 3),
            ("fp4", FP4.to_vec(), 4, 3),
            ("dynamic", dynamic_map(true).to_vec(), 8, 6),
            ("unsigned dynamic", dynamic_map(false).to_vec(), 8, 7),
        ]
        .map(|(name, values, rank_bits, mantissa_bits)| {
            let ranks = Ranks::with_signed_zeros(&values);
            let table = BucketTable::new(&ranks, rank_bits, mantissa_bits).expect(name);
            (name, ranks, table)
        })
    }

    #[test]
    fn tables_agree_with_the_definition_at_every_threshold() {
        for (name, ranks, table) in tables() {
            for &threshold in &ranks.thresholds {
                for bits in [threshold.to_bits() - 1, threshold.to_bits(), threshold.to_bits() + 1] {
                    let t = f32::from_bits(bits);
                    if t.abs() <= 1.0 {
                        assert_eq!(table.ranks([t])[0] as usize, ranks.rank(t), "{name} at {t:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn tables_agree_with_the_definition_everywhere() {
        for (name, ranks, table) in tables() {
            let magnitudes = (0..64).chain((0..=1.0f32.to_bits()).step_by(1009)).chain([1.0f32.to_bits()]);
            for bits in magnitudes {
                for t in [f32::from_bits(bits), -f32::from_bits(bits)] {
                    assert_eq!(table.ranks([t])[0] as usize, ranks.rank(t), "{name} at {t:e}");
                }
            }
        }
    }

    #[test]
    fn minus_zero_is_not_below_zero() {
        let ranks = Ranks::with_signed_zeros(&FP4);
        let code = |t: f32| ranks.codes[ranks.rank(t)];
        assert_eq!([code(0.0), code(-0.0), code(-f32::from_bits(1)), code(f32::from_bits(1))], [0, 0, 8, 0]);
    }

    #[test]
    fn codes_with_crowded_or_vanishing_thresholds_have_no_table() {
        let line: Vec<f32> = (0..256).map(|i| (2 * i - 255) as f32 / 255.0).collect(); // a threshold at 0
        let crowded: Vec<f32> = (0..256).map(|i| 0.5 + i as f32 / 1024.0).collect();
        assert!(BucketTable::new(&Ranks::new(&line), 8, 6).is_none());
        assert!(BucketTable::new(&Ranks::new(&crowded), 8, 6).is_none());
    }

    #[test]
    fn the_dynamic_map_has_its_published_shape() {
        let (signed, unsigned) = (dynamic_map(true), dynamic_map(false));
        for map in [signed, unsigned] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(map.contains(&0.0) && map[255] == 1.0);
        }
        assert_eq!(signed.iter().filter(|&&v| v < 0.0).count(), 127);
        assert_eq!((unsigned[0], signed[127]), (0.0, 0.0));
    }
}
