//! Which kernel multiplies with a 4-bit weight where Hopper's own do not: on other tensor cores, or on none. `None` means panels.

use super::matmul4_choice::by_name;
use super::product::{MMA, Product, broad_tiles};
use super::runs::{Cost, Runs, Tiles};
use crate::matmul4::{PANELS, forced_name};
use crate::matmul4_instances::{BROAD, Broad, STAGE};

/// Tensor cores beside Hopper's own kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cores {
    /// None, or none that take the problem.
    None,
    /// Beside memory of 3 TB/s and more: compute capability 9.0 and 10.x.
    FastMemory,
    /// Beside slower memory.
    SlowMemory,
}

impl Cores {
    /// Tokens up to which matmul4_broad.cu is faster than panels, which move eight times the bytes. Measured on an H200, microseconds
    /// for 17, 64, 128 and 256 tokens:
    ///
    /// | | 4096x4096 | 14336x4096 | 8192x8192 |
    /// |---|---|---|---|
    /// | matmul4_broad.cu | 17, 21, 30, 45 | 36, 46, 80, 151 | 39, 49, 87, 165 |
    /// | panels | 25, 24, 28, 30 | 81, 82, 88, 95 | 95, 99, 102, 116 |
    ///
    /// With 1 to 2 TB/s panels take more than twice as long, the kernel hardly longer: by that, not measured, 256 there.
    const fn broad_most(self) -> usize {
        match self {
            Self::None => 0,
            Self::FastMemory => 128,
            Self::SlowMemory => 256,
        }
    }
}

/// For `m` tokens and a weight of `n` x `k`.
pub fn elsewhere(m: usize, n: usize, k: usize, cores: Cores, multiprocessors: usize) -> Option<Product> {
    let tensor_cores = cores != Cores::None;
    match forced_name() {
        Some(PANELS) => None,
        Some("plain") => Some(Product::Plain),
        Some(name) if tensor_cores && name.starts_with("broad_") => by_name(name),
        _ if tensor_cores && m <= 8 * MMA => Some(Product::Mma(m.div_ceil(8) - 1)),
        _ if m <= cores.broad_most() => Some(Product::Broad(broad(m, n, k, multiprocessors))),
        _ => (m <= 8).then_some(Product::Plain),
    }
}

/// The instance of matmul4_broad.cu that takes the least time.
fn broad(m: usize, n: usize, k: usize, multiprocessors: usize) -> usize {
    let microseconds = |&instance: &usize| {
        let runs = broad_runs(instance, m, n, k, multiprocessors, true);
        runs.microseconds(broad_shape(instance, m, n, k), broad_cost(instance))
    };
    (0..BROAD.len()).min_by(|a, b| microseconds(a).total_cmp(&microseconds(b))).unwrap_or(0)
}

fn broad_cost(instance: usize) -> Cost {
    let Broad { columns, step_us, .. } = BROAD[instance];
    Cost { slot_us: (STAGE / 64) as f64 * step_us, tile_us: 2.0, part_us: 3.0 * f64::from(columns) / 64.0 }
}

fn broad_shape(instance: usize, m: usize, n: usize, k: usize) -> Tiles {
    Tiles { count: broad_tiles(instance, m, n), slots: k.div_ceil(STAGE) }
}

/// How an instance of matmul4_broad.cu deals out its tiles. Without a workspace they stay whole.
pub fn broad_runs(instance: usize, m: usize, n: usize, k: usize, multiprocessors: usize, workspace: bool) -> Runs {
    Runs::deal(broad_shape(instance, m, n, k), multiprocessors, broad_cost(instance), workspace)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::matmul4_choice::workspace_size;

    #[test]
    fn a_choice_takes_the_problem() {
        for m in [1, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 256, 257] {
            for (n, k) in [(1, 64), (300, 512), (4096, 11008), (128_256, 8192)] {
                let product = |cores| elsewhere(m, n, k, cores, 108);
                assert_eq!(product(Cores::None), (m <= 8).then_some(Product::Plain));
                for (cores, most) in [(Cores::FastMemory, 128), (Cores::SlowMemory, 256)] {
                    match product(cores) {
                        Some(Product::Mma(_)) => assert!(m <= 16),
                        Some(Product::Broad(_)) => assert!(m > 16 && m <= most),
                        other => assert!(other.is_none() && m > most),
                    }
                    let size = workspace_size(product(cores), m, n, k, 108);
                    assert!(size <= 108 * (64 + 4 * 128 * 64), "{m} {n} {k}: {size}");
                }
            }
        }
    }
}
