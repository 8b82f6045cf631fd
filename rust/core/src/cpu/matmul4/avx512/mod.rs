//! Kernels with AVX-512, and with its dot products of bfloat16. They take rows of whole blocks.

// One index addresses several arrays at once.
#![allow(clippy::needless_range_loop)]

mod few;
mod tiles;

use std::arch::x86_64::{__m512bh, __m512i};

pub use few::{few_bf16, few_f32};
pub use tiles::{TILES_BF16, TILES_F32, decode_bf16, decode_f32};

#[inline(always)]
fn bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are allowed.
    unsafe { std::mem::transmute(bits) }
}
