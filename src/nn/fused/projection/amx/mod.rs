//! Products with weights in bf16 by the matrix units (AMX) that some x86 processors have.
//!
//! Weights go into tiles as they lie in memory. An element of `x` is taken as the sum of two numbers in bf16, which leaves
//! 2^-18 of it out at most; products and sums are in f32, where what is subnormal counts as zero.

mod pack;
mod panel;
mod tiles;

use super::tile::Columns;
use super::{block, is_worth_threads, project_as};
use half::bf16;
use panel::{OUTPUTS, Panel};
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;
use tiles::{DEPTH, PIECES, SIDE, Sums};

/// Outputs that a thread takes at a time.
const BLOCK: usize = 128;
/// Packed numbers of the rows of `x` that a thread takes at a time: they stay in L2 while they meet the outputs.
const PACKED: usize = 1 << 17;
/// Packed numbers of a cache line.
const LINE: usize = 16;

/// That this process may use AMX.
#[derive(Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// Asks the operating system once.
    pub fn get() -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        GRANTED.get_or_init(|| has_amx() && is_granted()).then_some(Self(()))
    }

    /// As [`project`](super::project).
    pub fn project(self, x: &[f32], rows: usize, weights: &[bf16], outputs: usize) -> Vec<f32> {
        let k = x.len() / rows;
        if k == 0 {
            return vec![0.; rows * outputs];
        }
        let parallel = is_worth_threads(rows * outputs * k);
        let width = rows.min(SIDE);
        let group = k.div_ceil(DEPTH) * PIECES * SIDE * width;
        let most = (PACKED / group).next_multiple_of(2).max(4) * SIDE;
        let mut y = Vec::with_capacity(rows * outputs);
        let columns = Columns::empty(&mut y.spare_capacity_mut()[..rows * outputs], outputs);
        let mut buffer = BUFFER.take();
        for b in 0..rows.div_ceil(most) {
            let rows = block(b, most, rows);
            let packed = aligned(&mut buffer, rows.len().div_ceil(SIDE) * group);
            // SAFETY: the machine has what `has_amx` looked for.
            let pack = |(x, to): (&[f32], &mut [u32])| unsafe { pack::pack(x, k, width, to) };
            let from = &x[rows.start * k..rows.end * k];
            match parallel && rows.len() > SIDE {
                true => from.par_chunks(SIDE * k).zip(packed.par_chunks_exact_mut(group)).for_each(pack),
                false => from.chunks(SIDE * k).zip(packed.chunks_exact_mut(group)).for_each(pack),
            }
            let product = Product { x, k, rows, weights, width, group, packed, y: columns };
            // SAFETY: the machine has what `has_amx` looked for, and no two blocks overlap.
            let run = |b| unsafe { product.run(block(b, BLOCK, outputs)) };
            match parallel {
                true => (0..outputs.div_ceil(BLOCK)).into_par_iter().for_each(run),
                false => (0..outputs.div_ceil(BLOCK)).for_each(run),
            }
        }
        BUFFER.set(buffer);
        // SAFETY: blocks of rows and of outputs cover all elements, and each block has written its own.
        unsafe { y.set_len(rows * outputs) };
        y
    }
}

thread_local! {
    /// Room for packed rows: new memory for every product would cost as much as to fill it.
    static BUFFER: Cell<Vec<u32>> = const { Cell::new(vec![]) };
}

/// So many elements from the beginning of a cache line on: tiles that are not whole lines take twice as long.
fn aligned(buffer: &mut Vec<u32>, len: usize) -> &mut [u32] {
    if buffer.len() < len + LINE {
        *buffer = vec![0; len + LINE];
    }
    let skipped = buffer.as_ptr().align_offset(4 * LINE).min(LINE);
    &mut buffer[skipped..][..len]
}

/// Whether the processor has tiles, products of bf16, and what the numbers around them are moved with.
fn has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    // SAFETY: every x86-64 has the instruction. Compilers from 1.94 on know that.
    #[allow(unused_unsafe)]
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    features & (BF16 | TILE) == BF16 | TILE
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bf16")
}

/// Tiles are large, so that Linux saves them only for processes that have asked for it.
fn is_granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: touches no memory. A kernel that knows nothing of it, or whose machine has no tiles, says so.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// The product of some rows of `x`, packed in groups of 16, on its way.
struct Product<'a> {
    x: &'a [f32],
    k: usize,
    rows: Range<usize>,
    weights: &'a [bf16],
    width: usize,
    group: usize,
    packed: &'a [u32],
    y: Columns<'a>,
}

impl Product<'_> {
    /// # Safety
    /// The process may use AMX, and nobody else writes these outputs meanwhile.
    #[target_feature(enable = "avx512f")]
    unsafe fn run(&self, outputs: Range<usize>) {
        let mut finite = true;
        for first in outputs.clone().step_by(OUTPUTS) {
            let outputs = first..outputs.end.min(first + OUTPUTS);
            let panel = Panel::new(&self.weights[outputs.start * self.k..outputs.end * self.k], self.k);
            let ahead = self.weights.as_ptr().wrapping_add(outputs.end * self.k);
            for (pair, row) in self.rows.clone().step_by(2 * SIDE).enumerate() {
                let x = |i: usize| &self.packed[(2 * pair + i) * self.group..][..self.group];
                let mut sums = [[_mm512_setzero_si512(); SIDE]; 4];
                // SAFETY: what the caller promises.
                unsafe {
                    if row + SIDE < self.rows.end {
                        panel.add_products_twice(
                            ahead.wrapping_add(pair * self.k * 8),
                            [x(0), x(1)],
                            &mut sums,
                        );
                    } else if let Some(sums) = sums.first_chunk_mut() {
                        panel.add_products(ahead, x(0), self.width, sums);
                    }
                }
                for (i, sums) in sums.iter().enumerate() {
                    let (row, output) = (row + i / 2 * SIDE, outputs.start + i % 2 * SIDE);
                    let (rows, outputs) =
                        (row..self.rows.end.min(row + SIDE), output..outputs.end.min(output + SIDE));
                    if !rows.is_empty() && !outputs.is_empty() {
                        // SAFETY: nobody else's elements.
                        finite &= unsafe { self.store(rows, outputs, sums) };
                    }
                }
            }
        }
        if !finite {
            // SAFETY: nobody else's elements, which have been written above.
            self.rows.clone().for_each(|row| unsafe { self.mend(row, outputs.clone()) });
        }
    }

    /// Says whether all sums are finite.
    ///
    /// # Safety
    /// Nobody else writes these elements of the result meanwhile.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(&self, rows: Range<usize>, outputs: Range<usize>, sums: &Sums) -> bool {
        let exponent = _mm512_set1_epi32(0x7f80_0000);
        let mut special = 0;
        for (row, line) in rows.zip(pack::transposed(*sums)) {
            special |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(line, exponent), exponent);
            let to = self.y.part(row, outputs.clone());
            // SAFETY: nobody else's elements, as the caller promises, and only as many as there are.
            unsafe { _mm512_mask_storeu_epi32(to.cast(), pack::first_lanes(outputs.len()), line) };
        }
        special == 0
    }

    /// Pieces of infinities and of the largest numbers have no meaning, so that sums with them are not finite: these are
    /// taken again in f32.
    ///
    /// # Safety
    /// These elements of the result have been written, and nobody else writes them meanwhile.
    unsafe fn mend(&self, row: usize, outputs: Range<usize>) {
        // SAFETY: elements that hold numbers, and nobody else's.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.part(row, outputs.clone()), outputs.len()) };
        let (k, mut output) = (self.k, outputs.start);
        for run in y.chunk_by_mut(|a, b| a.is_finite() == b.is_finite()) {
            let end = output + run.len();
            if !run[0].is_finite() {
                let (x, weights) = (&self.x[row * k..][..k], &self.weights[output * k..end * k]);
                run.copy_from_slice(&project_as(x, 1, weights, run.len()));
            }
            output = end;
        }
    }
}
