//! Where a model runs on a CPU: on one of the threads that share its products, while the others stay awake.
//!
//! A token is some two hundred products of a fraction of a millisecond each, with less in between. Handed over from a
//! thread outside the pool, each would be waited for by one that sleeps, and begun by others that have to wake up first.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a thread looks for work before it goes to sleep: longer than anything between two products of a token.
const AWAKE: Duration = Duration::from_micros(300);

/// Whether a pass is on one of the threads. One at a time: where one waits for a part of a product its thread takes up
/// what there is, which could be another pass, and another within that, until there is no stack left.
static TAKEN: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread runs a pass or stays awake for one.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Undoes on drop, in a panic too, what made it.
struct Undo<F: Fn()>(F);

impl<F: Fn()> Drop for Undo<F> {
    fn drop(&mut self) {
        self.0();
    }
}

/// Marks this thread as busy, unless it is.
fn busy() -> Option<Undo<impl Fn()>> {
    (!BUSY.replace(true)).then(|| Undo(|| BUSY.set(false)))
}

/// Runs one way through a model: where it is called if another is being run.
pub(super) fn on_a_worker<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 || TAKEN.swap(true, Ordering::AcqRel) {
        return pass();
    }
    let _taken = Undo(|| TAKEN.store(false, Ordering::Release));
    rayon::scope(|_| {
        let _busy = busy();
        rayon::spawn_broadcast(|_| stay_awake());
        pass()
    })
}

/// Takes what there is to do until there has been nothing for a while. Nobody waits for this.
fn stay_awake() {
    let Some(_busy) = busy() else { return };
    let mut idle_since = Instant::now();
    while idle_since.elapsed() < AWAKE {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => idle_since = Instant::now(),
            // To other programs, if there are any that could run here.
            _ => std::thread::yield_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_may_run_within_one_another_and_beside_one_another() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let pass = || on_a_worker(|| on_a_worker(|| rayon::join(|| 1, || 2)));
        let both = pool.install(|| rayon::join(pass, pass));
        assert_eq!(both, ((1, 2), (1, 2)));
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..8).map(|_| scope.spawn(pass)).collect();
            assert!(running.into_iter().all(|pass| pass.join().unwrap() == (1, 2)));
        });
    }

    /// Each calls for others to stay awake, who must not do so within one another.
    #[test]
    fn many_short_passes_need_no_more_stack_than_one() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).stack_size(1 << 16).build().unwrap();
        pool.install(|| (0..20_000).for_each(|i| assert_eq!(on_a_worker(|| i), i)));
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let caught = std::panic::catch_unwind(|| on_a_worker(|| panic!("as it should")));
        assert!(caught.is_err());
        assert_eq!(on_a_worker(|| 3), 3);
    }
}
