//! Work in parts: on this thread and a crew of helpers, one crew for each number of them that callers ask for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::crew::Crew;
use super::float_mode::DefaultFloatMode;
use crate::{Error, Result};

/// Below this many bytes read and written, a second thread costs more than it brings.
const BYTES_PER_THREAD: usize = 256 << 10;

type Crews = HashMap<(u32, usize), Arc<Crew>>;

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
    crew(threads - 1)?.share(threads - 1, &take_parts);
    Ok(())
}

/// The helpers of callers that want so many. A process that was forked off has none of its parent's threads and starts its own.
fn crew(helpers: usize) -> Result<Arc<Crew>> {
    static CREWS: OnceLock<Mutex<Crews>> = OnceLock::new();
    let key = (std::process::id(), helpers);
    let mut crews = CREWS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(crew) = crews.get(&key) {
        return Ok(crew.clone());
    }
    let crew = Crew::new(helpers).map_err(|error| Error::Threads { threads: helpers, words: error.to_string() })?;
    Ok(crews.entry(key).or_insert(crew).clone())
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

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
    fn callers_side_by_side_do_not_disturb_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        run(100, BYTES_PER_THREAD, 3, |first, last| {
                            sum.fetch_add((first..last).sum(), Ordering::Relaxed);
                        })
                        .unwrap();
                        assert_eq!(sum.into_inner(), 4950);
                    }
                });
            }
        });
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
