//! The loops over rows and channels.

use super::ShortConv;
use crate::nn::fused::{sigmoid, silu_slope};
use std::ops::Range;

/// Channels that are worked on at once, so that the rows of a piece stay in the cache.
const CHANNELS: usize = 256;

/// The numbers of one call.
pub(super) struct Numbers<'a> {
    pub xs: &'a [f32],
    /// `[W, C]`: a tap is a vector over the channels.
    pub taps: Vec<f32>,
    pub bias: Option<&'a [f32]>,
    pub past: Option<&'a [f32]>,
}

/// Neighbouring rows of one sequence.
#[derive(Clone)]
pub(super) struct Piece {
    pub sequence: usize,
    pub rows: Range<usize>,
    /// All rows of the sequence.
    pub whole: Range<usize>,
}

/// Where the gradients of a piece go.
pub(super) struct Task<'a> {
    pub piece: Piece,
    pub dx: &'a mut [f32],
    /// Of the sequence that begins with the piece.
    pub dpast: Option<&'a mut [f32]>,
}

impl ShortConv {
    /// The input that tap `tap` multiplies for the output of `row`, if it is not the 0 before a sequence.
    #[inline(always)]
    fn source<'a>(&self, numbers: &Numbers<'a>, piece: &Piece, row: usize, tap: usize) -> Option<&'a [f32]> {
        let (channels, before) = (self.channels, self.width - 1);
        let at = row - piece.whole.start + tap;
        if at >= before {
            let from = (piece.whole.start + at - before) * channels;
            return Some(&numbers.xs[from..from + channels]);
        }
        let from = (piece.sequence * before + at) * channels;
        numbers.past.map(|past| &past[from..from + channels])
    }

    /// The sum of a row before SiLU, for some of the channels.
    #[inline(always)]
    fn sum(&self, numbers: &Numbers, piece: &Piece, row: usize, channels: Range<usize>, y: &mut [f32]) {
        match numbers.bias {
            Some(bias) => y.copy_from_slice(&bias[channels.clone()]),
            None => y.fill(0.),
        }
        // Away from the beginning, and with as many taps as most have, one pass over the channels.
        if row - piece.whole.start + 1 >= self.width {
            match self.width {
                2 => return self.add_taps::<2>(numbers, row, channels, y),
                3 => return self.add_taps::<3>(numbers, row, channels, y),
                4 => return self.add_taps::<4>(numbers, row, channels, y),
                _ => {}
            }
        }
        for tap in 0..self.width {
            let Some(x) = self.source(numbers, piece, row, tap) else { continue };
            let weight = &numbers.taps[tap * self.channels..][channels.clone()];
            add_product(y, weight, &x[channels.clone()]);
        }
    }

    /// All W taps of a row that has W - 1 rows of its sequence before it.
    #[inline(always)]
    fn add_taps<const W: usize>(&self, numbers: &Numbers, row: usize, channels: Range<usize>, y: &mut [f32]) {
        let all = self.channels;
        let taps: [_; W] = std::array::from_fn(|tap| &numbers.taps[tap * all..][channels.clone()][..y.len()]);
        let rows: [_; W] =
            std::array::from_fn(|tap| &numbers.xs[(row + 1 + tap - W) * all..][channels.clone()][..y.len()]);
        for (c, y) in y.iter_mut().enumerate() {
            let mut sum = *y;
            for tap in 0..W {
                sum += taps[tap][c] * rows[tap][c];
            }
            *y = sum;
        }
    }

    #[inline(always)]
    pub(super) fn forward_piece(&self, numbers: &Numbers, piece: &Piece, ys: &mut [f32]) {
        let channels = self.channels;
        for first in (0..channels).step_by(CHANNELS) {
            let some = first..channels.min(first + CHANNELS);
            for (row, y) in piece.rows.clone().zip(ys.chunks_exact_mut(channels)) {
                let y = &mut y[some.clone()];
                self.sum(numbers, piece, row, some.clone(), y);
                if self.silu {
                    y.iter_mut().for_each(|y| *y *= sigmoid(*y));
                }
            }
        }
    }

    /// The gradients of the rows of a piece and, with the first piece of a sequence, of its past. Returns what the piece
    /// adds to those of the taps and the bias, `[W + 1, C]`.
    #[inline(always)]
    pub(super) fn backward_piece(&self, numbers: &Numbers, dy: &[f32], task: &mut Task) -> Vec<f32> {
        let (channels, width) = (self.channels, self.width);
        let Task { piece, dx, dpast } = task;
        let mut sums = vec![0.; (width + 1) * channels];
        // An input reaches the next W - 1 outputs, those of the next piece among them.
        let reached = piece.rows.start..piece.whole.end.min(piece.rows.end + width - 1);
        let mut buffer = vec![0.; reached.len() * channels.min(CHANNELS)];
        for first in (0..channels).step_by(CHANNELS) {
            let some = first..channels.min(first + CHANNELS);
            let len = some.len();
            let at = |row: usize| (row - reached.start) * len..(row - reached.start + 1) * len;
            for row in reached.clone() {
                let dz = &mut buffer[at(row)];
                let dy = &dy[row * channels..][some.clone()];
                if self.silu {
                    self.sum(numbers, piece, row, some.clone(), dz);
                    dz.iter_mut().zip(dy).for_each(|(dz, dy)| *dz = dy * silu_slope(*dz));
                } else {
                    dz.copy_from_slice(dy);
                }
            }
            for row in piece.rows.clone() {
                let dx = &mut dx[(row - piece.rows.start) * channels..][some.clone()];
                for tap in 0..width {
                    let output = row + width - 1 - tap;
                    if output < piece.whole.end {
                        add_product(dx, &numbers.taps[tap * channels..][some.clone()], &buffer[at(output)]);
                    }
                    if let Some(x) = self.source(numbers, piece, row, tap) {
                        let dtap = &mut sums[tap * channels..][some.clone()];
                        add_product(dtap, &x[some.clone()], &buffer[at(row)]);
                    }
                }
                let dbias = &mut sums[width * channels..][some.clone()];
                dbias.iter_mut().zip(&buffer[at(row)]).for_each(|(sum, dz)| *sum += dz);
            }
            let Some(dpast) = dpast else { continue };
            for before in 0..width - 1 {
                let dpast = &mut dpast[before * channels..][some.clone()];
                for tap in 0..=before {
                    let output = piece.whole.start + before - tap;
                    if output < piece.whole.end {
                        add_product(
                            dpast,
                            &numbers.taps[tap * channels..][some.clone()],
                            &buffer[at(output)],
                        );
                    }
                }
            }
        }
        sums
    }
}

#[inline(always)]
fn add_product(sum: &mut [f32], a: &[f32], b: &[f32]) {
    for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
        *sum += a * b;
    }
}
