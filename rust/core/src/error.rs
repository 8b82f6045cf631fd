//! Everything that can go wrong, in the words that the user reads.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that no operation accepts.
    #[error("{argument}: got {got}, expected {expected}")]
    Argument {
        /// Name of the argument.
        argument: &'static str,
        /// What was passed.
        got: String,
        /// What is accepted.
        expected: String,
    },
    /// An index that names no row.
    #[error("indices: got {row} at place {place}, expected 0 to {} for a weight of {rows} rows", *rows as i64 - 1)]
    Index {
        /// The index.
        row: i64,
        /// Where it stands.
        place: usize,
        /// How many rows there are.
        rows: usize,
    },
    /// No CUDA driver on this machine.
    #[error("no CUDA driver found (libcuda.so.1 or nvcuda.dll): CUDA tensors need NVIDIA's driver 525 or newer")]
    NoDriver,
    /// A driver from before CUDA 12.
    #[error("the CUDA driver is too old: it supports CUDA {major}.{minor}, fewbits needs 12.0 (driver 525) or newer")]
    OldDriver {
        /// Version of CUDA that the driver supports.
        major: i32,
        /// Its minor part.
        minor: i32,
    },
    /// This build carries no kernels.
    #[error(
        "this build of fewbits has no CUDA kernels (it was built without NVRTC): use CPU tensors or install a CUDA build"
    )]
    NoKernels,
    /// No embedded image runs on this GPU.
    #[error("{device} has compute capability {major}.{minor}; fewbits' kernels need 7.0 or newer")]
    UnsupportedDevice {
        /// Name of the GPU.
        device: String,
        /// Its compute capability.
        major: i32,
        /// Its minor part.
        minor: i32,
    },
    /// A driver call failed.
    #[error("CUDA driver: {call} failed: {words}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's own name and text.
        words: String,
    },
    /// A kernel could not be launched.
    #[error("launch of {kernel} ({arguments}) on cuda:{device} failed: {words}")]
    Launch {
        /// Name of the kernel.
        kernel: String,
        /// Sizes it was to work on.
        arguments: String,
        /// Ordinal of the device.
        device: usize,
        /// The driver's own name and text.
        words: String,
    },
    /// The thread pool of the CPU kernels could not be started.
    #[error("cannot start {threads} CPU threads: {words}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The system's words.
        words: String,
    },
}

impl Error {
    pub(crate) fn argument(argument: &'static str, got: impl ToString, expected: impl ToString) -> Self {
        Self::Argument { argument, got: got.to_string(), expected: expected.to_string() }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
