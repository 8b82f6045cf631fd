//! Threads: one pool for each number of threads that callers ask for.

use std::collections::HashMap;
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
    // The calling thread works too: it is awake already.
    pool(threads - 1)?.in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| take_parts());
        }
        take_parts();
    });
    Ok(())
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
