//! The vectorized loops against the definition, element by element.

use super::element::{Bf16, Element, F16, F32};
use super::{dequantize, quantize};
use crate::blockwise::{Absmax, Blocks};
use crate::codebook::{Ranks, dynamic_map};
use crate::{Dtype, QuantType};
use proptest::prelude::*;

/// Bits of a float32, of every kind.
fn any_bits() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (-4.0f32..4.0).prop_map(f32::to_bits),
        1 => any::<u32>(),
        1 => Just(0u32),
        1 => Just(0x8000_0000u32),
        1 => 0u32..0x0080_0000,
    ]
}

fn blocksizes() -> impl Strategy<Value = usize> {
    (5u32..=12).prop_map(|log2| 1 << log2)
}

/// absmax and `x / absmax` of a block, by the definition.
fn normalized(block: &[f32]) -> (f32, Vec<f32>) {
    let finite = |x: &f32| if x.is_nan() { 0.0 } else { x.clamp(-f32::MAX, f32::MAX) };
    let absmax = block.iter().map(|x| finite(x).abs()).fold(0.0, f32::max);
    let inverse = 1.0 / absmax;
    let quotient = |x: f32| match absmax {
        0.0 => 0.0,
        _ if inverse.is_infinite() => x / absmax,
        _ => x * inverse,
    };
    (absmax, block.iter().map(|x| quotient(finite(x))).collect())
}

fn check<T: Element>(dtype: Dtype, bits: &[u32], blocksize: usize) {
    let x: Vec<T> = bits.iter().map(|&b| T::narrow(f32::from_bits(b))).collect();
    let wide: Vec<f32> = x.iter().map(|&v| v.widen()).collect();
    let n = x.len();
    let blocks = Blocks::new(n, blocksize, dtype).unwrap();
    let at = |p: *const u8| p as u64;
    for quant_type in QuantType::ALL {
        let ranks = Ranks::with_signed_zeros(quant_type.values());
        let mut codes = vec![0xffu8; n.div_ceil(2)];
        let mut absmax = vec![-1.0f32; blocks.count()];
        let mut out = vec![T::default(); n];
        // SAFETY: all buffers have the sizes of `blocks`.
        unsafe {
            let scales = at(absmax.as_mut_ptr().cast());
            quantize::quantize_4bit(blocks, at(x.as_ptr().cast()), quant_type, at(codes.as_mut_ptr()), scales, 1)
                .unwrap();
            let to = at(out.as_mut_ptr().cast());
            dequantize::dequantize_4bit(blocks, at(codes.as_ptr()), quant_type, Absmax::Plain(scales), to, 1).unwrap();
        }
        for (b, block) in wide.chunks(blocksize).enumerate() {
            let (largest, t) = normalized(block);
            assert_eq!(absmax[b].to_bits(), largest.to_bits());
            for (i, &t) in t.iter().enumerate() {
                let i = b * blocksize + i;
                let code = codes[i / 2] >> (if i.is_multiple_of(2) { 4 } else { 0 }) & 15;
                assert_eq!(code, ranks.codes[ranks.rank(t)], "{quant_type:?} element {i}, t = {t:e}");
                let value = T::narrow(quant_type.values()[usize::from(code)] * largest);
                assert_eq!(out[i].widen().to_bits(), value.widen().to_bits());
            }
        }
        if n % 2 == 1 {
            assert_eq!(codes[n / 2] & 15, ranks.codes[ranks.rank(0.0)], "pad");
        }
    }
    for values in
        [dynamic_map(true), dynamic_map(false), std::array::from_fn(|i| ((i * 37) % 256) as f32 / 255.0 - 0.4)]
    {
        let ranks = Ranks::new(&values);
        let mut codes = vec![0xffu8; n];
        let mut absmax = vec![-1.0f32; blocks.count()];
        // SAFETY: as above.
        unsafe {
            let (x, codes) = (at(x.as_ptr().cast()), at(codes.as_mut_ptr()));
            quantize::quantize_8bit(blocks, x, Some(&values), codes, at(absmax.as_mut_ptr().cast()), 1).unwrap();
        }
        for (b, block) in wide.chunks(blocksize).enumerate() {
            for (i, &t) in normalized(block).1.iter().enumerate() {
                assert_eq!(codes[b * blocksize + i], ranks.codes[ranks.rank(t)], "element {i} of block {b}, t = {t:e}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn loops_agree_with_the_definition(
        bits in prop::collection::vec(any_bits(), 1..700),
        blocksize in blocksizes(),
    ) {
        check::<F32>(Dtype::F32, &bits, blocksize);
        check::<F16>(Dtype::F16, &bits, blocksize);
        check::<Bf16>(Dtype::Bf16, &bits, blocksize);
    }
}
