//! Sums of products of int8, exact in int32.

use super::tiles::ROWS;
use crate::cpu::Path;
#[cfg(target_arch = "x86_64")]
use crate::cpu::path::has_avx512_vnni;

/// Rows of the weight that a kernel takes.
pub const GROUP: usize = 4;

/// The most tokens that a kernel takes.
pub const MOST_TOKENS: usize = 6;

/// Adds the products of some tokens, rows of `a` that are `stride` apart, with rows `b`, over `depth` columns:
/// `sums[token * ROWS + row] += ...`, modulo 2^32.
pub type Kernel = unsafe fn(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32);

/// The kernels of a processor.
pub struct Kernels {
    /// `by_tokens[t]` takes `t + 1` tokens.
    pub by_tokens: [Kernel; MOST_TOKENS],
    /// What kernels add to each element of `b`: a token's sums begin at minus so much times the sum of its elements.
    pub offset: i32,
}

impl Kernels {
    /// Those that this processor runs, the fastest first.
    pub fn supported() -> impl Iterator<Item = &'static Self> {
        #[cfg(target_arch = "x86_64")]
        let of_path = |path: Path| match path {
            Path::Avx512Bf16 | Path::Avx512 => has_avx512_vnni().then_some(&VNNI),
            Path::Avx2 => Some(&AVX2),
            Path::Portable => Some(&PORTABLE),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let of_path = |_| Some(&PORTABLE);
        // Every processor of a path runs those of the paths after it.
        Path::ALL.into_iter().skip_while(|&path| path != Path::chosen()).filter_map(of_path)
    }

    /// Those in use.
    pub fn chosen() -> &'static Self {
        Self::supported().next().unwrap_or(&PORTABLE)
    }
}

/// A table of kernels, one for each number of tokens.
macro_rules! table {
    ($kernel:path, $offset:expr) => {{
        use $kernel as kernel;
        let by_tokens: [Kernel; MOST_TOKENS] =
            [kernel::<1>, kernel::<2>, kernel::<3>, kernel::<4>, kernel::<5>, kernel::<6>];
        Kernels { by_tokens, offset: $offset }
    }};
}

#[cfg(target_arch = "x86_64")]
static VNNI: Kernels = table!(super::vnni::kernel, super::vnni::OFFSET);
#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = table!(super::avx2::kernel, 0);
static PORTABLE: Kernels = table!(portable, 0);

#[inline(always)]
unsafe fn portable_body(
    tokens: usize,
    a: *const i8,
    stride: usize,
    b: [*const i8; GROUP],
    depth: usize,
    sums: *mut i32,
) {
    for token in 0..tokens {
        // SAFETY: the caller's rows hold `depth` elements, its sums all of these.
        unsafe {
            let a = std::slice::from_raw_parts(a.add(token * stride), depth);
            let [b, c, d, e] = b.map(|b| std::slice::from_raw_parts(b, depth));
            let mut totals = [0i32; GROUP];
            for i in 0..depth {
                let products = [b[i], c[i], d[i], e[i]].map(|weight| i32::from(a[i]) * i32::from(weight));
                (0..GROUP).for_each(|row| totals[row] += products[row]);
            }
            for (row, total) in totals.into_iter().enumerate() {
                let to = sums.add(token * ROWS + row);
                *to = (*to).wrapping_add(total);
            }
        }
    }
}

unsafe fn portable<const M: usize>(a: *const i8, stride: usize, b: [*const i8; GROUP], depth: usize, sums: *mut i32) {
    // SAFETY: the caller's promise, handed on.
    unsafe { portable_body(M, a, stride, b, depth, sums) }
}
