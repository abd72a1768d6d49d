//! Where a model runs on a CPU: on one of the threads that share its products, while the others stay awake.
//!
//! A token is some two hundred products of a fraction of a millisecond each, with less in between. Handed over from a
//! thread outside the pool, each would be waited for by one that sleeps, and begun by others that have to wake up first.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a thread looks for work before it goes to sleep: longer than anything between two products of a token.
const AWAKE: Duration = Duration::from_micros(300);

thread_local! {
    static RUNS_A_PASS: Cell<bool> = const { Cell::new(false) };
}

/// Runs one way through a model.
pub(super) fn on_a_worker<R: Send>(pass: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 || RUNS_A_PASS.get() {
        return pass();
    }
    rayon::scope(|_| {
        // Back to what it was in a panic, too.
        struct Within(bool);
        impl Drop for Within {
            fn drop(&mut self) {
                RUNS_A_PASS.set(self.0);
            }
        }
        let _within = Within(RUNS_A_PASS.replace(true));
        rayon::spawn_broadcast(|_| stay_awake());
        pass()
    })
}

/// Takes what there is to do until there has been nothing for a while. Nobody waits for this.
fn stay_awake() {
    // A pass goes on below, on this thread: its own, or one that waits for a part of a product.
    if RUNS_A_PASS.get() {
        return;
    }
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

    #[test]
    fn a_panic_reaches_the_caller() {
        let caught = std::panic::catch_unwind(|| on_a_worker(|| panic!("as it should")));
        assert!(caught.is_err());
        assert_eq!(on_a_worker(|| 3), 3);
    }
}
