//! Every kernel against plain sums.

use proptest::prelude::*;

use super::kernels::{GROUP, Kernel, Kernels, MOST_TOKENS};
use super::tiles::ROWS;

/// Sums of a kernel over rows that begin at an odd place, less what its offset adds.
fn sums(kernels: &Kernels, a: &[i8], b: &[i8], tokens: usize, k: usize) -> Vec<i32> {
    let kernel: Kernel = kernels.by_tokens[tokens - 1];
    let mut sums = vec![-1i32; MOST_TOKENS * ROWS];
    for (token, sums) in sums.chunks_exact_mut(ROWS).take(tokens).enumerate() {
        let sum: i32 = a[1 + token * k..][..k].iter().map(|&x| i32::from(x)).sum();
        sums[..GROUP].fill(sum.wrapping_mul(-kernels.offset));
    }
    let rows: [*const i8; GROUP] = std::array::from_fn(|row| b[1 + row * k..].as_ptr());
    // SAFETY: the kernel is one that this processor runs; the rows hold `k` elements, the sums all of a block.
    unsafe { kernel(a[1..].as_ptr(), k, rows, k, sums.as_mut_ptr()) };
    sums
}

fn check(a: &[i8], b: &[i8], tokens: usize, k: usize) {
    for kernels in Kernels::supported() {
        let got = sums(kernels, a, b, tokens, k);
        for (token, got) in got.chunks_exact(ROWS).enumerate() {
            for (row, &got) in got.iter().enumerate() {
                let products = || (0..k).map(|i| i32::from(a[1 + token * k + i]) * i32::from(b[1 + row * k + i]));
                let expected = if token < tokens && row < GROUP { products().sum() } else { -1 };
                assert_eq!(got, expected, "token {token} of {tokens}, row {row}, {k} columns");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn kernels_are_exact(
        tokens in 1..=MOST_TOKENS,
        k in prop_oneof![0..200usize, Just(64), Just(1024)],
        a in prop::collection::vec(any::<i8>(), 1 + MOST_TOKENS * 1024),
        b in prop::collection::vec(any::<i8>(), 1 + GROUP * 1024),
    ) {
        check(&a, &b, tokens, k);
    }
}

#[test]
fn the_largest_products_do_not_saturate() {
    for (x, y) in [(i8::MIN, i8::MIN), (i8::MIN, i8::MAX), (i8::MAX, i8::MIN), (i8::MAX, i8::MAX)] {
        let k = 1000;
        check(&vec![x; 1 + MOST_TOKENS * k], &vec![y; 1 + GROUP * k], MOST_TOKENS, k);
    }
}
