//! Which instruction set the loops use.

use std::sync::OnceLock;

/// An instruction set for which the loops are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// AVX-512 F, BW, DQ and VL, and its dot products of bfloat16.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// What every processor of the target has (SSE2 on x86-64, NEON on 64-bit Arm).
    Portable,
}

impl Path {
    /// All paths, the widest first.
    pub const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// As `FEWBITS_SIMD` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this processor runs it.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Self::Avx512Bf16 => Self::Avx512.is_supported() && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.is_supported()
            }
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// Whether it has the 512-bit instructions.
    pub fn is_avx512(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Avx512)
    }

    /// The path in use: the one that the environment variable `FEWBITS_SIMD` names, where the processor runs it, else the widest
    /// that it runs. Read once.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Path> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let wanted = std::env::var("FEWBITS_SIMD").unwrap_or_default();
            let mut supported = Self::ALL.into_iter().filter(|path| path.is_supported());
            supported.clone().find(|path| path.name() == wanted).or_else(|| supported.next()).unwrap_or(Self::Portable)
        })
    }
}

/// Whether this processor adds four products of bytes to a lane of 512-bit vectors at once.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

/// Whether this processor multiplies tiles of bfloat16 (AMX), as torch's own products do there.
pub fn has_amx_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // Safe from Rust 1.94 on.
        #[allow(unused_unsafe)]
        // SAFETY: every x86-64 processor has CPUID; leaf 7 is asked for where there is one.
        unsafe {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 22 & 1 == 1
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Names of the vector extensions that this processor reports, for diagnostics.
pub fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut found = vec!["sse2"];
        macro_rules! probe {
            ($($name:tt),*) => { $(if is_x86_feature_detected!($name) { found.push($name); })* };
        }
        probe!("avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16");
        found
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// Defines `$name`, which runs `$body` compiled for the chosen path.
///
/// Arguments are the body's; generic parameters are written once, in brackets.
macro_rules! multiversion {
    ($(#[$attribute:meta])* $visibility:vis unsafe fn $name:ident [$($generic:tt)*] [$($parameter:ident),*] ($($argument:ident: $type:ty),* $(,)?) => $body:path) => {
        $(#[$attribute])*
        $visibility unsafe fn $name<$($generic)*>($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2")]
                unsafe fn avx512<$($generic)*>($($argument: $type),*) {
                    // SAFETY: the caller's promise, handed on.
                    unsafe { $body($($argument),*) }
                }
                #[target_feature(enable = "avx2")]
                unsafe fn avx2<$($generic)*>($($argument: $type),*) {
                    // SAFETY: the caller's promise, handed on.
                    unsafe { $body($($argument),*) }
                }
                match $crate::cpu::Path::chosen() {
                    // SAFETY: this path is chosen only where the processor has AVX-512; the rest is the caller's promise.
                    $crate::cpu::Path::Avx512Bf16 | $crate::cpu::Path::Avx512 => return unsafe { avx512::<$($parameter),*>($($argument),*) },
                    // SAFETY: this path is chosen only where the processor has AVX2; the rest is the caller's promise.
                    $crate::cpu::Path::Avx2 => return unsafe { avx2::<$($parameter),*>($($argument),*) },
                    $crate::cpu::Path::Portable => {}
                }
            }
            // SAFETY: the caller's promise, handed on.
            unsafe { $body($($argument),*) }
        }
    };
}
pub(crate) use multiversion;
