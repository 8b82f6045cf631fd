//! The instances of the 4-bit products' kernels: `build.rs` compiles them, the launcher chooses among them.

/// How an instance of matmul4_skinny.cu gets at its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokens {
    /// They stay in registers: a row has exactly so many stages a warp.
    Held(u32),
    /// Read again for each tile.
    Read,
    /// Copied with the codes.
    Copied,
}

/// Template arguments of matmul4_skinny.cu.
#[derive(Debug, Clone, Copy)]
pub struct Skinny {
    /// What it is called in a kernel's name.
    pub name: &'static str,
    /// Warps of a block.
    pub warps: u32,
    /// Warps that share a tile, along k.
    pub split: u32,
    /// Stages of a warp's ring.
    pub depth: u32,
    /// Eights of tokens.
    pub eights: u32,
    /// Sixteens of rows of a tile.
    pub sixteens: u32,
    /// Where the tokens are.
    pub tokens: Tokens,
    /// Bytes from one entry of the table to the next.
    pub stride: u32,
    /// Blocks that a multiprocessor holds.
    pub resident: u32,
}

/// Columns of a stage.
pub const STAGE: usize = 256;

/// All of them.
pub const SKINNY: [Skinny; 6] = [
    skinny("small", 8, 8, 2, 1, 1, Tokens::Read, 128, 2),
    skinny("large", 8, 8, 2, 1, 2, Tokens::Read, 128, 2),
    skinny("held", 16, 16, 3, 1, 1, Tokens::Held(2), 256, 1),
    skinny("copied8", 8, 8, 2, 1, 2, Tokens::Copied, 256, 1),
    skinny("copied4", 8, 4, 2, 1, 2, Tokens::Copied, 256, 1),
    skinny("sixteen", 8, 8, 2, 2, 2, Tokens::Read, 128, 1),
];

#[allow(clippy::too_many_arguments)]
const fn skinny(
    name: &'static str,
    warps: u32,
    split: u32,
    depth: u32,
    eights: u32,
    sixteens: u32,
    tokens: Tokens,
    stride: u32,
    resident: u32,
) -> Skinny {
    Skinny { name, warps, split, depth, eights, sixteens, tokens, stride, resident }
}

/// Template arguments of matmul4_wgmma.cu.
#[derive(Debug, Clone, Copy)]
pub struct Wide {
    /// Tokens of a tile.
    pub columns: u32,
    /// Slots of 256 columns of codes.
    pub code_slots: u32,
    /// Slots of 64 columns of tokens.
    pub token_slots: u32,
}

/// All of them.
pub const WIDE: [Wide; 3] = [
    Wide { columns: 64, code_slots: 3, token_slots: 12 },
    Wide { columns: 128, code_slots: 3, token_slots: 6 },
    Wide { columns: 256, code_slots: 3, token_slots: 3 },
];

/// Types of the activations that they take, as kernels are named.
pub const TYPES: [&str; 2] = ["f16", "bf16"];
/// The same for the block scales.
pub const SCALES: [&str; 2] = ["plain", "nested"];
