//! The thread pool: the caller works too, idle workers spin briefly and then sleep.
//!
//! A decoded token passes through some 120 parallel regions, so entering one must cost about a microsecond. A region
//! is a word in memory that spinning workers watch; a worker that has gone to sleep is woken, but the caller never waits
//! for one that has not yet joined: it closes the region when all tasks are taken and waits only for those inside.

use crate::isa;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker watches for the next region before it sleeps.
const SPIN: Duration = Duration::from_micros(200);

/// How much of what it will read an idle worker asks for: a fraction of the second-level cache.
const SOON: usize = 128 << 10;

/// Bit of the state word that says that a region is open; below it the number of workers inside, above it the epoch.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 32;

/// Most runs of items of a region.
const SLOTS: usize = 64;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    state: AtomicU64,
    /// The open region's task, erased; valid while a region is open or a worker is inside.
    job: UnsafeCell<Option<(*const Task<'static>, usize)>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    /// Where each worker will read in a region to come.
    soon: Vec<AtomicPtr<u8>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    quit: AtomicBool,
}

// SAFETY: `job` is written only by the caller of `run` while no region is open and no worker inside, and read only by
// workers inside; `state` orders the two. Everything else is Sync by itself.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is to a Sync closure.
unsafe impl Send for Shared {}

/// A fixed set of threads that run tasks together with the caller.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Makes regions of different callers take turns.
    region: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` in all: the caller and `threads - 1` workers. Should the system refuse to start one, the pool
    /// is that much smaller.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            soon: (1..threads).map(|_| AtomicPtr::default()).collect(),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let workers = (1..threads.max(1))
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                let name = format!("bitnet-{worker}");
                std::thread::Builder::new().name(name).spawn(move || shared.work(worker)).ok()
            })
            .collect();
        Self { shared, workers, region: Mutex::new(()) }
    }

    /// Threads in all, the caller counted.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(task, worker)` once for every `task < tasks`, on all threads, and returns when all are done. `worker` is
    /// below [`Pool::threads`] and tells the threads apart. Tasks are handed out in order. `f` must not enter the
    /// same pool again.
    ///
    /// # Panics
    /// If a task panicked, with its panic.
    pub fn run(&self, tasks: usize, f: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| f(task, 0));
            return;
        }
        let _turn = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let task: *const Task<'_> = &f;
        // SAFETY: only the lifetime is erased. No region is open and no worker inside (the end of this function saw to
        // that last time, and `region` keeps other callers out), so nobody reads `job` now; and this function does
        // not return before everyone who may use the pointer has left.
        unsafe {
            *shared.job.get() =
                Some((std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task), tasks));
        }
        shared.next.store(0, Relaxed);
        let epoch = (shared.state.load(Relaxed) & !(EPOCH - 1)).wrapping_add(EPOCH);
        shared.state.store(epoch | OPEN, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            let _guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.take_tasks(&f, tasks, 0);
        // All tasks are taken: whoever has not joined by now need not.
        shared.state.fetch_and(!OPEN, SeqCst);
        let mut spins = 0u32;
        while shared.state.load(Acquire) & INSIDE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            drop(_turn);
            resume_unwind(panic);
        }
    }

    /// Runs of items of a region of so many.
    fn slots(&self, items: usize, least: usize) -> usize {
        self.threads().min(SLOTS).min(items.div_ceil(least)).max(1)
    }
    /// Where one of them begins.
    fn start(items: usize, least: usize, slots: usize, slot: usize) -> usize {
        (items * slot / slots).next_multiple_of(least).min(items)
    }

    /// Tells that [`Pool::run_ranges`] will be called with so many items and read from `at(i)` on for item i. Workers without
    /// work, while the caller does what only one can do, ask for the beginning of their run.
    pub fn soon(&self, items: usize, least: usize, at: impl Fn(usize) -> *const u8) {
        let slots = self.slots(items, least);
        for (i, soon) in self.shared.soon.iter().enumerate() {
            let first = if i + 1 < slots { Self::start(items, least, slots, i + 1) } else { items };
            let at = if first < items { at(first) } else { std::ptr::null() };
            soon.store(at.cast_mut(), Relaxed);
        }
    }

    /// Calls `f(range, worker)` for ranges that together make up `0..items`, on all threads. Each thread has a run of items of its
    /// own and goes through it in order, so that it reads memory as one stream; when it has done it helps the others. Ranges
    /// begin at multiples of `least` and have at most `most` items, a multiple of it, fewer towards the end of a run, so that all end together.
    pub fn run_ranges(
        &self,
        items: usize,
        most: usize,
        least: usize,
        f: impl Fn(Range<usize>, usize) + Sync,
    ) {
        let slots = self.slots(items, least);
        let start = |slot: usize| Self::start(items, least, slots, slot);
        // Few runs have their counters on lines of their own.
        let apart = SLOTS / slots;
        let next: [AtomicUsize; SLOTS] = std::array::from_fn(|_| AtomicUsize::new(0));
        (0..slots).for_each(|slot| next[slot * apart].store(start(slot), Relaxed));
        self.run(slots, |_, worker| {
            let own = worker % slots;
            for slot in (own..slots).chain(0..own) {
                let end = if slot + 1 < slots { start(slot + 1) } else { items };
                let take = |begin: usize| {
                    let piece = (end.saturating_sub(begin) / 4).min(most).next_multiple_of(least).max(least);
                    (begin < end).then(|| (begin + piece).min(end))
                };
                while let Ok(begin) = next[slot * apart].fetch_update(Relaxed, Relaxed, take) {
                    f(begin..take(begin).unwrap_or(end), worker);
                }
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let (mut seen, mut soon) = (0, Soon { at: std::ptr::null(), asked: 0 });
        while let Some(epoch) = self.join_region(seen, worker, &mut soon) {
            seen = epoch;
            // SAFETY: this worker is counted inside, so the region's owner waits for it, and `job` was written before
            // the region was opened.
            let (task, tasks) = match unsafe { *self.job.get() } {
                // SAFETY: as above: the closure outlives our stay.
                Some((task, tasks)) => (unsafe { &*task }, tasks),
                None => unreachable!("a region is opened after its job is set"),
            };
            self.take_tasks(task, tasks, worker);
            self.state.fetch_sub(1, Release);
        }
    }

    /// Waits for an open region other than `seen` and enters it. None when the pool ends.
    fn join_region(&self, seen: u64, worker: usize, soon: &mut Soon) -> Option<u64> {
        let mut idle_since = Instant::now();
        let mut spins = 0u32;
        loop {
            let state = self.state.load(Acquire);
            let epoch = state & !(EPOCH - 1);
            if state & OPEN != 0 && epoch != seen {
                if self.state.compare_exchange_weak(state, state + 1, AcqRel, Relaxed).is_ok() {
                    return Some(epoch);
                }
                continue;
            }
            if self.quit.load(Relaxed) {
                return None;
            }
            if soon.ask(self.soon[worker - 1].load(Relaxed)) {
                continue;
            }
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(64) && idle_since.elapsed() > SPIN {
                let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.sleepers.fetch_add(1, SeqCst);
                loop {
                    let state = self.state.load(SeqCst);
                    let news = state & OPEN != 0 && state & !(EPOCH - 1) != seen;
                    if news || self.quit.load(SeqCst) {
                        break;
                    }
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, SeqCst);
                drop(guard);
                idle_since = Instant::now();
            }
        }
    }

    fn take_tasks(&self, f: &Task<'_>, tasks: usize, worker: usize) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Relaxed);
                if task >= tasks {
                    break;
                }
                f(task, worker);
            }
        }));
        if let Err(panic) = result {
            // Hand out no more tasks, and let the caller raise the first panic.
            self.next.store(usize::MAX / 2, Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

/// What a worker has asked for already.
struct Soon {
    at: *const u8,
    asked: usize,
}

impl Soon {
    /// Asks for some more lines from `at` on, if any are left to be asked for.
    fn ask(&mut self, at: *const u8) -> bool {
        if at != self.at {
            *self = Self { at, asked: 0 };
        }
        if at.is_null() || self.asked >= SOON {
            return false;
        }
        for _ in 0..4 {
            isa::prefetch_soon(at.wrapping_add(self.asked));
            self.asked += 64;
        }
        true
    }
}

/// Threads this process may use for arithmetic: the CPUs allowed by its affinity and its cgroup's quota, one for each
/// physical core.
pub fn allowed_threads() -> usize {
    // The standard library counts affinity and cgroup quota.
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    physical_cores().map_or(allowed, |cores| cores.min(allowed)).max(1)
}

/// Physical cores among the CPUs of this process's affinity, if the system tells.
#[cfg(target_os = "linux")]
fn physical_cores() -> Option<usize> {
    // SAFETY: the set is plain bits, for which zero is valid, and the call writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return None;
        }
        set
    };
    let mut cores = std::collections::HashSet::new();
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: `cpu` is below CPU_SETSIZE.
        if unsafe { libc::CPU_ISSET(cpu, &set) } {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            cores.insert(std::fs::read_to_string(path).ok()?);
        }
    }
    Some(cores.len())
}

#[cfg(not(target_os = "linux"))]
fn physical_cores() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_region() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..2000 {
                let tasks = round % 23;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |task, worker| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "{threads} threads, round {round}");
                if round % 500 == 0 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(SPIN * 5);
                }
            }
        }
    }

    #[test]
    fn ranges_cover_every_item_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            let regions =
                [(0, 4, 4), (1, 4, 4), (7, 8, 4), (64, 4, 1), (65, 16, 16), (1000, 1, 1), (999, 64, 8)];
            for (items, most, least) in regions {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run_ranges(items, most, least, |range, worker| {
                    assert!(worker < threads && range.len() <= most && range.start.is_multiple_of(least));
                    range.for_each(|i| _ = counts[i].fetch_add(1, Relaxed));
                });
                assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "{threads} threads, {items} by {most}");
            }
        }
    }

    #[test]
    fn what_comes_next_is_asked_for_once() {
        let bytes = vec![0u8; 2 * SOON];
        let mut soon = Soon { at: std::ptr::null(), asked: 0 };
        assert!(!soon.ask(std::ptr::null()));
        for at in [0, SOON / 2] {
            let at = bytes[at..].as_ptr();
            assert_eq!((0..SOON).take_while(|_| soon.ask(at)).count(), SOON / 256);
            assert!(!soon.ask(at));
        }
    }

    #[test]
    fn workers_are_told_where_their_runs_begin() {
        let (pool, bytes) = (Pool::new(3), [0u8; 90]);
        pool.soon(90, 4, |item| bytes[item..].as_ptr());
        let told: Vec<usize> =
            pool.shared.soon.iter().map(|at| at.load(Relaxed).addr() - bytes.as_ptr().addr()).collect();
        assert_eq!(told, [32, 60]);
        pool.soon(4, 4, |item| bytes[item..].as_ptr());
        assert!(pool.shared.soon.iter().all(|at| at.load(Relaxed).is_null()));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, |task, _| assert_ne!(task, bad, "planted"));
            }));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, |task, _| {
                sum.fetch_add(task, Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn regions_from_several_callers_take_turns() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, |task, _| {
                            sum.fetch_add(task, Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 10);
    }
}
