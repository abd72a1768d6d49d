//! Sharing a batch out over the cores.

use anyhow::Result;
use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

/// What `of` makes of every item: on a CPU all cores share them out. Candle gives each thread that uses a GPU a stream of its own,
/// and streams do not wait for one another: there one thread does all there is.
pub fn each<T: Send, R: Send, E: Send>(
    device: &Device,
    items: Vec<T>,
    of: impl Fn(T) -> Result<R, E> + Sync + Send,
) -> Result<Vec<R>, E> {
    if device.is_cpu() {
        items.into_par_iter().map(of).collect()
    } else {
        items.into_iter().map(of).collect()
    }
}

/// Threads that each take a share of a batch through the whole model.
///
/// On a CPU that is much faster than all cores working on one operation at a time: most operations of a small model are too
/// short to be split, some of candle's are never, and the cores need to meet once in a step only.
pub struct Workers {
    /// A pool of one thread for each: what an operation would split over the cores then stays on the worker's own.
    pools: Vec<ThreadPool>,
}

impl Workers {
    /// As many as there are cores, but one on a GPU.
    pub fn new(device: &Device) -> Result<Self> {
        let count = if device.is_cpu() { rayon::current_num_threads() } else { 1 };
        let pool = |_| ThreadPoolBuilder::new().num_threads(1).build();
        let pools = if count > 1 { (0..count).map(pool).collect::<Result<_, _>>()? } else { Vec::new() };
        Ok(Self { pools })
    }

    pub fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// `work(0), work(1), ... work(shares - 1)`, in that order, for no more shares than there are workers.
    pub fn map<T: Send>(&self, shares: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        if self.pools.is_empty() {
            return (0..shares).map(work).collect();
        }
        self.pools[..shares].par_iter().enumerate().map(|(i, pool)| pool.install(|| work(i))).collect()
    }
}
