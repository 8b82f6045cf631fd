//! Which kernel multiplies with a 4-bit weight: the one rule.

use std::sync::OnceLock;

use crate::matmul4_instances::{MID, SKINNY, STAGE, Tokens, WIDE};
use crate::{Error, Result};

/// A way to multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// matmul4_plain.cu.
    Plain,
    /// matmul4_mma.cu.
    Mma,
    /// An instance of matmul4_skinny.cu.
    Skinny(usize),
    /// An instance of matmul4_mid.cu.
    Mid(usize),
    /// An instance of matmul4_wgmma.cu.
    Wide(usize),
    /// The caller dequantizes panels and multiplies with torch's own product.
    Panels,
}

/// The path for `m` tokens and a weight of `n` x `k` on Hopper.
pub fn on_hopper(m: usize, n: usize, k: usize, multiprocessors: usize) -> Path {
    if let Some(path) = forced(m, n, k, multiprocessors) {
        return path;
    }
    if m <= 8 {
        return Path::Skinny(skinny(m, n, k));
    }
    let sixteen = (m <= 16).then(|| (Path::Skinny(skinny(m, n, k)), 3.6 + 0.34e-6 * (n * k) as f64));
    let mid = (0..MID.len()).filter_map(|i| Some((Path::Mid(i), mid_us(i, m, n, k, multiprocessors)?)));
    let wide = (0..WIDE.len()).map(|i| (Path::Wide(i), wide_us(i, m, n, k, multiprocessors)));
    let candidates = sixteen.into_iter().chain(mid).chain(wide).chain([(Path::Panels, panels_us(m, n, k))]);
    candidates.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(Path::Panels, |(path, _)| path)
}

/// The path where Hopper's kernels do not take the problem, with or without tensor cores.
pub fn elsewhere(m: usize, tensor_cores: bool) -> Path {
    match forced_name() {
        Some("panels") => Path::Panels,
        Some("plain") => Path::Plain,
        _ if tensor_cores && m <= 16 => Path::Mma,
        _ if m <= 8 => Path::Plain,
        _ => Path::Panels,
    }
}

/// Tiles of an instance of matmul4_mid.cu.
pub fn mid_tiles(instance: usize, m: usize, n: usize) -> usize {
    n.div_ceil(64 * MID[instance].groups as usize) * m.div_ceil(MID[instance].columns as usize)
}

/// Microseconds of matmul4_mid.cu on an H200, or `None` where it does not take the problem: blocks that share a tile have only one.
fn mid_us(instance: usize, m: usize, n: usize, k: usize, multiprocessors: usize) -> Option<f64> {
    let shape = MID[instance];
    let (tiles, split) = (mid_tiles(instance, m, n), shape.split as usize);
    let places = multiprocessors / split;
    if split > 1 && tiles > places {
        return None;
    }
    let steps = (k.div_ceil(STAGE).div_ceil(split) * STAGE / 64) as f64;
    // With every multiprocessor at work, memory slows each by a tenth.
    let crowd = if tiles * split * 2 > multiprocessors { 1.1 } else { 1.0 };
    Some(shape.fixed_us + tiles.div_ceil(places) as f64 * steps * shape.step_us * crowd)
}

/// Instances of matmul4_skinny.cu, measured on an H200 (times the floor, of the best two):
///
/// | tokens | 4096x4096 | 14336x4096 | 4096x14336 | 8192x8192 | 28672x8192 | 8192x28672 |
/// |---|---|---|---|---|---|---|
/// | 1 | small 2.8, held 2.9 | large 1.9, small 2.0 | small 1.7, large 2.0 | small 1.7, held 1.7 | held 1.3, large 1.4 | large 1.2, small 1.4 |
/// | 8 | copied8 2.8, copied4 3.0 | copied4 1.9, copied8 2.0 | copied8 1.7, copied4 2.0 | copied 1.7, held 1.9 | held 1.3, copied8 1.4 | copied8 1.4, copied4 1.4 |
fn skinny(m: usize, n: usize, k: usize) -> usize {
    let held = k > (STAGE * 31) && k.div_ceil(STAGE) == 32;
    let name = match m {
        9.. => "sixteen",
        _ if held && n >= 16384 => "held",
        3.. if n > 8192 && k <= 4096 => "copied4",
        3.. => "copied8",
        _ if n * k >= 160 << 20 => "large",
        _ => "small",
    };
    by_name(name).unwrap_or(0)
}

fn by_name(name: &str) -> Option<usize> {
    SKINNY.iter().position(|instance| instance.name == name)
}

/// Microseconds of matmul4_wgmma.cu on an H200: so many rounds of tiles, each of so many steps of 64 columns, and what comes before
/// and after. Measured at k = 4096 and 14336.
fn wide_us(instance: usize, m: usize, n: usize, k: usize, multiprocessors: usize) -> f64 {
    let (step, tile) = [(0.42, 1.0), (0.466, 1.5), (0.725, 2.0)][instance];
    let tiles = n.div_ceil(256) * m.div_ceil(WIDE[instance].columns as usize);
    let rounds = tiles.div_ceil(multiprocessors / 2) as f64;
    4.0 + rounds * (tile + step * k.div_ceil(64) as f64)
}

/// The same for panels: dequantization at 1.07 times its floor, then the product in 16 bits at 4 TB/s or 770 TFLOP/s.
fn panels_us(m: usize, n: usize, k: usize) -> f64 {
    let (m, n, k) = (m as f64, n as f64, k as f64);
    let dequantize = 2.0 + n * k * 2.5625 * 1.07 / 4.27e6;
    let product = (2.0 * (n * k + m * (n + k)) / 4e6).max(2.0 * m * n * k / 770e6);
    dequantize + 4.0 + product
}

/// The environment variable `FEWBITS_MATMUL4`, read once.
fn forced_name() -> Option<&'static str> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    NAME.get_or_init(|| std::env::var("FEWBITS_MATMUL4").ok()).as_deref()
}

/// The names that `FEWBITS_MATMUL4` may have.
fn names() -> Vec<String> {
    let fixed = ["panels", "plain", "mma"].map(String::from);
    let skinny = SKINNY.iter().map(|instance| instance.name.to_string());
    let mid = MID.iter().map(|instance| format!("mid{}", instance.name()));
    let wide = WIDE.iter().map(|instance| format!("wide{}", instance.columns));
    fixed.into_iter().chain(skinny).chain(mid).chain(wide).collect()
}

/// Raises unless `FEWBITS_MATMUL4` is absent or names a path.
pub fn check_forced() -> Result<()> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let Some(name) = forced_name() else { return Ok(()) };
    if *KNOWN.get_or_init(|| names().iter().any(|known| known == name)) {
        return Ok(());
    }
    Err(Error::argument("FEWBITS_MATMUL4", name, format!("one of {}", names().join(", "))))
}

/// The path that `FEWBITS_MATMUL4` names, or `None` where its kernel does not take the problem.
fn forced(m: usize, n: usize, k: usize, multiprocessors: usize) -> Option<Path> {
    let name = forced_name()?;
    match name {
        "panels" => return Some(Path::Panels),
        "plain" => return Some(Path::Plain),
        "mma" => return (m <= 16).then_some(Path::Mma),
        _ => {}
    }
    if let Some(instance) = WIDE.iter().position(|wide| name == format!("wide{}", wide.columns)) {
        return Some(Path::Wide(instance));
    }
    if let Some(instance) = MID.iter().position(|mid| name == format!("mid{}", mid.name())) {
        return mid_us(instance, m, n, k, multiprocessors).map(|_| Path::Mid(instance));
    }
    let instance = by_name(name)?;
    let shape = SKINNY[instance];
    let held = match shape.tokens {
        Tokens::Held(stages) => k.div_ceil(STAGE) == (stages * shape.split) as usize,
        _ => true,
    };
    (m <= 8 * shape.eights as usize && held).then_some(Path::Skinny(instance))
}
