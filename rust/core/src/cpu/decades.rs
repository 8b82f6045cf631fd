//! The nearest code of a dynamic map by arithmetic, for vector code: it has no fast look-ups in memory.
//!
//! Within a decade a dynamic map's thresholds lie evenly: a line gives a place that is the rank or one below it, and one comparison
//! with the threshold at that place decides. The lines are checked when they are made, so the result is the definition's.

use crate::codebook::Ranks;

/// Where the rank of a magnitude is looked for.
#[derive(Debug, Clone)]
pub struct Decades {
    /// By the low five bits of a magnitude's exponent: bits of the power of ten in that octave, or of 2; their low four bits name
    /// the decade below it.
    pub edges: [u32; 32],
    /// Places in a decade for each unit of magnitude.
    pub slopes: [f32; 16],
    /// Place of magnitude 0, were the decade the only one.
    pub offsets: [f32; 16],
    /// By place: the threshold between it and the next one.
    pub thresholds: [f32; 256],
    /// Whether the negative values mirror the positive ones; otherwise there are none.
    pub mirrored: bool,
}

/// Magnitudes below count as this one: each exponent from here to 1 then has low bits of its own.
pub const SMALLEST: f32 = 1.0 / (1u32 << 31) as f32;
/// Codes below that of 0 in a mirrored map.
pub const NEGATIVE: usize = 127;
const DECADES: usize = 7;

impl Decades {
    /// The decades of a code whose values ascend, or `None` where lines do not fit its thresholds.
    pub fn new(values: &[f32; 256], ranks: &Ranks) -> Option<Self> {
        let zero = values.iter().position(|&value| value == 0.0)?;
        let mirrored = zero == NEGATIVE;
        let (low, high) = ranks.thresholds.split_at_checked(zero)?;
        let mirrors = low.iter().rev().zip(high).all(|(low, high)| *low == -*high);
        if !ranks.codes.is_sorted() || !(zero == 0 || mirrored && mirrors) {
            return None;
        }
        let mut found =
            Self { edges: [0; 32], slopes: [0.0; 16], offsets: [0.0; 16], thresholds: [f32::INFINITY; 256], mirrored };
        found.thresholds[..high.len()].copy_from_slice(high);
        let edge = |decade: usize| 10f64.powi(decade as i32 + 1 - DECADES as i32);
        let mut first = 1.0;
        for decade in 0..DECADES {
            let (start, end) = (edge(decade) / 10.0, edge(decade));
            let inside = values.iter().filter(|&&value| (start..end).contains(&f64::from(value)));
            let count = inside.count() as f64;
            let slope = count / (end - start);
            found.slopes[decade] = slope as f32;
            found.offsets[decade] = (first - 0.5 - start * slope) as f32;
            first += count;
        }
        for exponent in 96..128u32 {
            let inside = |decade: &usize| (edge(*decade) as f32).to_bits() >> 23 == exponent;
            let below = |decade: &usize| (edge(*decade) as f32).to_bits() >> 23 < exponent;
            found.edges[exponent as usize % 32] = match (0..DECADES - 1).find(inside) {
                Some(decade) => (edge(decade) as f32).to_bits() & !15 | decade as u32,
                None => 2f32.to_bits() | (0..DECADES - 1).filter(below).count() as u32,
            };
        }
        found.is_right(high.len()).then_some(found)
    }

    /// Places ascend between edges and thresholds, so that being right next to these is being right everywhere.
    fn is_right(&self, count: usize) -> bool {
        let thresholds = &self.thresholds[..count];
        let rank = |magnitude: f32| thresholds.partition_point(|&threshold| magnitude > threshold);
        let edges = self.edges.iter().map(|&bits| f32::from_bits(bits)).filter(|&edge| edge < 1.0);
        let corners = thresholds.iter().copied().chain(edges).flat_map(|at| [at, at.next_up()]);
        corners.chain([0.0, 1.0, 1.0 + f32::EPSILON]).all(|magnitude| {
            let place = self.place(magnitude);
            place < self.thresholds.len() && place + usize::from(magnitude > self.thresholds[place]) == rank(magnitude)
        })
    }

    /// The rank of a magnitude, or one less; as the vector code finds it.
    fn place(&self, magnitude: f32) -> usize {
        let magnitude = magnitude.max(SMALLEST);
        let edge = self.edges[(magnitude.to_bits() >> 23) as usize % 32];
        let decade = (edge as usize & 15) + usize::from(magnitude > f32::from_bits(edge));
        magnitude.mul_add(self.slopes[decade], self.offsets[decade]) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::dynamic_map;

    #[test]
    fn ranks_are_those_of_the_definition() {
        let line: [f32; 256] = std::array::from_fn(|i| i as f32 / 255.0);
        for (values, zero) in [(dynamic_map(true), NEGATIVE), (dynamic_map(false), 0), (line, 0)] {
            let ranks = Ranks::new(&values);
            let decades = Decades::new(&values, &ranks).unwrap();
            assert_eq!(decades.mirrored, zero > 0);
            for bits in (0..1.0f32.to_bits()).step_by(997).chain([1.0f32.to_bits()]) {
                let magnitude = f32::from_bits(bits);
                let place = decades.place(magnitude);
                let rank = place + usize::from(magnitude > decades.thresholds[place]);
                assert_eq!(zero + rank, ranks.rank(magnitude), "{magnitude:e}");
            }
        }
    }

    #[test]
    fn codes_that_lines_do_not_fit_have_none() {
        let of = |values: [f32; 256]| Decades::new(&values, &Ranks::new(&values));
        let mut other = dynamic_map(true);
        other.reverse();
        assert!(of(other).is_none(), "descending");
        assert!(of(std::array::from_fn(|i| (i as f32 / 255.0).powi(3))).is_none(), "crowded");
        assert!(of(std::array::from_fn(|i| (2 * i) as f32 / 255.0 - 1.0)).is_none(), "without 0");
        other = dynamic_map(true);
        other[3] = other[3].next_up();
        assert!(of(other).is_none(), "not mirrored");
    }
}
