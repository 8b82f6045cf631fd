//! Types of the unquantized tensor and of 4-bit codes.

use crate::codebook::{FP4, NF4};

/// Floating-point type of an unquantized tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
}

impl Dtype {
    /// All of them, in the order of their numbers at the Python boundary.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// As kernels are named.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A 4-bit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// Quantiles of the normal distribution.
    Nf4,
    /// Sign and magnitude.
    Fp4,
}

impl QuantType {
    /// All of them, in the order of their numbers in kernels and at the Python boundary.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The sixteen values, by code.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }
}
