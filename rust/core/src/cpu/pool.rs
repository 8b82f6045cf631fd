//! Threads: one pool for each number of threads that callers ask for.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::float_mode::DefaultFloatMode;
use crate::{Error, Result};

/// Below this many bytes read and written, a second thread costs more than it brings.
const BYTES_PER_THREAD: usize = 256 << 10;

type Pools = HashMap<(u32, usize), Arc<rayon::ThreadPool>>;

/// Runs `work(first, last)` over `0..units` in contiguous parts, on up to `threads` threads.
pub fn run(units: usize, bytes_per_unit: usize, threads: usize, work: impl Fn(usize, usize) + Sync) -> Result<()> {
    run_with(units, bytes_per_unit, threads, || (), |(), first, last| work(first, last))
}

/// As [`run`], with something that each thread makes once and hands to each of its parts.
pub fn run_with<S>(
    units: usize,
    bytes_per_unit: usize,
    threads: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, usize) + Sync,
) -> Result<()> {
    let useful = (units.saturating_mul(bytes_per_unit) / BYTES_PER_THREAD).max(1);
    let threads = threads.clamp(1, 1024).min(useful).min(units.max(1));
    if threads == 1 {
        let _mode = DefaultFloatMode::enter();
        work(&mut scratch(), 0, units);
        return Ok(());
    }
    // Many more parts than threads: one that sleeps takes 20 µs to wake, and the others then do more of them.
    let parts = (threads * 16).min(units);
    let next = AtomicUsize::new(0);
    let take_parts = || {
        let _mode = DefaultFloatMode::enter();
        let mut made = None;
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            work(made.get_or_insert_with(&scratch), units * part / parts, units * (part + 1) / parts);
        }
    };
    share(&*pool(threads - 1)?, threads - 1, &take_parts);
    Ok(())
}

/// Helpers that are at work, and [`CLOSED`] once no more may begin.
type State = AtomicUsize;

const CLOSED: usize = 1 << (usize::BITS - 1);

/// Runs `work` on this thread, which is awake already, and on up to `helpers` threads of the pool, and returns when all that have
/// begun are done. One that wakes late is not waited for: it finds the work closed.
fn share(pool: &rayon::ThreadPool, helpers: usize, work: &(dyn Fn() + Sync)) {
    /// Closes the work, and waits for helpers that are at it. Also if this thread unwinds, for they use what it owns.
    struct Close<'a>(&'a State);
    impl Drop for Close<'_> {
        fn drop(&mut self) {
            self.0.fetch_or(CLOSED, Ordering::AcqRel);
            let mut turns = 0;
            while self.0.load(Ordering::Acquire) != CLOSED {
                turns += 1;
                if turns < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }
    let shared = Arc::new((State::new(0), Mutex::new(None)));
    // SAFETY: the reference is used by helpers that have entered before the work was closed, and this function returns, or
    // unwinds, only after they have left: `work` lives longer.
    let work_of_helpers: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(work) };
    {
        let _close = Close(&shared.0);
        for _ in 0..helpers {
            let shared = shared.clone();
            pool.spawn(move || {
                let (state, panic) = &*shared;
                if state.fetch_add(1, Ordering::AcqRel) & CLOSED == 0
                    && let Err(words) = catch_unwind(AssertUnwindSafe(work_of_helpers))
                {
                    *panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
                }
                state.fetch_sub(1, Ordering::AcqRel);
            });
        }
        work();
    }
    if let Some(words) = shared.1.lock().unwrap_or_else(PoisonError::into_inner).take() {
        resume_unwind(words);
    }
}

/// The pool of so many threads. A process that was forked off has none of its parent's threads and starts its own.
fn pool(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    static POOLS: OnceLock<Mutex<Pools>> = OnceLock::new();
    let key = (std::process::id(), threads);
    let mut pools = POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = pools.get(&key) {
        return Ok(pool.clone());
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("fewbits-{i}"))
        .build()
        .map_err(|error| Error::Threads { threads, words: error.to_string() })?;
    Ok(pools.entry(key).or_insert(Arc::new(pool)).clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 3, 16] {
            for units in [0, 1, 5, 1000] {
                for _ in 0..20 {
                    let done: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                    run(units, BYTES_PER_THREAD, threads, |first, last| {
                        for unit in &done[first..last] {
                            unit.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                    .unwrap();
                    assert!(
                        done.iter().all(|unit| unit.load(Ordering::Relaxed) == 1),
                        "{threads} threads, {units} units"
                    );
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for _ in 0..20 {
            let run = || run(100, BYTES_PER_THREAD, 4, |first, _| assert!(first < 50, "at {first}"));
            assert!(catch_unwind(run).is_err());
        }
        run(100, BYTES_PER_THREAD, 4, |_, _| ()).unwrap();
    }
}
