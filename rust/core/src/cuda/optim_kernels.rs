//! The kernels of optim8.cu, optim32.cu and optim_norm.cu.

use crate::Dtype;
use crate::optim::{Bits, Family};

/// The types that a step's kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Types {
    /// Whatever the launch names.
    Any,
    /// float32 parameters and gradients.
    F32,
    /// bfloat16 parameters and gradients.
    Bf16,
}

/// A kernel of the optimizers.
#[derive(Debug, Clone, Copy)]
pub enum OptimKernel {
    /// One step.
    Step {
        /// Update rule.
        family: Family,
        /// Width of the states.
        bits: Bits,
        /// Of parameters and gradients.
        types: Types,
    },
    /// Sums of squares of gradients.
    NormGradient,
    /// Sums of squares of parameters and updates.
    NormTrust {
        /// Update rule.
        family: Family,
        /// Width of the states.
        bits: Bits,
    },
    /// What gradients are multiplied by.
    Control,
    /// Trust ratios.
    Trust,
}

impl OptimKernel {
    /// How many there are.
    pub const COUNT: usize = Self::STEPS + 6;
    const STEPS: usize = Family::ALL.len() * 2 * 3;

    /// The step's kernel: one that knows the types where it was worth its bytes in the wheel.
    pub fn step(family: Family, bits: Bits, parameters: Dtype, gradients: Dtype) -> Self {
        let types = match (family, bits, parameters, gradients) {
            (Family::Adam, _, Dtype::F32, Dtype::F32) => Types::F32,
            (Family::Adam, _, Dtype::Bf16, Dtype::Bf16) => Types::Bf16,
            (Family::Ademamix | Family::Lion, Bits::Eight, Dtype::Bf16, Dtype::Bf16) => Types::Bf16,
            _ => Types::Any,
        };
        // LARS is SGD with ratios.
        let family = if family == Family::Lars { Family::Sgd } else { family };
        Self::Step { family, bits, types }
    }

    /// Its place among them.
    pub fn index(self) -> usize {
        match self {
            Self::Step { family, bits, types } => (family as usize * 2 + bits as usize) * 3 + types as usize,
            Self::NormGradient => Self::STEPS,
            Self::NormTrust { family: Family::Lamb, bits } => Self::STEPS + 1 + bits as usize,
            Self::NormTrust { .. } => Self::STEPS + 3,
            Self::Control => Self::STEPS + 4,
            Self::Trust => Self::STEPS + 5,
        }
    }

    /// Its file, without the ending.
    pub fn file(self) -> &'static str {
        match self {
            Self::Step { bits: Bits::Eight, .. } => "optim8",
            Self::Step { bits: Bits::ThirtyTwo, .. } => "optim32",
            _ => "optim_norm",
        }
    }

    /// Its name in the source.
    pub fn name(self) -> String {
        let width = |bits| if bits == Bits::Eight { "8" } else { "32" };
        match self {
            Self::Step { family, bits, types } => {
                let suffix = match types {
                    Types::Any => "",
                    Types::F32 => "_f32",
                    Types::Bf16 => "_bf16",
                };
                format!("optim{}_{}{suffix}", width(bits), family.name())
            }
            Self::NormGradient => "optim_norm_gradient".to_string(),
            Self::NormTrust { family: Family::Lamb, bits } => format!("optim_norm_lamb{}", width(bits)),
            Self::NormTrust { .. } => "optim_norm_lars".to_string(),
            Self::Control => "optim_control".to_string(),
            Self::Trust => "optim_trust".to_string(),
        }
    }

    /// Threads of a block; the sources' `THREADS` and `FOLD`.
    pub fn threads(self) -> u32 {
        match self {
            Self::Control | Self::Trust | Self::Step { bits: Bits::Eight, .. } => 1024,
            Self::Step { bits: Bits::ThirtyTwo, .. } => 320,
            _ => 512,
        }
    }

    /// Bytes of shared memory that a launch asks for: optim_codes.cuh's `CodeTables`, with its `COPIES` for the target, and the
    /// scales of optim8.cu's pieces.
    pub fn shared_bytes(self, target: &str) -> u32 {
        let Self::Step { bits: Bits::Eight, .. } = self else { return 0 };
        let copies = match target {
            "compute_80" | "sm_80" | "sm_90a" | "sm_100" => 32,
            _ => 8,
        };
        (4 * (256 * 2 * copies + SIGNED_BUCKETS + UNSIGNED_BUCKETS + PIECE_SCALES)).next_multiple_of(16)
    }
}

/// Words of the bucket table of the signed map, padded to 16 bytes.
const SIGNED_BUCKETS: u32 = 2948;
/// The same of the unsigned map, from 0 on.
const UNSIGNED_BUCKETS: u32 = 3076;
/// Scales of 32 warps' pieces of 16 blocks with three states each.
const PIECE_SCALES: u32 = 32 * 16 * 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::{BucketTable, Ranks, dynamic_map};

    #[test]
    fn the_tables_fit() {
        let table = |signed, bits| BucketTable::new(&Ranks::with_signed_zeros(&dynamic_map(signed)), 8, bits).unwrap();
        let (signed, unsigned) = (table(true, 6), table(false, 7));
        assert_eq!(signed.entries.len().next_multiple_of(4), SIGNED_BUCKETS as usize);
        let from_zero = unsigned.entries.len() - unsigned.origin as usize;
        assert_eq!(from_zero.next_multiple_of(4), UNSIGNED_BUCKETS as usize);
    }

    #[test]
    fn kernels_have_places_of_their_own() {
        let bits = [Bits::Eight, Bits::ThirtyTwo];
        let mut all = vec![OptimKernel::NormGradient, OptimKernel::Control, OptimKernel::Trust];
        all.push(OptimKernel::NormTrust { family: Family::Lars, bits: Bits::Eight });
        for bits in bits {
            all.push(OptimKernel::NormTrust { family: Family::Lamb, bits });
            for family in Family::ALL {
                for types in [Types::Any, Types::F32, Types::Bf16] {
                    all.push(OptimKernel::Step { family, bits, types });
                }
            }
        }
        let mut places: Vec<_> = all.iter().map(|kernel| kernel.index()).collect();
        places.sort_unstable();
        assert_eq!(places, (0..OptimKernel::COUNT).collect::<Vec<_>>());
    }
}
