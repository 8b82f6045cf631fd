//! Which kernel multiplies with a 4-bit weight: the one rule. `None` means that the caller dequantizes panels of the weight and
//! multiplies with torch's own product.

use super::product::{MMA, Product, mid_tiles, wide_tiles};
use crate::matmul4::{PANELS, forced_name};
use crate::matmul4_instances::{MID, SKINNY, STAGE, WIDE};

/// For `m` tokens and a weight of `n` x `k` on Hopper: the shortest of the estimates below.
pub fn on_hopper(m: usize, n: usize, k: usize, multiprocessors: usize) -> Option<Product> {
    if let Some(forced) = forced(m, n, k, multiprocessors) {
        return forced;
    }
    if m <= 8 {
        return Some(Product::Skinny(skinny(m, n, k)));
    }
    let sixteen = (m <= 16).then(|| (Some(Product::Skinny(skinny(m, n, k))), 3.6 + 0.34e-6 * (n * k) as f64));
    let others = (0..MID.len()).map(Product::Mid).chain((0..WIDE.len()).map(Product::Wide));
    let others = others
        .filter(|product| product.takes(m, n, k, multiprocessors))
        .map(|product| (Some(product), microseconds(product, m, n, k, multiprocessors)));
    let panels = (None, panels_us(m, n, k));
    sixteen.into_iter().chain(others).fold(panels, |best, next| if next.1 < best.1 { next } else { best }).0
}

/// Where Hopper's kernels do not take the problem, with or without tensor cores.
pub fn elsewhere(m: usize, tensor_cores: bool) -> Option<Product> {
    let mma = (tensor_cores && m <= 8 * MMA).then(|| Product::Mma(m.div_ceil(8) - 1));
    match forced_name() {
        Some(PANELS) => None,
        Some("plain") => Some(Product::Plain),
        _ => mma.or_else(|| (m <= 8).then_some(Product::Plain)),
    }
}

/// Instances of matmul4_skinny.cu, measured on an H200 (times the floor, of the best two):
///
/// | tokens | 4096x4096 | 14336x4096 | 4096x14336 | 8192x8192 | 28672x8192 | 8192x28672 |
/// |---|---|---|---|---|---|---|
/// | 1 | small 2.8, held 2.9 | large 1.9, small 2.0 | small 1.7, large 2.0 | small 1.7, held 1.7 | held 1.3, large 1.4 | large 1.2, small 1.4 |
/// | 8 | copied8 2.8, copied4 3.0 | copied4 1.9, copied8 2.0 | copied8 1.7, copied4 2.0 | copied 1.7, held 1.9 | held 1.3, copied8 1.4 | copied8 1.4, copied4 1.4 |
fn skinny(m: usize, n: usize, k: usize) -> usize {
    let name = match m {
        9.. => "sixteen",
        _ if k.div_ceil(STAGE) == 32 && n >= 16384 => "held",
        3.. if n > 8192 && k <= 4096 => "copied4",
        3.. => "copied8",
        _ if n * k >= 160 << 20 => "large",
        _ => "small",
    };
    SKINNY.iter().position(|instance| instance.name == name).unwrap_or(0)
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
            let rounds = wide_tiles(instance, m, n).div_ceil(multiprocessors / 2) as f64;
            4.0 + rounds * (WIDE[instance].tile_us + WIDE[instance].step_us * k.div_ceil(64) as f64)
        }
        _ => f64::INFINITY,
    }
}

/// The same for panels: dequantization at 1.07 times its floor, then the product in 16 bits at 4 TB/s or 770 TFLOP/s.
fn panels_us(m: usize, n: usize, k: usize) -> f64 {
    let (m, n, k) = (m as f64, n as f64, k as f64);
    let dequantize = 2.0 + n * k * 2.5625 * 1.07 / 4.27e6;
    let product = (2.0 * (n * k + m * (n + k)) / 4e6).max(2.0 * m * n * k / 770e6);
    dequantize + 4.0 + product
}

fn by_name(name: &str) -> Option<Product> {
    Product::all().find(|product| product.name() == name)
}

/// What the kernels are called.
pub fn names() -> impl Iterator<Item = String> {
    Product::all().map(Product::name)
}

/// What `FEWBITS_MATMUL4` asks for, unless its kernel does not take the problem.
fn forced(m: usize, n: usize, k: usize, multiprocessors: usize) -> Option<Option<Product>> {
    let name = forced_name()?;
    if name == PANELS {
        return Some(None);
    }
    by_name(name).filter(|product| product.takes(m, n, k, multiprocessors)).map(Some)
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
                for multiprocessors in [16, 78, 132] {
                    let product = on_hopper(m, n, k, multiprocessors);
                    assert!(product.is_none_or(|p| p.takes(m, n, k, multiprocessors)), "{m} {n} {k}: {product:?}");
                    let few = m <= 64 && multiprocessors == 132;
                    assert!(!few || product.is_some(), "few tokens never need panels on the GPU measured: {m} {n} {k}");
                }
            }
        }
    }
}
