//! The kernels that multiply with a 4-bit weight.

use crate::matmul4_instances::{BROAD, MID, SKINNY, STAGE, Tokens, WIDE};

/// A kernel that multiplies, or one of its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// matmul4_plain.cu
    Plain,
    /// matmul4_mma.cu, for so many eights of tokens, less one.
    Mma(usize),
    /// matmul4_broad.cu, one of [`BROAD`].
    Broad(usize),
    /// matmul4_skinny.cu, one of [`SKINNY`].
    Skinny(usize),
    /// matmul4_mid.cu, one of [`MID`].
    Mid(usize),
    /// matmul4_wgmma.cu, one of [`WIDE`].
    Wide(usize),
}

/// Instances of matmul4_mma.cu.
pub const MMA: usize = 2;

impl Product {
    /// How many there are.
    pub const COUNT: usize = 1 + MMA + BROAD.len() + SKINNY.len() + MID.len() + WIDE.len();

    /// All of them, by [`Self::index`].
    pub fn all() -> impl Iterator<Item = Self> {
        let mma = (0..MMA).map(Self::Mma);
        let broad = (0..BROAD.len()).map(Self::Broad);
        let skinny = (0..SKINNY.len()).map(Self::Skinny);
        let mid = (0..MID.len()).map(Self::Mid);
        let wide = (0..WIDE.len()).map(Self::Wide);
        std::iter::once(Self::Plain).chain(mma).chain(broad).chain(skinny).chain(mid).chain(wide)
    }

    /// Its number.
    pub fn index(self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Mma(instance) => 1 + instance,
            Self::Broad(instance) => 1 + MMA + instance,
            Self::Skinny(instance) => 1 + MMA + BROAD.len() + instance,
            Self::Mid(instance) => 1 + MMA + BROAD.len() + SKINNY.len() + instance,
            Self::Wide(instance) => 1 + MMA + BROAD.len() + SKINNY.len() + MID.len() + instance,
        }
    }

    /// Its file, without the ending.
    pub fn family(self) -> &'static str {
        match self {
            Self::Plain => "matmul4_plain",
            Self::Mma(_) => "matmul4_mma",
            Self::Broad(_) => "matmul4_broad",
            Self::Skinny(_) => "matmul4_skinny",
            Self::Mid(_) => "matmul4_mid",
            Self::Wide(_) => "matmul4_wgmma",
        }
    }

    /// What it is called in the kernels' names and in `FEWBITS_MATMUL4`.
    pub fn name(self) -> String {
        match self {
            Self::Plain => "plain".to_string(),
            Self::Mma(instance) => format!("mma_{}", instance + 1),
            Self::Broad(instance) => format!("broad_{}", BROAD[instance].columns),
            Self::Skinny(instance) => format!("skinny_{}", SKINNY[instance].name),
            Self::Mid(instance) => format!("mid_{}", MID[instance].name()),
            Self::Wide(instance) => format!("wide_{}", WIDE[instance].columns),
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> u32 {
        match self {
            Self::Plain | Self::Mma(_) | Self::Broad(_) => 256,
            Self::Skinny(instance) => 32 * SKINNY[instance].warps,
            Self::Mid(instance) => 128 * (MID[instance].groups * MID[instance].halves + 1),
            Self::Wide(_) => 384,
        }
    }

    /// Bytes of shared memory that a launch asks for: all that blocks of which so many are to run side by side can have.
    pub fn shared_bytes(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Mma(_) | Self::Broad(_) => 99 * 1024,
            Self::Skinny(instance) => 228 * 1024 / SKINNY[instance].resident - 1024,
            Self::Mid(_) | Self::Wide(_) => 227 * 1024,
        }
    }

    /// Whether it multiplies `m` tokens with a weight of `n` x `k`, types, alignment and block size apart.
    pub fn takes(self, m: usize, n: usize, k: usize, nested: bool, multiprocessors: usize) -> bool {
        match self {
            Self::Plain | Self::Broad(_) | Self::Wide(_) => true,
            Self::Mma(instance) => m <= 8 * (instance + 1),
            Self::Skinny(instance) => {
                let shape = SKINNY[instance];
                let held = match shape.tokens {
                    Tokens::Held(stages) => k.div_ceil(STAGE) == (stages * shape.split) as usize,
                    _ => true,
                };
                held && (!nested || shape.takes_nested()) && m <= 8 * shape.eights as usize
            }
            // Blocks that share a tile have only one.
            Self::Mid(instance) => {
                let split = MID[instance].split as usize;
                split == 1 || mid_tiles(instance, m, n) <= multiprocessors / split
            }
        }
    }
}

/// Tiles of an instance of matmul4_mid.cu.
pub fn mid_tiles(instance: usize, m: usize, n: usize) -> usize {
    n.div_ceil(64 * MID[instance].groups as usize) * m.div_ceil(MID[instance].columns as usize)
}

/// Tiles of an instance of matmul4_broad.cu.
pub fn broad_tiles(instance: usize, m: usize, n: usize) -> usize {
    n.div_ceil(128) * m.div_ceil(BROAD[instance].columns as usize)
}

/// Tiles of an instance of matmul4_wgmma.cu: those of two blocks.
pub fn wide_tiles(instance: usize, m: usize, n: usize) -> usize {
    n.div_ceil(256) * m.div_ceil(WIDE[instance].columns as usize)
}
