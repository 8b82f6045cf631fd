//! Every path and method against sums in float64 of the exactly dequantized weight.

use super::{Method, Product, few, multiply};
use crate::blockwise::Absmax;
use crate::codebook::dynamic_map;
use crate::cpu::Path;
use crate::cpu::element::{Bf16, Element, F16, F32};
use crate::matmul4::{Rows, Weight};
use crate::{Dtype, QuantType};
use proptest::prelude::*;

/// A weight with the memory that it lies in, codes and scales at odd addresses.
struct Case {
    n: usize,
    k: usize,
    blocksize: usize,
    quant_type: QuantType,
    nested: bool,
    codes: Vec<u8>,
    absmax: Vec<u8>,
    absmax_codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    nested_code: [f32; 256],
    offset: f32,
}

/// Pseudo-random bits: a hash of the index.
fn noise(seed: u64, i: usize) -> u32 {
    let x = (seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x >> 32) as u32
}

/// A number in [-1, 1).
fn uniform(seed: u64, i: usize) -> f32 {
    (noise(seed, i) as i32) as f32 / 2f32.powi(31)
}

/// Bytes behind one more byte, so that what they hold is nowhere aligned.
fn shifted(bytes: impl Iterator<Item = u8>) -> Vec<u8> {
    std::iter::once(0).chain(bytes).collect()
}

impl Case {
    fn new(n: usize, k: usize, blocksize: usize, quant_type: QuantType, nested: bool, seed: u64) -> Self {
        let blocks = (n * k).div_ceil(blocksize);
        Self {
            n,
            k,
            blocksize,
            quant_type,
            nested,
            codes: shifted((0..(n * k).div_ceil(2)).map(|i| noise(seed, i) as u8)),
            absmax: shifted((0..blocks).flat_map(|b| (uniform(seed + 1, b).abs() + 0.1).to_ne_bytes())),
            absmax_codes: (0..blocks).map(|b| noise(seed + 2, b) as u8).collect(),
            nested_absmax: (0..blocks.div_ceil(256)).map(|b| uniform(seed + 3, b).abs() * 0.5).collect(),
            nested_code: dynamic_map(true),
            offset: 0.7,
        }
    }

    fn weight(&self) -> Weight {
        let at = |p: *const f32| p as u64;
        let absmax = if self.nested {
            Absmax::Nested {
                codes: self.absmax_codes.as_ptr() as u64,
                code: at(self.nested_code.as_ptr()),
                absmax: at(self.nested_absmax.as_ptr()),
                blocksize: 256,
                offset: at(&raw const self.offset),
            }
        } else {
            Absmax::Plain(self.absmax[1..].as_ptr() as u64)
        };
        let Self { n, k, blocksize, quant_type, .. } = *self;
        Weight { codes: self.codes[1..].as_ptr() as u64, n, k, blocksize, quant_type, absmax, settled: false }
    }

    /// An element of the weight, exactly.
    fn element(&self, i: usize) -> f64 {
        let code = self.codes[1 + i / 2] >> (if i.is_multiple_of(2) { 4 } else { 0 }) & 15;
        let block = i / self.blocksize;
        let scale = if self.nested {
            self.nested_code[usize::from(self.absmax_codes[block])] * self.nested_absmax[block / 256] + self.offset
        } else {
            let bytes = &self.absmax[1 + 4 * block..][..4];
            f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        f64::from(self.quant_type.values()[usize::from(code)]) * f64::from(scale)
    }

    /// `x` times the weight, at addresses that are multiples of nothing.
    fn product<T: Element>(&self, dtype: Dtype, x: &[T], bias: Option<&[T]>, path: Path, method: Method) -> Vec<T> {
        let bytes = |values: &[T]| {
            // SAFETY: elements are plain bits.
            shifted(
                unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
                    .iter()
                    .copied(),
            )
        };
        let (m, size) = (x.len() / self.k.max(1), size_of::<T>());
        let x = bytes(x);
        let bias = bias.map(bytes);
        let mut out = vec![0xffu8; 1 + m * self.n * size + 1];
        let rows = Rows {
            x: x[1..].as_ptr() as u64,
            m,
            dtype,
            bias: bias.as_ref().map_or(0, |bias| bias[1..].as_ptr() as u64),
            out: out[1..].as_mut_ptr() as u64,
            workspace: 0,
        };
        // SAFETY: the memory has the sizes that are said; the callers ask for supported paths.
        unsafe { multiply(self.weight(), rows, 1, path, method) }.unwrap();
        assert_eq!((out[0], out[out.len() - 1]), (0xff, 0xff), "written past the result");
        // SAFETY: whole elements, read without alignment.
        (0..m * self.n).map(|i| unsafe { out[1 + i * size..].as_ptr().cast::<T>().read_unaligned() }).collect()
    }
}

/// All that this processor runs.
fn ways(m: usize) -> impl Iterator<Item = (Path, Method)> {
    let few = (m <= few::MOST_TOKENS).then_some(Method::Few);
    let methods: Vec<Method> = few.into_iter().chain([Method::Tiles]).collect();
    Path::ALL
        .into_iter()
        .filter(|path| path.is_supported())
        .flat_map(move |path| methods.clone().into_iter().map(move |method| (path, method)))
}

fn tokens<T: Element>(count: usize, seed: u64) -> Vec<T> {
    (0..count).map(|i| T::narrow(uniform(seed, i) * 2.0)).collect()
}

/// The products, within the roundings of one factor, of the sums and of the result.
fn check<T: Element>(case: &Case, dtype: Dtype, m: usize, with_bias: bool, seed: u64) {
    let unit = match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
    };
    let Case { n, k, .. } = *case;
    let x: Vec<T> = tokens(m * k, seed);
    let bias: Option<Vec<T>> = with_bias.then(|| tokens(n, seed + 1));
    let weight: Vec<f64> = (0..n * k).map(|i| case.element(i)).collect();
    for (path, method) in ways(m) {
        let out = case.product(dtype, &x, bias.as_deref(), path, method);
        for token in 0..m {
            for row in 0..n {
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[row].widen()));
                let terms = (0..k).map(|i| f64::from(x[token * k + i].widen()) * weight[row * k + i]);
                let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs()));
                let got = f64::from(out[token * n + row].widen());
                let factors = if dtype == Dtype::Bf16 { unit } else { 2f64.powi(-24) };
                let bound = size * (factors + 140.0 * 2f64.powi(-24)) + sum.abs() * unit + 1e-30;
                assert!(
                    (got - sum).abs() <= bound,
                    "{path:?} {method:?} {dtype:?} token {token} row {row}: {got:e}, exactly {sum:e}"
                );
            }
        }
    }
}

fn check_all(case: &Case, m: usize, with_bias: bool, seed: u64) {
    check::<F32>(case, Dtype::F32, m, with_bias, seed);
    check::<F16>(case, Dtype::F16, m, with_bias, seed);
    check::<Bf16>(case, Dtype::Bf16, m, with_bias, seed);
}

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.widen().to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_agree_with_float64(
        n in 1usize..=300, k in 1usize..=300, m in 1usize..=20, log2_blocksize in 5u32..=12,
        fp4: bool, nested: bool, bias: bool, whole_blocks: bool, seed in 0u64..1 << 32,
    ) {
        let blocksize = 1 << log2_blocksize;
        let (k, blocksize) = if whole_blocks { (k.next_multiple_of(32), 32 << (k % 3)) } else { (k, blocksize) };
        let n = if k > 100 { n.min(60) } else { n };
        let quant_type = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        check_all(&Case::new(n, k, blocksize, quant_type, nested, seed), m, bias, seed + 9);
    }

    #[test]
    fn a_row_of_a_batch_is_the_same_row_alone(
        n in 1usize..=60, k in 1usize..=300, m in 1usize..=20, fp4: bool, seed in 0u64..1 << 32,
    ) {
        let quant_type = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let case = Case::new(n, k, 64, quant_type, false, seed);
        let x: Vec<Bf16> = tokens(m * k, seed);
        for (path, method) in ways(m) {
            let batch = bits(&case.product(Dtype::Bf16, &x, None, path, method));
            for (token, alone) in x.chunks(k).enumerate() {
                let alone = bits(&case.product(Dtype::Bf16, alone, None, path, method));
                prop_assert_eq!(&alone, &batch[token * n..][..n], "{:?} {:?} token {}", path, method, token);
            }
        }
    }
}

/// Shapes at the edges of tiles, chunks, panels and of the second pass over tokens.
#[test]
fn products_agree_with_float64_at_the_edges() {
    for (n, k, m, blocksize) in
        [(49, 1030, 17, 64), (2, 1024, 257, 64), (97, 96, 33, 32), (5, 4096, 2, 4096), (1, 1, 1, 32), (7, 513, 70, 128)]
    {
        check_all(&Case::new(n, k, blocksize, QuantType::Nf4, n % 2 == 0, 5), m, true, 6);
    }
}

/// One token with a single 1 reads a column of the weight: `value * absmax`, rounded to the factor's type at most.
#[test]
fn one_hot_tokens_read_the_weight() {
    for (k, blocksize) in [(128, 64), (192, 32), (33, 32), (256, 128)] {
        let case = Case::new(19, k, blocksize, QuantType::Nf4, false, 3);
        for (path, method) in ways(1) {
            for column in 0..k {
                let mut x = vec![F32::narrow(0.0); k];
                x[column] = F32::narrow(1.0);
                let out = case.product(Dtype::F32, &x, None, path, method);
                for (row, got) in out.iter().enumerate() {
                    let exact = case.element(row * k + column) as f32;
                    assert_eq!(got.widen().to_bits(), (exact + 0.0).to_bits(), "{path:?} {method:?} {row} {column}");
                }
            }
        }
    }
}

/// NaN and infinities reach the results of their own token, and no other.
#[test]
fn non_finite_tokens_stay_with_themselves() {
    let (n, k, m) = (50, 192, 3);
    let case = Case::new(n, k, 64, QuantType::Fp4, false, 8);
    for (path, method) in ways(m) {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let clean: Vec<Bf16> = tokens(m * k, 4);
            let mut x = clean.clone();
            x[k + 77] = Bf16::narrow(poison);
            let expected = case.product(Dtype::Bf16, &clean, None, path, method);
            let out = case.product(Dtype::Bf16, &x, None, path, method);
            for row in 0..n {
                assert_eq!(out[row], expected[row]);
                assert_eq!(out[2 * n + row], expected[2 * n + row]);
                let plain = f64::from(poison) * case.element(row * k + 77);
                let got = f64::from(out[n + row].widen());
                assert!(
                    got == plain || (got.is_nan() && plain.is_nan()),
                    "{path:?} {method:?} row {row}: {got}, expected {plain}"
                );
            }
        }
    }
}

/// Tokens near the ends of the range of bfloat16: subnormal products are not lost, large sums do not overflow on the way.
#[test]
fn tiny_and_huge_tokens_keep_their_precision() {
    for (scale, absmax) in [(1e-39f32, 1e6f32), (2e37, 1e-4)] {
        let mut case = Case::new(5, 128, 64, QuantType::Nf4, false, 2);
        case.absmax = shifted((0..10).flat_map(|_| absmax.to_ne_bytes()));
        let x: Vec<Bf16> = (0..128).map(|i| Bf16::narrow(scale * (1.0 + i as f32 / 16.0))).collect();
        for (path, method) in ways(1) {
            let out = case.product(Dtype::Bf16, &x, None, path, method);
            for (row, got) in out.iter().enumerate() {
                let terms = (0..128).map(|i| f64::from(x[i].widen()) * case.element(row * 128 + i));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)));
                let error = (f64::from(got.widen()) - sum).abs();
                assert!(error <= size * 2f64.powi(-7), "{path:?} {method:?} {scale:e} row {row}: off by {error:e}");
            }
        }
    }
}

/// Nothing to sum: the bias, or zeros.
#[test]
fn no_columns_give_the_bias() {
    let bias: Vec<F32> = tokens(7, 1);
    let mut out = vec![F32::default(); 7];
    let case = Case::new(7, 0, 64, QuantType::Nf4, false, 1);
    for (path, method) in ways(1) {
        let (from, to) = (bias.as_ptr() as u64, out.as_mut_ptr() as u64);
        let rows = Rows { x: 0, m: 1, dtype: Dtype::F32, bias: from, out: to, workspace: 0 };
        // SAFETY: nothing is read but the bias.
        unsafe { multiply(case.weight(), rows, 1, path, method) }.unwrap();
        assert_eq!(bits(&out), bits(&bias));
    }
}

/// The pointers of a product may be shared: it is what threads are given.
#[test]
fn threads_do_not_matter() {
    fn shared<T: Sync>() {}
    shared::<Product<F32>>();
    let case = Case::new(1000, 1024, 64, QuantType::Nf4, false, 1);
    for m in [1, 24] {
        let x: Vec<F16> = tokens(m * 1024, 7);
        for (path, method) in ways(m) {
            let mut results = Vec::new();
            for threads in [1, 2, 5] {
                let mut out = vec![F16::default(); m * 1000];
                let at = |values: *const F16| values as u64;
                let rows =
                    Rows { x: at(x.as_ptr()), m, dtype: Dtype::F16, bias: 0, out: at(out.as_mut_ptr()), workspace: 0 };
                // SAFETY: the memory has the sizes that are said.
                unsafe { multiply(case.weight(), rows, threads, path, method) }.unwrap();
                results.push(bits(&out));
            }
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{path:?} {method:?}");
        }
    }
}
