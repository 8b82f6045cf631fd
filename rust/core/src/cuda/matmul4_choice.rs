//! Which kernel multiplies with a 4-bit weight on Hopper: the one rule (elsewhere: matmul4_elsewhere.rs). `None` means that the
//! caller dequantizes panels of the weight and multiplies with torch's own product.

use super::matmul4_elsewhere::broad_runs;
use super::product::{Product, mid_tiles, wide_tiles};
use super::runs::{Cost, Runs, Tiles};
use crate::matmul4::{PANELS, forced_name};
use crate::matmul4_instances::{BROAD, MID, SKINNY, STAGE, WIDE};

/// For `m` tokens and a weight of `n` x `k` on Hopper: the shortest of the estimates below.
pub fn on_hopper(m: usize, n: usize, k: usize, nested: bool, multiprocessors: usize) -> Option<Product> {
    if let Some(forced) = forced(m, n, k, nested, multiprocessors) {
        return forced;
    }
    if m <= 8 {
        return Some(Product::Skinny(skinny(m, n, k, nested, multiprocessors)));
    }
    let sixteen = (m <= 16)
        .then(|| (Some(Product::Skinny(skinny(m, n, k, nested, multiprocessors))), 3.6 + 0.34e-6 * (n * k) as f64));
    let others = (0..MID.len()).map(Product::Mid).chain((0..WIDE.len()).map(Product::Wide));
    let others = others
        .filter(|product| product.takes(m, n, k, nested, multiprocessors))
        .map(|product| (Some(product), microseconds(product, m, n, k, multiprocessors)));
    let panels = (None, panels_us(m, n, k));
    sixteen.into_iter().chain(others).fold(panels, |best, next| if next.1 < best.1 { next } else { best }).0
}

/// Instances of matmul4_skinny.cu. Where a warp need not take a second tile, the fewest warps that share one: those go through the
/// most columns between two meetings.
///
/// Measured on an H200, microseconds for 1 and 4 tokens:
///
/// | | 4096x4096 | 6144x4096 | 14336x4096 | 4096x14336 | 8192x8192 | 28672x8192 |
/// |---|---|---|---|---|---|---|
/// | small (8 warps a tile) | 6.3, 6.7 | 8.6, 9.2 | 15.1, 16.2 | 12.7, 13.7 | 14.5, 15.4 | 43.6, 46.4 |
/// | small4 | 6.2, 6.4 | 8.1, 8.6 | 14.4, 15.5 | 15.5, 17.2 | 14.2, 15.2 | 43.6, 46.3 |
/// | small2 | 8.6, 8.9 | 9.0, 9.3 | 14.2, 15.1 | 25.7, 28.0 | 18.1, 22.2 | 46.5, 49.2 |
/// | held | | | | | | 40.3, 41.7 |
/// | with nested scales, 1 token: small | 6.9 | | 16.7 | 14.3 | 16.2 | 47.4 |
/// | small4 | 6.9 | | 15.8 | 16.5 | 16.1 | 47.1 |
/// | small2 | 9.2 | | 15.5 | 26.6 | 18.2 | 49.5 |
/// | copied8 | 7.2 | | 18.4 | 15.5 | 17.4 | 48.6 |
/// | 8 tokens: copied8 | 6.3 | | 16.1 | 13.4 | 15.7 | 45.7 |
/// | copied4 | 8.8 | | 14.9 | 23.7 | 15.2 | 46.9 |
fn skinny(m: usize, n: usize, k: usize, nested: bool, multiprocessors: usize) -> usize {
    let (tiles, blocks) = (n.div_ceil(16), 2 * multiprocessors);
    let name = match m {
        9.. => "sixteen",
        _ if !nested && k.div_ceil(STAGE) == 32 && tiles > 6 * blocks => "held",
        5.. => {
            if tiles > blocks && (tiles <= 2 * blocks || k <= 4096) {
                "copied4"
            } else {
                "copied8"
            }
        }
        _ if tiles <= blocks => "small",
        _ if tiles <= 2 * blocks => "small4",
        _ if tiles <= 4 * blocks && k <= 4096 => "small2",
        _ if !nested && n * k >= 160 << 20 => "large",
        _ => "small4",
    };
    SKINNY.iter().position(|instance| instance.name == name).unwrap_or(0)
}

/// Bytes that `product` needs to meet the parts of tiles in.
pub fn workspace_size(product: Option<Product>, m: usize, n: usize, k: usize, multiprocessors: usize) -> usize {
    let sums = |columns: u32| 128 * columns as usize;
    match product {
        Some(Product::Broad(instance)) => {
            broad_runs(instance, m, n, k, multiprocessors, true).workspace_size(1, sums(BROAD[instance].columns))
        }
        Some(Product::Wide(instance)) => {
            wide_runs(instance, m, n, k, multiprocessors, true).workspace_size(2, sums(WIDE[instance].columns))
        }
        _ => 0,
    }
}

/// Microseconds on an H200: so many rounds of tiles, each of so many steps of 64 columns, and what comes before and after. The
/// constants were measured at k = 4096 and 14336.
fn microseconds(product: Product, m: usize, n: usize, k: usize, multiprocessors: usize) -> f64 {
    match product {
        Product::Mid(instance) => {
            let (shape, tiles) = (MID[instance], mid_tiles(instance, m, n));
            let split = shape.split as usize;
            let steps = (k.div_ceil(STAGE).div_ceil(split) * STAGE / 64) as f64;
            // With every multiprocessor at work, memory slows each by a tenth.
            let crowd = if tiles * split * 2 > multiprocessors { 1.1 } else { 1.0 };
            shape.fixed_us + tiles.div_ceil(multiprocessors / split) as f64 * steps * shape.step_us * crowd
        }
        Product::Wide(instance) => {
            let runs = wide_runs(instance, m, n, k, multiprocessors, true);
            5.5 + runs.microseconds(wide_shape(instance, m, n, k), wide_cost(instance))
        }
        _ => f64::INFINITY,
    }
}

/// Microseconds that clusters take to leave a part of a tile of 256 tokens in memory and to add it, with the other parts that a tile
/// of few steps has.
const PART_US: f64 = 5.0;

fn wide_cost(instance: usize) -> Cost {
    let shape = WIDE[instance];
    let slot_us = (STAGE / 64) as f64 * shape.step_us;
    Cost { slot_us, tile_us: shape.tile_us, part_us: PART_US * f64::from(shape.columns) / 256.0 }
}

fn wide_shape(instance: usize, m: usize, n: usize, k: usize) -> Tiles {
    Tiles { count: wide_tiles(instance, m, n), slots: k.div_ceil(STAGE) }
}

/// How an instance of matmul4_wgmma.cu deals out its tiles. Without a workspace they stay whole.
pub fn wide_runs(instance: usize, m: usize, n: usize, k: usize, multiprocessors: usize, workspace: bool) -> Runs {
    Runs::deal(wide_shape(instance, m, n, k), multiprocessors / 2, wide_cost(instance), workspace)
}

/// The same for panels: dequantization at 1.07 times its floor, then the product in 16 bits at 4 TB/s or 800 TFLOP/s.
fn panels_us(m: usize, n: usize, k: usize) -> f64 {
    let (m, n, k) = (m as f64, n as f64, k as f64);
    let dequantize = 2.0 + n * k * 2.5625 * 1.07 / 4.27e6;
    let product = (2.0 * (n * k + m * (n + k)) / 4e6).max(2.0 * m * n * k / 800e6);
    dequantize + 4.0 + product
}

pub fn by_name(name: &str) -> Option<Product> {
    Product::all().find(|product| product.name() == name)
}

/// What the kernels are called.
pub fn names() -> impl Iterator<Item = String> {
    Product::all().map(Product::name)
}

/// What `FEWBITS_MATMUL4` asks for, unless its kernel does not take the problem.
fn forced(m: usize, n: usize, k: usize, nested: bool, multiprocessors: usize) -> Option<Option<Product>> {
    let name = forced_name()?;
    if name == PANELS {
        return Some(None);
    }
    by_name(name).filter(|product| product.takes(m, n, k, nested, multiprocessors)).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_and_names_are_distinct() {
        let names: std::collections::HashSet<String> = Product::all().map(Product::name).collect();
        assert_eq!(names.len(), Product::COUNT);
        assert!(Product::all().map(Product::index).eq(0..Product::COUNT));
    }

    #[test]
    fn a_choice_takes_the_problem() {
        for (n, k) in [(1, 64), (300, 512), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (128_256, 8192)]
        {
            for m in [1, 2, 3, 8, 9, 16, 17, 64, 65, 128, 500, 4096, 100_000] {
                for (multiprocessors, nested) in [(16, false), (78, true), (132, false), (132, true)] {
                    let product = on_hopper(m, n, k, nested, multiprocessors);
                    assert!(
                        product.is_none_or(|p| p.takes(m, n, k, nested, multiprocessors)),
                        "{m} {n} {k}: {product:?}"
                    );
                    let few = m <= 64 && multiprocessors == 132;
                    assert!(!few || product.is_some(), "few tokens never need panels on the GPU measured: {m} {n} {k}");
                }
            }
        }
    }
}
