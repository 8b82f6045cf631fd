//! Random numbers that depend on nothing but their place: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

/// Counters worked on side by side.
const LANES: usize = 32;

/// Low and high half of a product.
#[inline(always)]
fn product(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    (product as u32, (product >> 32) as u32)
}

/// The four words of each of the counters.
#[inline(always)]
pub fn philox(mut counters: [[u32; LANES]; 4], key: u64) -> [[u32; LANES]; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counters;
        for i in 0..LANES {
            let (low0, high0) = product(0xd251_1f53, c0[i]);
            let (low1, high1) = product(0xcd9e_8d57, c2[i]);
            counters[0][i] = high1 ^ c1[i] ^ k0;
            counters[1][i] = low1;
            counters[2][i] = high0 ^ c3[i] ^ k1;
            counters[3][i] = low0;
        }
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    counters
}

/// Where the random numbers of a block of elements are.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The block's first element within its tensor, a multiple of 8.
    pub element: u64,
    /// The step.
    pub t: u32,
    /// The tensor.
    pub ordinal: u32,
    /// The key.
    pub seed: u64,
}

/// Sixteen random bits for each of 256 elements: eight elements share a counter, its words are taken from the low half on.
#[inline(always)]
pub fn halves(place: Place) -> [u32; 8 * LANES] {
    let number = |i: usize| (place.element / 8).wrapping_add(i as u64);
    let (low, high) = (std::array::from_fn(|i| number(i) as u32), std::array::from_fn(|i| (number(i) >> 32) as u32));
    let counters = [low, high, [place.t; LANES], [place.ordinal; LANES]];
    let words = philox(counters, place.seed);
    let mut halves = [0; 8 * LANES];
    for i in 0..LANES {
        for (w, word) in words.iter().enumerate() {
            halves[8 * i + 2 * w] = word[i] & 0xffff;
            halves[8 * i + 2 * w + 1] = word[i] >> 16;
        }
    }
    halves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_vectors() {
        let of = |counter: [u32; 4], key: u64| philox(counter.map(|word| [word; LANES]), key).map(|words| words[31]);
        assert_eq!(of([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(of([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(of(pi, 0x299f_31d0_a409_3822), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn eight_elements_share_a_counter() {
        let place = Place { element: 1 << 35, t: 3, ordinal: 7, seed: 11 };
        let found = halves(place);
        let words = philox([[1; LANES], [1; LANES], [3; LANES], [7; LANES]], 11);
        let number = (1u64 << 35) / 8 + 1;
        assert_eq!((number as u32, (number >> 32) as u32), (1, 1));
        assert_eq!(
            found[8..16],
            [
                words[0][0] & 0xffff,
                words[0][0] >> 16,
                words[1][0] & 0xffff,
                words[1][0] >> 16,
                words[2][0] & 0xffff,
                words[2][0] >> 16,
                words[3][0] & 0xffff,
                words[3][0] >> 16,
            ]
        );
    }
}
