//! The operations on this machine's processor.
//!
//! One body an operation, compiled once for each instruction set and chosen at run time ([`path`]): the compiler vectorizes the
//! same source, so every path gives the same bytes. Where it cannot (look-ups), a path has kernels of its own
//! ([`avx512`], [`avx512_code256`], [`avx512_planes`], [`table_lookup`]). Products ([`matmul4`]) alone round in an order of each path's own.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_code256;
#[cfg(target_arch = "x86_64")]
mod avx512_planes;
mod buffer;
mod crew;
#[cfg(target_arch = "x86_64")]
mod decades;
pub mod dequantize;
mod element;
mod float_mode;
pub(crate) mod int8;
pub mod matmul4;
pub(crate) mod optim;
mod optim_block;
mod optim_coefficients;
mod optim_families;
pub(crate) mod optim_norms;
mod optim_rules;
mod optim_table;
mod pages;
pub mod panel;
pub mod path;
mod philox;
mod pool;
pub mod quantize;
mod table_lookup;
#[cfg(test)]
mod tests;

pub use path::Path;

/// The 256 values of a code at an address, or `None` for address 0.
///
/// # Safety
/// A non-zero address holds 256 float32.
pub(crate) unsafe fn code_values(address: u64) -> Option<[f32; 256]> {
    let pointer = address as *const [f32; 256];
    // SAFETY: the caller promises 256 float32 there; read_unaligned asks no more of the address.
    (!pointer.is_null()).then(|| unsafe { pointer.read_unaligned() })
}
