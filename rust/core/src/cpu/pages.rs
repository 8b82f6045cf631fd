//! Asks for huge pages under a large result: where its memory is fresh, page faults are most of the time.

/// Advises the system that the `bytes` at `address` are about to be written from end to end. Only a hint; its failure costs nothing.
pub fn advise_huge(address: u64, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let start = (address as usize).next_multiple_of(HUGE);
        let end = (address as usize + bytes) / HUGE * HUGE;
        if end > start {
            // SAFETY: the range lies inside memory that the caller lent for writing, and MADV_HUGEPAGE changes no contents.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (address, bytes);
    }
}
