//! The kernels that multiply int8, and which of them does: the one rule.

use std::sync::OnceLock;

use super::runs::{Cost, Runs, Tiles};
use crate::{Error, Result};

/// A kernel that multiplies int8, or one of its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int8Product {
    /// int8_plain.cu
    Plain,
    /// int8_mma.cu, tiles of 16 rows
    Mma16,
    /// int8_mma.cu, tiles of 128 rows
    Mma128,
    /// int8_skinny.cu, which quantizes up to 8 rows itself
    SkinnyOwn,
    /// int8_skinny.cu, up to 8 quantized rows, of few enough columns to be kept
    SkinnyKept8,
    /// int8_skinny.cu, the same of 16
    SkinnyKept16,
    /// int8_skinny.cu, up to 8 quantized rows of any length
    Skinny8,
    /// int8_skinny.cu, up to 16 quantized rows
    Skinny16,
    /// int8_skinny.cu, up to 32 quantized rows
    Skinny32,
    /// int8_wgmma.cu, tiles of 64 rows
    Wide64,
    /// int8_wgmma.cu, tiles of 128 rows
    Wide128,
    /// int8_wgmma.cu, tiles of 256 rows
    Wide256,
}

/// Which outlier columns a launch of int8_wgmma.cu does something for, where 16-bit tensor cores help with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outliers {
    /// However many they are
    Both,
    /// Few
    Few,
    /// Many
    Many,
}

impl Outliers {
    /// What they are called in the kernels' names.
    pub const NAMES: [&str; 3] = ["both", "few", "many"];
}

/// Columns of a slot of int8_wgmma.cu.
const SLOT: usize = 128;

/// Bytes of shared memory for the codes of rows that int8_skinny.cu keeps, and columns of its stages.
const KEPT_BYTES: usize = 64 * 1024;
const KEPT_STAGE: usize = 256;
/// Codes that a block of it quantizes sooner than another launch does for all.
const FEW_CODES: usize = 16 * 1024;

impl Int8Product {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Plain,
        Self::Mma16,
        Self::Mma128,
        Self::SkinnyOwn,
        Self::SkinnyKept8,
        Self::SkinnyKept16,
        Self::Skinny8,
        Self::Skinny16,
        Self::Skinny32,
        Self::Wide64,
        Self::Wide128,
        Self::Wide256,
    ];

    /// What it is called in the kernels' names and in `FEWBITS_INT8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Mma16 => "mma_16",
            Self::Mma128 => "mma_128",
            Self::SkinnyOwn => "skinny_own",
            Self::SkinnyKept8 => "skinny_kept_8",
            Self::SkinnyKept16 => "skinny_kept_16",
            Self::Skinny8 => "skinny_8",
            Self::Skinny16 => "skinny_16",
            Self::Skinny32 => "skinny_32",
            Self::Wide64 => "wide_64",
            Self::Wide128 => "wide_128",
            Self::Wide256 => "wide_256",
        }
    }

    /// Its file, without the ending.
    pub fn family(self) -> &'static str {
        match self {
            Self::Plain => "int8_plain",
            Self::Mma16 | Self::Mma128 => "int8_mma",
            Self::SkinnyOwn
            | Self::SkinnyKept8
            | Self::SkinnyKept16
            | Self::Skinny8
            | Self::Skinny16
            | Self::Skinny32 => "int8_skinny",
            Self::Wide64 | Self::Wide128 | Self::Wide256 => "int8_wgmma",
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> u32 {
        if self.columns().is_some() { 384 } else { 256 }
    }

    /// Bytes of shared memory that a launch asks for.
    pub fn shared_bytes(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Mma16 => 3 * (16 + 128) * 64,
            Self::Mma128 => 3 * (128 + 128) * 64,
            // No more than they need: a block of the next launch, which quantizes rows, finds room beside them.
            Self::SkinnyOwn => 210 * 1024,
            Self::SkinnyKept8 => 203 * 1024,
            Self::SkinnyKept16 => 214 * 1024,
            _ => 227 * 1024,
        }
    }

    /// Rows of A in a tile of an instance of int8_wgmma.cu.
    pub fn columns(self) -> Option<usize> {
        match self {
            Self::Wide64 => Some(64),
            Self::Wide128 => Some(128),
            Self::Wide256 => Some(256),
            _ => None,
        }
    }

    /// Whether it keeps codes of rows that the launch before it quantizes meanwhile.
    pub fn keeps_rows(self) -> bool {
        matches!(self, Self::SkinnyKept8 | Self::SkinnyKept16)
    }

    /// Whether the copy engine must be able to read the operands.
    pub fn needs_copy_engine(self) -> bool {
        !matches!(self, Self::Plain | Self::Mma16 | Self::Mma128)
    }

    /// Whether it takes `m` rows of `k` columns, alignment apart.
    pub fn takes(self, m: usize, k: usize) -> bool {
        match self {
            Self::SkinnyOwn => m <= 8 && m.next_power_of_two() * k.next_multiple_of(KEPT_STAGE) <= KEPT_BYTES,
            Self::SkinnyKept8 => m <= 8 && 8 * k.next_multiple_of(KEPT_STAGE) <= KEPT_BYTES,
            Self::SkinnyKept16 => m <= 16 && 16 * k.next_multiple_of(KEPT_STAGE) <= KEPT_BYTES,
            Self::Skinny8 => m <= 8,
            Self::Skinny16 => m <= 16,
            Self::Skinny32 => m <= 32,
            _ => true,
        }
    }

    /// What an instance of int8_wgmma.cu takes on an H200: a slot of 128 rows of W is read in 0.5; tiles of 128 by 256 took 0.70 a slot
    /// and 4.2 an end in a first form. The choices that follow were the best of the measured ones, within 6 %.
    fn cost(self) -> Cost {
        match self {
            Self::Wide64 => Cost { slot_us: 0.50, tile_us: 1.5, part_us: 1.5 },
            Self::Wide128 => Cost { slot_us: 0.52, tile_us: 2.0, part_us: 2.5 },
            _ => Cost { slot_us: 0.70, tile_us: 3.0, part_us: 5.0 },
        }
    }

    fn tiles(self, m: usize, n: usize, k: usize) -> Tiles {
        let columns = self.columns().unwrap_or(256);
        Tiles { count: n.div_ceil(256) * m.div_ceil(columns), slots: k.div_ceil(SLOT) }
    }

    /// How an instance of int8_wgmma.cu deals out its tiles.
    pub fn runs(self, m: usize, n: usize, k: usize, multiprocessors: usize, workspace: bool) -> Runs {
        Runs::deal(self.tiles(m, n, k), multiprocessors / 2, self.cost(), workspace)
    }

    /// The launches of an instance of int8_wgmma.cu where there is a mask: one for few columns and one for many gain 2 to 7 %, and take
    /// 4 us. Measured at 64 to 200 us.
    pub fn outlier_launches(self, m: usize, n: usize, k: usize, runs: Runs) -> &'static [Outliers] {
        let long = runs.microseconds(self.tiles(m, n, k), self.cost()) > 100.0;
        if self == Self::Wide256 && long { &[Outliers::Few, Outliers::Many] } else { &[Outliers::Both] }
    }

    /// Bytes that it needs for that.
    pub fn workspace_size(self, m: usize, n: usize, k: usize, multiprocessors: usize) -> usize {
        self.columns().map_or(0, |columns| self.runs(m, n, k, multiprocessors, true).workspace_size(2, 128 * columns))
    }
}

/// What a choice depends on besides sizes.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    pub multiprocessors: usize,
    /// Compute capability 7.5 or later.
    pub tensor_cores: bool,
    /// Hopper, and operands that its copy engine can read.
    pub copy_engine: bool,
    /// Rows that are not quantized yet and whose vectors are aligned.
    pub own_rows: bool,
    /// There is memory in which parts of tiles can meet.
    pub workspace: bool,
}

/// The rule. On Hopper; microseconds on an H200, bfloat16, threshold 6, quantization of the rows included:
///
/// | rows | kernel | 4096 x 4096 | 8192 x 8192 | 14336 x 4096 | else |
/// |---|---|---|---|---|---|
/// | 1, 2, 4, few codes | `skinny_own`: one launch | 8.0, 8.1, 9.7 | 20.2, 20.3 | 18.4, 18.3, 19.0 | `skinny_kept_8`: 10.4, 22.2, 20.6 for 4 |
/// | to 8, few enough columns | `skinny_kept_8` | 10.9 | 22.9 (4), 23.3 | 21.2 | `skinny_8`: 13.3, 24.5, 23.6 |
/// | 16, the same | `skinny_kept_16` | 12.0 | | 23.6 | `skinny_16`: 13.6, 27.0, 23.8 |
/// | 8, 16, else | `skinny_8`, `skinny_16` | | 27.0 (16) | | `wide_64`: 17.5, 34.5, 27.3 |
/// | 32 | `skinny_32` | 14.2 | 29.6 | 27.2 | `wide_64`: 17.8, 34.5, 28.0 |
/// | more | the shortest estimate of `wide_64`, `wide_128`, `wide_256` | | | | |
///
/// Elsewhere, and where rows do not start on 16 bytes: `plain` up to 4 rows, `mma_16` up to 16, `mma_128`; `plain` before compute
/// capability 7.5.
pub fn choose(m: usize, n: usize, k: usize, at: Circumstances) -> Result<Int8Product> {
    let takes = |product: Int8Product| {
        let runs = match product {
            Int8Product::Plain => true,
            Int8Product::SkinnyOwn => at.copy_engine && at.own_rows,
            _ if product.needs_copy_engine() => at.copy_engine,
            _ => at.tensor_cores,
        };
        runs && product.takes(m, k)
    };
    if let Some(product) = forced()?.filter(|&product| takes(product)) {
        return Ok(product);
    }
    let estimate = |product: Int8Product| {
        product.runs(m, n, k, at.multiprocessors, at.workspace).microseconds(product.tiles(m, n, k), product.cost())
    };
    Ok(if at.copy_engine {
        match m {
            ..=8 if takes(Int8Product::SkinnyOwn) && m * k <= FEW_CODES => Int8Product::SkinnyOwn,
            ..=8 if takes(Int8Product::SkinnyKept8) => Int8Product::SkinnyKept8,
            ..=4 if takes(Int8Product::SkinnyOwn) => Int8Product::SkinnyOwn,
            ..=8 => Int8Product::Skinny8,
            9..=16 if takes(Int8Product::SkinnyKept16) => Int8Product::SkinnyKept16,
            9..=16 => Int8Product::Skinny16,
            17..=32 => Int8Product::Skinny32,
            _ => {
                let others = [Int8Product::Wide64, Int8Product::Wide128];
                others.into_iter().fold(
                    Int8Product::Wide256,
                    |best, next| {
                        if estimate(next) < estimate(best) { next } else { best }
                    },
                )
            }
        }
    } else {
        match m {
            _ if !at.tensor_cores => Int8Product::Plain,
            ..=4 => Int8Product::Plain,
            5..=16 => Int8Product::Mma16,
            _ => Int8Product::Mma128,
        }
    })
}

/// What the environment variable `FEWBITS_INT8`, read once, asks for; where its kernel does not take the problem the rule decides.
fn forced() -> Result<Option<Int8Product>> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    let Some(name) = NAME.get_or_init(|| std::env::var("FEWBITS_INT8").ok()).as_deref() else { return Ok(None) };
    let found = Int8Product::ALL.into_iter().find(|product| product.name() == name);
    let names = || Int8Product::ALL.map(Int8Product::name).join(", ");
    found.map(Some).ok_or_else(|| Error::argument("FEWBITS_INT8", name, format!("one of {}", names())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_takes_the_problem() {
        for (n, k) in [(1, 16), (300, 512), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (128_256, 8192)] {
            for m in [1, 2, 4, 5, 8, 9, 16, 17, 64, 65, 128, 512, 2048, 100_000] {
                for bits in 0..8 {
                    let [tensor_cores, copy_engine, own_rows] = [bits & 1 > 0, bits & 3 == 3, bits & 4 > 0];
                    let at = Circumstances {
                        multiprocessors: 132,
                        tensor_cores,
                        copy_engine,
                        own_rows,
                        workspace: own_rows,
                    };
                    let product = choose(m, n, k, at).unwrap();
                    assert!(product.takes(m, k), "{m} {n} {k}: {product:?}");
                    assert!(copy_engine || !product.needs_copy_engine());
                    assert!(tensor_cores || product == Int8Product::Plain);
                }
            }
        }
    }
}
