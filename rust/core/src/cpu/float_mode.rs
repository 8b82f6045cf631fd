//! The processor's floating-point mode: subnormal numbers count here, whatever the calling program has set.

/// Sets the default mode (round to nearest, subnormals kept) and puts the former one back when dropped.
pub struct DefaultFloatMode {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    former: u64,
}

impl DefaultFloatMode {
    pub fn enter() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let mut former = 0u32;
            let default = 0x1f80u32;
            // SAFETY: both instructions touch MXCSR and one u32 of ours; 0x1f80 is the architecture's initial value.
            unsafe {
                std::arch::asm!("stmxcsr [{}]", in(reg) &mut former, options(nostack, preserves_flags));
                std::arch::asm!("ldmxcsr [{}]", in(reg) &default, options(nostack, readonly, preserves_flags));
            }
            Self { former: u64::from(former) }
        }
        #[cfg(target_arch = "aarch64")]
        {
            let former: u64;
            // SAFETY: FPCR holds modes only; 0 is its initial value.
            unsafe {
                std::arch::asm!("mrs {}, fpcr", out(reg) former, options(nomem, nostack));
                std::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nomem, nostack));
            }
            Self { former }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            Self {}
        }
    }
}

impl Drop for DefaultFloatMode {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            let former = self.former as u32;
            // SAFETY: puts back what `enter` read.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &former, options(nostack, readonly, preserves_flags)) };
        }
        #[cfg(target_arch = "aarch64")]
        {
            // SAFETY: puts back what `enter` read.
            unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.former, options(nomem, nostack)) };
        }
    }
}
