//! Whether a kernel may read a weight before the kernel ahead of it in the stream has ended.
//!
//! A kernel that starts early (programmatic stream serialization) sees all that was queued before its stream's previous kernel
//! started; what that one writes it sees only after it has waited. So it may read a weight ahead of its wait once an earlier kernel
//! of the stream has waited with the weight as it is now: who wrote it, did so before that one. The waits of other streams, events,
//! copies and the beginning of a graph are never relaxed.

use std::sync::Mutex;

use cudarc::driver::sys;

/// The version of a weight with which a kernel has waited, and its stream. Callers say what a version is: a number that changes
/// whenever somebody writes to the weight.
#[derive(Debug, Default)]
pub struct Settled(Mutex<Option<(u64, u64)>>);

impl Settled {
    /// Whether a kernel launched now on the stream need not wait for the weight.
    pub fn is_settled(&self, version: u64, stream: u64) -> bool {
        match *self.seen() {
            // While a graph is captured, its streams are others than those of the calls before: all that was queued before the
            // capture began has ended when the graph runs.
            Some((seen, of)) => seen == version && (of == stream || is_capturing(stream)),
            None => false,
        }
    }

    /// A kernel has been launched on the stream that waits before it reads the weight. One that is captured has not run yet.
    pub fn waits(&self, version: u64, stream: u64) {
        if !is_capturing(stream) {
            *self.seen() = Some((version, stream));
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Option<(u64, u64)>> {
        // Plain numbers: whoever panicked has left them whole.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Whether launches on the stream become part of a graph. Where the driver does not say, because another stream's capture forbids the
/// question, they do not: the launch fails then, too.
fn is_capturing(stream: u64) -> bool {
    if stream == 0 {
        return false; // the legacy stream cannot be captured
    }
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the driver is open, because kernels are launched on the stream, which is alive; the pointer is to a local.
    let asked = unsafe { sys::cuStreamIsCapturing(stream as sys::CUstream, &mut status) };
    asked == sys::CUresult::CUDA_SUCCESS && status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settled_once_a_kernel_has_waited_with_the_version() {
        let settled = Settled::default();
        assert!(!settled.is_settled(7, 0));
        settled.waits(7, 0);
        assert!(settled.is_settled(7, 0));
        assert!(!settled.is_settled(8, 0), "somebody has written");
        settled.waits(8, 0);
        assert!(settled.is_settled(8, 0) && !settled.is_settled(7, 0));
    }
}
