//! The depthwise causal convolution of a few taps.

mod kernel;

use super::{Held, fits, in_pieces, vectorized};
use crate::autograd::{self, Function};
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use kernel::{Numbers, Piece, Task};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that a thread takes at a time.
const ROWS: usize = 64;

/// What is convolved: sequences of rows of `channels` numbers.
#[derive(Debug, Clone)]
pub(crate) struct ShortConv {
    pub channels: usize,
    pub width: usize,
    /// Whether SiLU follows.
    pub silu: bool,
    /// The rows of each sequence, one after the other from 0 on.
    pub sequences: Vec<Range<usize>>,
}

/// `y_t = act(bias + sum_i weight_i * x_{t - W + 1 + i})` in each channel of each sequence, computed in f32; in the dtype of
/// `xs`.
///
/// `xs: [.., C]`, contiguous or not, `weight: [C, W]`, `bias: [C]`, `past: [N, W - 1, C]`, the rows before the first of
/// each sequence, 0 if not given.
pub(crate) fn short_conv(
    conv: ShortConv,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    past: Option<&Tensor>,
) -> Result<Tensor> {
    let rows: usize = conv.sequences.iter().map(|rows| rows.len()).sum();
    let (channels, width) = (conv.channels, conv.width);
    if xs.elem_count() != rows * channels || xs.dims().last() != Some(&channels) {
        bail!("short_conv: xs is {:?}, it must have {rows} rows of {channels} channels", xs.dims());
    }
    let past_shape = (conv.sequences.len(), width - 1, channels);
    let fit = weight.dims2()? == (channels, width)
        && bias.is_none_or(|bias| bias.dims() == [channels])
        && past.is_none_or(|past| past.dims3().is_ok_and(|shape| shape == past_shape));
    if !fit {
        bail!(
            "short_conv: the weight must be [{channels}, {width}], the bias [{channels}], the past {past_shape:?}"
        );
    }
    // An empty tensor has nothing to say, and no row for each sequence to be cut into.
    let past = past.filter(|_| width > 1).map(|past| past.to_dtype(xs.dtype())).transpose()?;
    let given: Vec<&Tensor> = [Some(xs), Some(weight), bias, past.as_ref()].into_iter().flatten().collect();
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if layers::takes(&given) && layers::takes_width(width) {
        return layers::short_conv(conv, xs, weight, bias, past.as_ref());
    }
    let (bias, past) = (bias.is_some(), past.is_some());
    let given = given.iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<Vec<_>>>()?;
    if !fits(&given.iter().collect::<Vec<_>>()) {
        let mut rest = given[2..].iter();
        let bias = if bias { rest.next() } else { None };
        return composed(&conv, &given[0], &given[1], bias, rest.next())?.to_dtype(xs.dtype());
    }
    let given = given.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let op = Op { conv, shape: xs.shape().clone(), bias, past };
    match autograd::apply(op, &given)?.pop() {
        Some(ys) => ys.to_dtype(xs.dtype()),
        None => bail!("short_conv: no result"),
    }
}

/// Of tensor operations: a product and a sum for every tap.
fn composed(
    conv: &ShortConv,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    past: Option<&Tensor>,
) -> Result<Tensor> {
    let flat = xs.reshape(((), conv.channels))?;
    let taps = weight.t()?.contiguous()?;
    let convolve = |(index, rows): (usize, &Range<usize>)| -> Result<Tensor> {
        let before = match past {
            Some(past) => past.get(index)?,
            None => Tensor::zeros((conv.width - 1, conv.channels), xs.dtype(), xs.device())?,
        };
        let padded = Tensor::cat(&[&before, &flat.narrow(0, rows.start, rows.len())?], 0)?;
        let mut ys = padded.narrow(0, 0, rows.len())?.broadcast_mul(&taps.get(0)?)?;
        for tap in 1..conv.width {
            ys = (ys + padded.narrow(0, tap, rows.len())?.broadcast_mul(&taps.get(tap)?)?)?;
        }
        Ok(ys)
    };
    let whole = |(_, rows): &(usize, &Range<usize>)| !rows.is_empty();
    let parts = conv.sequences.iter().enumerate().filter(whole).map(convolve).collect::<Result<Vec<_>>>()?;
    let mut ys = match parts.is_empty() {
        true => flat,
        false => Tensor::cat(&parts, 0)?,
    };
    if let Some(bias) = bias {
        ys = ys.broadcast_add(bias)?;
    }
    if conv.silu { ys.silu()? } else { ys }.reshape(xs.shape())
}

struct Op {
    conv: ShortConv,
    shape: Shape,
    bias: bool,
    past: bool,
}

impl Op {
    fn pieces(&self) -> Vec<Piece> {
        let pieces = |(sequence, whole): (usize, &Range<usize>)| {
            let whole = whole.clone();
            whole.clone().step_by(ROWS).map(move |start| {
                let rows = start..whole.end.min(start + ROWS);
                Piece { sequence, rows, whole: whole.clone() }
            })
        };
        self.conv.sequences.iter().enumerate().flat_map(pieces).collect()
    }

    fn numbers<'a>(&self, held: &'a [Held]) -> Result<Numbers<'a>> {
        let (channels, width) = (self.conv.channels, self.conv.width);
        let weight = held[1].values()?;
        let taps = transposed(weight, channels, width);
        let bias = self.bias.then(|| held[2].values()).transpose()?;
        let past = self.past.then(|| held[2 + usize::from(self.bias)].values()).transpose()?;
        Ok(Numbers { xs: held[0].values()?, taps, bias, past })
    }
}

/// The columns of a matrix, one after the other.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut y = vec![0.; rows * cols];
    for (col, y) in y.chunks_exact_mut(rows.max(1)).enumerate() {
        for (x, y) in x.chunks_exact(cols).zip(y) {
            *y = x[col];
        }
    }
    y
}

/// One slice of `all` for each piece: they lie one after the other.
fn split<'a>(mut all: &'a mut [f32], pieces: &[Piece], channels: usize) -> Vec<&'a mut [f32]> {
    let mut slices = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (slice, rest) = all.split_at_mut(piece.rows.len() * channels);
        slices.push(slice);
        all = rest;
    }
    slices
}

impl Function for Op {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let held: Vec<Held> = inputs.iter().map(Held::new).collect();
        let numbers = self.numbers(&held)?;
        let pieces = self.pieces();
        let lens = pieces.iter().map(|piece| piece.rows.len() * self.conv.channels);
        let ys = in_pieces(lens, |i, ys| {
            vectorized(
                #[inline(always)]
                || self.conv.forward_piece(&numbers, &pieces[i], ys),
            );
        });
        Ok(vec![(Storage::Cpu(CpuStorage::F32(ys)), self.shape.clone())])
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let Some(Some(dy)) = grads.first() else { bail!("short_conv: a gradient is missing") };
        let dy = dy.contiguous()?;
        let (held, dy) = (inputs.iter().map(Held::new).collect::<Vec<_>>(), &Held::new(&dy));
        let (numbers, dy) = (self.numbers(&held)?, dy.values()?);
        let (channels, width) = (self.conv.channels, self.conv.width);
        let mut dx = vec![0.; numbers.xs.len()];
        let mut dpast = vec![0.; numbers.past.map_or(0, <[f32]>::len)];
        let mut dpasts: Vec<_> = dpast.chunks_mut(((width - 1) * channels).max(1)).map(Some).collect();
        let pieces = self.pieces();
        let slices = split(&mut dx, &pieces, channels);
        let tasks = pieces.into_iter().zip(slices).map(|(piece, dx)| {
            let first = piece.rows.start == piece.whole.start;
            let dpast = dpasts.get_mut(piece.sequence).filter(|_| first).and_then(Option::take);
            Task { piece, dx, dpast }
        });
        let mut tasks: Vec<_> = tasks.collect();
        let parts: Vec<_> = tasks
            .par_iter_mut()
            .map(|task| {
                vectorized(
                    #[inline(always)]
                    || self.conv.backward_piece(&numbers, dy, task),
                )
            })
            .collect();
        drop(tasks);
        let mut sums = vec![0.; (width + 1) * channels];
        for part in parts {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let (dtaps, dbias) = sums.split_at(width * channels);
        let (dweight, dbias) = (transposed(dtaps, width, channels), dbias.to_vec());
        let found = [Some(dx), Some(dweight), self.bias.then_some(dbias), self.past.then_some(dpast)];
        let found = found.into_iter().flatten().zip(inputs).zip(wanted);
        found
            .map(|((values, input), wanted)| match wanted {
                true => Tensor::from_vec(values, input.shape(), &Device::Cpu).map(Some),
                false => Ok(None),
            })
            .collect()
    }
}

/// [`short_conv`] and [`last_rows`].
pub(crate) fn short_conv_and_last(
    conv: ShortConv,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    past: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    {
        let given: Vec<&Tensor> = [Some(xs), Some(weight), bias, past].into_iter().flatten().collect();
        if conv.width > 1
            && layers::takes_width(conv.width)
            && layers::takes(&given)
            && past.is_none_or(|past| past.dtype() == xs.dtype())
            && !given.iter().any(|x| x.track_op())
            && let Some(found) = layers::short_conv_and_last(&conv, xs, weight, bias, past)?
        {
            return Ok(found);
        }
    }
    let last = last_rows(&conv, xs, past)?;
    Ok((short_conv(conv, xs, weight, bias, past)?, last))
}

/// The last `W - 1` rows of every sequence, those of the past included: `[N, W - 1, C]`.
fn last_rows(conv: &ShortConv, xs: &Tensor, past: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    {
        let past = past.filter(|_| conv.width > 1);
        if layers::takes(&[Some(xs), past].into_iter().flatten().collect::<Vec<_>>())
            && past.is_none_or(|past| past.dtype() == xs.dtype())
            && layers::takes_width(conv.width)
        {
            return layers::last_rows(conv, xs, past);
        }
    }
    let (before, channels) = (conv.width - 1, conv.channels);
    let flat = xs.reshape(((), channels))?;
    let last = |(index, rows): (usize, &Range<usize>)| -> Result<Tensor> {
        let new = flat.narrow(0, rows.end - rows.len().min(before), rows.len().min(before))?;
        let old = before - new.dim(0)?;
        if old == 0 {
            return Ok(new);
        }
        let past = match past {
            Some(past) => past.get(index)?.narrow(0, before - old, old)?,
            None => Tensor::zeros((old, channels), xs.dtype(), xs.device())?,
        };
        Tensor::cat(&[&past, &new], 0)
    };
    match conv.sequences.len() {
        0 => Tensor::zeros((0, before, channels), xs.dtype(), xs.device()),
        _ => Tensor::stack(&conv.sequences.iter().enumerate().map(last).collect::<Result<Vec<_>>>()?, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::fused::tests::agree;

    fn conv(channels: usize, width: usize, silu: bool, ends: &[usize]) -> ShortConv {
        let starts = std::iter::once(&0).chain(ends);
        let sequences = starts.zip(ends).map(|(start, end)| *start..*end).collect();
        ShortConv { channels, width, silu, sequences }
    }

    #[test]
    fn agrees_with_its_composition() -> Result<()> {
        let ends: [&[usize]; 5] = [&[1], &[2, 3, 9], &[130], &[0, 64, 64, 129, 130, 130], &[70, 140]];
        for ends in ends {
            for (channels, width) in [(1, 1), (3, 2), (5, 4), (300, 3), (16, 8)] {
                let (rows, past) = ([1, ends[ends.len() - 1], channels], [ends.len(), width - 1, channels]);
                let (weight, offset) = ([channels, width], [channels]);
                for silu in [false, true] {
                    let conv = || conv(channels, width, silu, ends);
                    // Every combination of what may be left out.
                    let mut shapes: Vec<&[usize]> = vec![&rows, &weight];
                    for given in 0..4 {
                        let (bias, history) = (given & 1 == 1, given & 2 == 2 && width > 1);
                        shapes.truncate(2);
                        shapes.extend(bias.then_some(&offset[..]));
                        shapes.extend(history.then_some(&past[..]));
                        let split = |x: &[Tensor]| {
                            let bias = bias.then(|| x[2].clone());
                            (bias.clone(), history.then(|| x[2 + usize::from(bias.is_some())].clone()))
                        };
                        agree(
                            &shapes,
                            |x| {
                                let (bias, past) = split(x);
                                short_conv(conv(), &x[0], &x[1], bias.as_ref(), past.as_ref())
                            },
                            |x| {
                                let (bias, past) = split(x);
                                composed(&conv(), &x[0], &x[1], bias.as_ref(), past.as_ref())
                            },
                        )?;
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn the_last_rows_reach_into_the_past() -> Result<()> {
        let xs = Tensor::arange(0f32, 5., &Device::Cpu)?.reshape((1, 5, 1))?;
        let past = Tensor::new(&[[-2f32, -1.], [-4., -3.], [-6., -5.]], &Device::Cpu)?.unsqueeze(2)?;
        let conv = conv(1, 3, true, &[1, 1, 5]);
        let rows = |past| last_rows(&conv, &xs, past)?.squeeze(2)?.to_vec2::<f32>();
        assert_eq!(rows(Some(&past))?, [[-1., 0.], [-4., -3.], [3., 4.]]);
        assert_eq!(rows(None)?, [[0., 0.], [0., 0.], [3., 4.]]);
        Ok(())
    }
}
