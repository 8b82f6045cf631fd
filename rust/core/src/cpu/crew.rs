//! Threads that help a caller with its work.
//!
//! Unlike a general pool it takes no memory for a call, and does not wait for a helper that has not begun: a thread takes 20 µs to
//! wake, or far longer where others spin on its processor. (What a helper frees late would lie between a caller's large blocks of
//! memory and keep them apart.)

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{any::Any, io, thread};

type Work = &'static (dyn Fn() + Sync);

/// Helpers, one caller at a time.
pub struct Crew {
    call: Mutex<Call>,
    wake: Condvar,
    /// Helpers at work. It rises only under the lock, while the work is open.
    inside: AtomicUsize,
}

/// The caller's work and how many helpers may still begin it.
struct Call {
    work: Option<Work>,
    openings: usize,
    panic: Option<Box<dyn Any + Send>>,
}

impl Crew {
    /// Starts `helpers` threads.
    pub fn new(helpers: usize) -> io::Result<Arc<Self>> {
        let crew = Arc::new(Self {
            call: Mutex::new(Call { work: None, openings: 0, panic: None }),
            wake: Condvar::new(),
            inside: AtomicUsize::new(0),
        });
        for i in 0..helpers {
            let crew = crew.clone();
            thread::Builder::new().name(format!("fewbits-{i}")).spawn(move || crew.help())?;
        }
        Ok(crew)
    }

    fn lock(&self) -> MutexGuard<'_, Call> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on this thread, which is awake already, and on up to `helpers` others, and returns when all that have begun are done.
    /// While the crew works for another caller, on this thread alone.
    pub fn share(&self, helpers: usize, work: &(dyn Fn() + Sync)) {
        // SAFETY: helpers use the reference between taking an opening and leaving `inside`; `Close` takes the openings away and waits until
        // nobody is inside before this function returns or unwinds, so `work` lives longer.
        let for_helpers: Work = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), Work>(work) };
        {
            let mut call = self.lock();
            if call.work.is_some() {
                drop(call);
                return work();
            }
            call.work = Some(for_helpers);
            call.openings = helpers;
        }
        for _ in 0..helpers {
            self.wake.notify_one();
        }
        let close = Close(self);
        work();
        drop(close);
    }

    /// A helper's life.
    fn help(&self) {
        let mut call = self.lock();
        loop {
            let Some(work) = call.work.filter(|_| call.openings > 0) else {
                call = self.wake.wait(call).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            call.openings -= 1;
            self.inside.fetch_add(1, Ordering::Relaxed);
            drop(call);
            let outcome = catch_unwind(AssertUnwindSafe(work));
            call = self.lock();
            if let Err(words) = outcome {
                call.panic = Some(words);
            }
            // The caller reads what the work wrote when it sees this.
            self.inside.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Ends a call: nobody else begins, those that have begun are waited for, and a helper's panic goes on in the caller.
struct Close<'a>(&'a Crew);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let crew = self.0;
        crew.lock().openings = 0;
        let mut turns = 0;
        while crew.inside.load(Ordering::Acquire) > 0 {
            turns += 1;
            if turns < 10_000 { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let mut call = crew.lock();
        call.work = None;
        let panic = call.panic.take();
        drop(call);
        if let Some(words) = panic
            && !thread::panicking()
        {
            resume_unwind(words);
        }
    }
}
