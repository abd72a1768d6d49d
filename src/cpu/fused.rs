//! A sweep in blocks of tokens, with a tile of the state held in registers while the tokens of a block go by.
//!
//! Within a block the state is kept divided by the decay since the block's first token: if `P_t` is that product, then
//! `S_t = P_t S'_t` and `S'_t = S'_{t-1} + (write_t / P_t) value_t^T`. Scaling the small vectors instead of the state
//! leaves two multiply-adds for each element of the state and token, the least that the recurrence needs. A block ends
//! where `P_t` would leave [`block::RANGE`], so nothing overflows however strong the decay; the first token's own decay
//! is applied to the state itself, exactly.
//!
//! The rows of a head lie far apart in memory. So while the arithmetic of one block runs, the rows of the next are
//! fetched and brought into tiles, a few between any two tiles: the one waits for memory, the other for registers.

mod block;
mod lines;
mod tiles;

use pulp::{Arch, Simd, WithSimd};

use super::sweep::{AtStop, Sweep};
use block::Block;
use tiles::Tiles;

/// Runs `sweep` and calls `at_stop` with the state wherever a segment of tokens ends.
pub(super) fn run(sweep: &Sweep, state: &mut [f32], at_stop: Option<&mut AtStop>) {
    Arch::new().dispatch(Fused { sweep, state, at_stop });
}

struct Fused<'s, 'a, 'f> {
    sweep: &'s Sweep<'a>,
    state: &'s mut [f32],
    at_stop: Option<&'s mut AtStop<'f>>,
}

impl WithSimd for Fused<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile is ROWS x 2 vectors: with accumulators, two values and a broadcast it fills the register file.
        if S::REGISTER_COUNT >= 32 {
            self.sweep_in_blocks::<S, 8>(simd);
        } else {
            self.sweep_in_blocks::<S, 4>(simd);
        }
    }
}

impl Fused<'_, '_, '_> {
    #[inline(always)]
    fn sweep_in_blocks<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self { sweep, state, mut at_stop } = self;
        let mut tiles = Tiles::new::<S, ROWS>(sweep, state);
        let (mut now, mut next) = (Block::new::<S, ROWS>(sweep), Block::new::<S, ROWS>(sweep));
        now.plan(sweep, None);
        now.load_all::<S, ROWS>(sweep);
        while !now.is_empty() {
            next.plan(sweep, Some(&now));
            if sweep.inclusive {
                tiles.update::<S, ROWS, true>(simd, sweep, &now, &mut next);
            } else {
                tiles.update::<S, ROWS, false>(simd, sweep, &now, &mut next);
            }
            tiles.store::<S>(sweep, &now);
            if let Some(at_stop) = at_stop.as_mut().filter(|_| sweep.stops_at(now.steps().end)) {
                // The decay between two tokens belongs to the later one: a reverse sweep applies it before it stops.
                match sweep.reverse {
                    true => tiles.unpack_state(state, next.due()),
                    false => tiles.unpack_state(state, &now.due_after()),
                }
                at_stop(state);
            }
            std::mem::swap(&mut now, &mut next);
        }
        tiles.unpack_state(state, now.due());
    }
}
