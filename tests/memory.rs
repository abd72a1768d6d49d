//! What the operators allocate. In a test binary of its own, because it counts every allocation of the process.

use candle_core::{Device, Tensor, Var};
use candle_linear_attn::{Mode, Options, gla, kda, linear_attn};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, with the bytes in use and their maximum.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = IN_USE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promises are those of `System::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MODES: [Mode; 4] = [Mode::Auto, Mode::Recurrent, Mode::Chunk, Mode::FusedChunk];
const D: usize = 32;

/// The most bytes in use during `f`, above those in use before.
fn peak<T>(f: impl FnOnce() -> T) -> usize {
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    let most = PEAK.load(Relaxed) - before;
    drop(result);
    most
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

#[derive(Debug, Clone, Copy)]
enum Op {
    LinearAttn,
    Gla,
    Kda,
}

const OPS: [Op; 3] = [Op::LinearAttn, Op::Gla, Op::Kda];

/// Forward and backward, in bytes for each byte of q.
fn backward_cost(t: usize, mode: Mode, op: Op) -> f64 {
    let [q, k, v] = [(); 3].map(|_| Var::from_tensor(&random(&[1, t, 1, D])).unwrap());
    let g = Var::from_tensor(&random(&[1, t, 1, D]).abs().unwrap().neg().unwrap()).unwrap();
    let beta = Var::from_tensor(&Tensor::full(0.02f32, (1, t, 1), &Device::Cpu).unwrap()).unwrap();
    let opts = Options::default().with_mode(mode);
    let bytes = peak(|| {
        let out = match op {
            Op::LinearAttn => linear_attn(&q, &k, &v, &opts),
            Op::Gla => gla(&q, &k, &v, &g, &opts),
            Op::Kda => kda(&q, &k, &v, &g, &beta, &opts),
        };
        out.unwrap().out.sum_all().unwrap().backward().unwrap()
    });
    bytes as f64 / (t * D * 4) as f64
}

/// One test, so that nothing else allocates while it counts.
#[test]
fn memory_is_linear_in_the_length() {
    // Threads and their buffers last; the first use of each would be counted.
    for mode in MODES {
        for op in OPS {
            backward_cost(2048, mode, op);
        }
    }
    for op in OPS {
        for mode in MODES {
            let (short, long) = (backward_cost(2048, mode, op), backward_cost(16384, mode, op));
            // A state a token would be 32 times q, a T x T matrix 64 times and 512 times.
            let label = format!("{mode:?}, {op:?}: {short:.1} and {long:.1} times q");
            assert!(long < 24.0 && long < 1.5 * short + 1.0, "{label}");
            println!("{label}");
        }
    }
    for mode in MODES {
        let [q, k, v] = [(); 3].map(|_| random(&[1, 16384, 1, D]));
        let opts = Options::default().with_mode(mode);
        let bytes = peak(|| linear_attn(&q, &k, &v, &opts).unwrap().out);
        let times = bytes as f64 / (16384 * D * 4) as f64;
        // The output itself is 1; the states of Chunk are D / 64 more.
        println!("{mode:?}, forward alone: {times:.2} times q");
        assert!(times < 3.0, "{mode:?}: the forward takes {times:.2} times q");
    }
}
