//! The state cut in tiles, and the inner loop.

use pulp::Simd;

use super::block::{BLOCK, Block, Due};
use super::lines::{Lines, copy};
use crate::cpu::sweep::{Lane, Sweep, scale};

/// The state and the results of a block, padded with zeros to whole tiles. Everything that the inner loop reads is
/// contiguous for a tile.
pub(super) struct Tiles {
    cols: usize,
    rows: usize,
    /// Rows and columns of a tile, and how many tiles there are of each.
    tile: (usize, usize),
    grid: (usize, usize),
    /// `[col tile][row][col]`
    state: Lines,
    /// `[col tile][token][col]`
    out: Lines,
    col: Vec<f32>,
}

impl Tiles {
    #[inline(always)]
    pub fn new<S: Simd, const ROWS: usize>(sweep: &Sweep, state: &[f32]) -> Self {
        let tile = (ROWS, 2 * S::F32_LANES);
        let grid = (sweep.rows.div_ceil(tile.0), sweep.cols.div_ceil(tile.1));
        let mut tiles = Self {
            rows: sweep.rows,
            cols: sweep.cols,
            tile,
            grid,
            state: Lines::zeros(grid.0 * tile.0 * grid.1 * tile.1),
            out: Lines::zeros(grid.1 * tile.1 * BLOCK),
            col: vec![0.; sweep.cols],
        };
        for (r, row) in state.chunks_exact(tiles.cols).enumerate() {
            for (c, x) in row.chunks(tile.1).enumerate() {
                let at = tiles.row_at(c, r);
                tiles.state[at..at + x.len()].copy_from_slice(x);
            }
        }
        tiles
    }

    /// Where row `r` of the state begins in column tile `c`.
    #[inline(always)]
    fn row_at(&self, c: usize, r: usize) -> usize {
        (c * self.grid.0 * self.tile.0 + r) * self.tile.1
    }

    #[inline(always)]
    pub fn unpack_state(&self, state: &mut [f32], due: &Due) {
        for (r, row) in state.chunks_exact_mut(self.cols).enumerate() {
            for (c, (x, due_cols)) in
                row.chunks_mut(self.tile.1).zip(due.cols.chunks(self.tile.1)).enumerate()
            {
                let from = &self.state[self.row_at(c, r)..][..x.len()];
                for ((x, s), d) in x.iter_mut().zip(from).zip(due_cols) {
                    *x = s * d * due.rows[r];
                }
            }
        }
    }

    #[inline(always)]
    pub fn store<S: Simd>(&mut self, sweep: &Sweep, block: &Block) {
        let mut scratch = std::mem::take(&mut self.col);
        for (i, step) in block.steps().enumerate() {
            let t = sweep.token(step);
            // SAFETY: the row is done with before the next store.
            if let Some(row) = unsafe { sweep.out.row(t, self.cols) } {
                self.result_of::<S>(block, i, row);
            } else {
                self.result_of::<S>(block, i, &mut scratch);
                sweep.out.store(t, &scratch);
            }
        }
        self.col = scratch;
    }

    /// Fills `row` with the result for token `i` of a block.
    #[inline(always)]
    fn result_of<S: Simd>(&self, block: &Block, i: usize, row: &mut [f32]) {
        let tiles = self.out.chunks_exact(self.tile.1).skip(i).step_by(BLOCK);
        for (x, tile) in row.chunks_mut(self.tile.1).zip(tiles) {
            copy::<S>(&tile[..x.len()], x);
        }
        scale(row, block.product_of_cols(i));
    }

    /// Runs the tokens of a block over all tiles, and meanwhile loads the next block.
    #[inline(always)]
    pub fn update<S: Simd, const ROWS: usize, const INCLUSIVE: bool>(
        &mut self,
        simd: S,
        sweep: &Sweep,
        now: &Block,
        next: &mut Block,
    ) {
        let (rows, cols) = self.tile;
        let n = now.steps().len();
        let tiles = self.grid.0 * self.grid.1;
        let (mut loaded, mut fetched) = (0, 0);
        for c in 0..self.grid.1 {
            let at = c * BLOCK * cols;
            let (value, out) = (&now.value[at..at + n * cols], &mut self.out[at..at + n * cols]);
            out.fill(0.);
            let state = &mut self.state[c * self.grid.0 * rows * cols..][..self.grid.0 * rows * cols];
            let width = cols.min(self.cols - c * cols);
            for (r, state) in state.chunks_exact_mut(rows * cols).enumerate() {
                let height = rows.min(self.rows - r * rows);
                if let Some(due) = now.due_if_any() {
                    due.pay(
                        state.chunks_exact_mut(cols),
                        r * rows..r * rows + height,
                        c * cols..c * cols + width,
                    );
                }
                let done = c * self.grid.0 + r + 1;
                while loaded * tiles < done * next.pieces() {
                    next.load::<S, ROWS>(sweep, loaded);
                    loaded += 1;
                }
                while fetched * tiles < done * n {
                    sweep.prefetch(Lane::Out, now.steps().start + fetched);
                    sweep.prefetch(Lane::Gate, next.steps().end + fetched);
                    fetched += 1;
                }
                let at = r * BLOCK * rows;
                let (read, write) = (&now.read[at..at + n * rows], &now.write[at..at + n * rows]);
                if width <= S::F32_LANES {
                    tile::<S, ROWS, 1, INCLUSIVE>(simd, read, write, value, out, state);
                } else {
                    tile::<S, ROWS, 2, INCLUSIVE>(simd, read, write, value, out, state);
                }
            }
        }
    }
}

/// All tokens of a block on one tile of the state: `ROWS` rows of two vectors, of which the first `VECTORS` are used.
#[inline(always)]
fn tile<S: Simd, const ROWS: usize, const VECTORS: usize, const INCLUSIVE: bool>(
    simd: S,
    read: &[f32],
    write: &[f32],
    value: &[f32],
    out: &mut [f32],
    state: &mut [f32],
) {
    // Arrays, whose lengths the compiler knows, so that the tile goes to registers and back without a detour.
    let state = S::as_mut_simd_f32s(state).0.as_chunks_mut::<2>().0.first_chunk_mut::<ROWS>();
    let Some(state) = state else { unreachable!("a tile has {ROWS} rows of two vectors") };
    let mut s = [[simd.splat_f32s(0.); VECTORS]; ROWS];
    for r in 0..ROWS {
        s[r].copy_from_slice(&state[r][..VECTORS]);
    }
    let (value, _) = S::as_simd_f32s(value);
    let (out, _) = S::as_mut_simd_f32s(out);
    let (read, write) = (read.as_chunks::<ROWS>().0, write.as_chunks::<ROWS>().0);
    let (value, out) = (value.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
    for (((q, w), v), o) in read.iter().zip(write).zip(value).zip(out) {
        // Even and odd rows on their own: half as long a chain of sums that wait for one another.
        let mut acc = [[simd.splat_f32s(0.); VECTORS]; 2];
        acc[0].copy_from_slice(&o[..VECTORS]);
        for r in 0..ROWS {
            let (q, w) = (simd.splat_f32s(q[r]), simd.splat_f32s(w[r]));
            let acc = &mut acc[r % 2];
            for j in 0..VECTORS {
                if !INCLUSIVE {
                    acc[j] = simd.mul_add_e_f32s(q, s[r][j], acc[j]);
                }
                s[r][j] = simd.mul_add_e_f32s(w, v[j], s[r][j]);
                if INCLUSIVE {
                    acc[j] = simd.mul_add_e_f32s(q, s[r][j], acc[j]);
                }
            }
        }
        for j in 0..VECTORS {
            o[j] = simd.add_f32s(acc[0][j], acc[1][j]);
        }
    }
    for r in 0..ROWS {
        state[r][..VECTORS].copy_from_slice(&s[r]);
    }
}
