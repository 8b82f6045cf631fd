//! Where an operation runs.

/// Where an operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// On this machine's processor, on so many threads, before the call returns.
    Cpu {
        /// Upper bound on the threads used; small tensors take one.
        threads: usize,
    },
    /// On a GPU, queued on a stream of it.
    Cuda {
        /// Ordinal of the device.
        device: usize,
        /// The raw `CUstream`; 0 is the legacy default stream.
        stream: u64,
    },
}
