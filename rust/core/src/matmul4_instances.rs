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

impl Skinny {
    /// Whether it takes nested scales. Two have no room in shared memory where they could be decoded.
    pub const fn takes_nested(&self) -> bool {
        !matches!(self.tokens, Tokens::Held(_)) && (self.sixteens == 1 || self.resident == 1)
    }
}

/// Columns of a stage.
pub const STAGE: usize = 256;

/// All of them.
pub const SKINNY: [Skinny; 8] = [
    skinny("small", 8, 8, 2, 1, 1, Tokens::Read, 128, 2),
    skinny("large", 8, 8, 2, 1, 2, Tokens::Read, 128, 2),
    skinny("held", 16, 16, 3, 1, 1, Tokens::Held(2), 256, 1),
    skinny("copied8", 8, 8, 2, 1, 2, Tokens::Copied, 256, 1),
    skinny("copied4", 8, 4, 2, 1, 2, Tokens::Copied, 256, 1),
    skinny("small4", 8, 4, 2, 1, 1, Tokens::Read, 128, 2),
    skinny("small2", 8, 2, 2, 1, 1, Tokens::Read, 128, 2),
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
    /// Microseconds of 64 columns of a tile on an H200, and of its end.
    pub step_us: f64,
    /// See `step_us`.
    pub tile_us: f64,
}

/// All of them.
pub const WIDE: [Wide; 2] = [
    Wide { columns: 128, code_slots: 3, token_slots: 6, step_us: 0.443, tile_us: 2.0 },
    Wide { columns: 256, code_slots: 3, token_slots: 3, step_us: 0.735, tile_us: 3.0 },
];

/// Template arguments of matmul4_mid.cu, and what an instance takes on an H200.
#[derive(Debug, Clone, Copy)]
pub struct Mid {
    /// Tokens of a tile.
    pub columns: u32,
    /// Sixty-fours of rows of a tile.
    pub groups: u32,
    /// Warpgroups that take turns along k.
    pub halves: u32,
    /// Blocks that share a tile along k.
    pub split: u32,
    /// Slots of 256 columns of codes.
    pub code_slots: u32,
    /// Slots of 64 columns of tokens.
    pub token_slots: u32,
    /// Microseconds of 64 columns of a tile, and of all that comes before and after (measured at k = 4096 and 14336).
    pub step_us: f64,
    /// See `step_us`.
    pub fixed_us: f64,
}

impl Mid {
    /// What it is called in a kernel's name.
    pub fn name(&self) -> String {
        format!("{}x{}_{}", self.columns, 64 * self.groups, self.split)
    }
}

/// All of them.
pub const MID: [Mid; 11] = [
    mid(16, [4, 1, 1], [3, 16], 0.330, 3.8),
    mid(16, [2, 1, 1], [4, 16], 0.202, 3.3),
    mid(16, [2, 1, 2], [4, 16], 0.208, 4.7),
    mid(16, [1, 2, 2], [6, 16], 0.110, 4.7),
    mid(32, [4, 1, 1], [3, 8], 0.409, 3.4),
    mid(32, [2, 1, 1], [4, 10], 0.230, 2.9),
    mid(32, [2, 1, 2], [4, 10], 0.229, 5.1),
    mid(32, [1, 2, 2], [6, 12], 0.125, 5.1),
    mid(64, [2, 1, 1], [4, 8], 0.274, 3.8),
    mid(64, [2, 1, 2], [3, 6], 0.292, 6.3),
    mid(64, [1, 2, 2], [6, 8], 0.160, 6.3),
];

const fn mid(columns: u32, [groups, halves, split]: [u32; 3], slots: [u32; 2], step_us: f64, fixed_us: f64) -> Mid {
    Mid { columns, groups, halves, split, code_slots: slots[0], token_slots: slots[1], step_us, fixed_us }
}

/// Template arguments of matmul4_broad.cu.
#[derive(Debug, Clone, Copy)]
pub struct Broad {
    /// Tokens of a tile.
    pub columns: u32,
    /// Slots of 128 columns of tokens.
    pub token_slots: u32,
    /// Microseconds of 64 columns of a tile on an H200.
    pub step_us: f64,
}

/// All of them.
pub const BROAD: [Broad; 2] =
    [Broad { columns: 32, token_slots: 2, step_us: 0.54 }, Broad { columns: 64, token_slots: 2, step_us: 0.70 }];

/// Types of the activations that they take, as kernels are named.
pub const TYPES: [&str; 2] = ["f16", "bf16"];
/// The same for the block scales.
pub const SCALES: [&str; 2] = ["plain", "nested"];
