//! Short convolutions, see `cla_short_conv` in `cuda/layers.h`.

use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

use super::sums::Columns;
use super::{MOST_BLOCKS, ffi, numbers, only_gradient};
use crate::autograd::{self, Function};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held};
use crate::nn::fused::ShortConv;

/// In a block.
const THREADS: usize = 32 * ffi::CONV_PIECES;
/// Tokens that a warp goes over: as few as this, to have threads enough, and no more, where there are plenty.
const SHORTEST_PIECE: usize = 8;
const LONGEST_PIECE: usize = 64;
/// Threads that a multiprocessor should have to do, before pieces get longer.
const THREADS_EACH: usize = 1024;

const NAME: &str = "short_conv";

/// Whether there is a kernel for so many taps.
pub(crate) fn takes_width(width: usize) -> bool {
    (1..=ffi::MOST_TAPS).contains(&width)
}

/// As `nn::fused::short_conv`, for arguments that it has checked: `xs` and `past` of one dtype, in which the result is.
pub(crate) fn short_conv(
    conv: ShortConv,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    past: Option<&Tensor>,
) -> Result<Tensor> {
    let op = Convolve { bias: bias.is_some(), past: past.is_some(), of: Sequences::new(conv, xs)? };
    let inputs = [
        Some(op.of.batched(xs)?),
        Some(weight.contiguous()?),
        bias.map(Tensor::contiguous).transpose()?,
        past.cloned(),
    ];
    let inputs: Vec<Tensor> = inputs.into_iter().flatten().collect();
    match autograd::apply(op, &inputs)?.pop() {
        Some(ys) if ys.dims() == xs.dims() => Ok(ys),
        Some(ys) => ys.reshape(xs.shape()),
        None => bail!("{NAME}: no result"),
    }
}

/// Both, of tensors without a graph, by one kernel; nothing where sequences are packed, as some may be empty.
pub(crate) fn short_conv_and_last(
    conv: &ShortConv,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    past: Option<&Tensor>,
) -> Result<Option<(Tensor, Tensor)>> {
    let of = match Sequences::batches(conv, xs) {
        Some((batch, tokens)) if tokens > 0 => {
            Sequences { conv: conv.clone(), batch, tokens, cu_seqlens: None }
        }
        _ => return Ok(None),
    };
    let machine = Machine::of(xs.device())?;
    let mut out = Buffer::new(&machine, xs.dtype(), xs.shape())?;
    let mut last = Buffer::new(&machine, xs.dtype(), of.past_shape().as_slice())?;
    let (weight, bias) = (weight.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
    let call = Call {
        weight: Some(&weight),
        bias: bias.as_ref(),
        out: Some(&mut out),
        last: Some(&mut last),
        ..Call::new(xs, past)
    };
    of.run(&machine, Kernel::Forward, call)?;
    Ok(Some((out.into_tensor(), last.into_tensor())))
}

/// As `nn::fused::last_rows`.
pub(crate) fn last_rows(conv: &ShortConv, xs: &Tensor, past: Option<&Tensor>) -> Result<Tensor> {
    let op = Cache(Sequences::new(conv.clone(), xs)?);
    let xs = op.0.batched(xs)?;
    let inputs: Vec<Tensor> = [Some(xs), past.cloned()].into_iter().flatten().collect();
    match autograd::apply(op, &inputs)?.pop() {
        Some(last) => Ok(last),
        None => bail!("{NAME}: no result"),
    }
}

/// The sequences of a call.
struct Sequences {
    conv: ShortConv,
    batch: usize,
    tokens: usize,
    /// If they lie one after the other in one batch entry.
    cu_seqlens: Option<Tensor>,
}

impl Sequences {
    fn new(conv: ShortConv, xs: &Tensor) -> Result<Self> {
        let rows: usize = conv.sequences.iter().map(|rows| rows.len()).sum();
        if let Some((batch, tokens)) = Self::batches(&conv, xs) {
            return Ok(Self { conv, batch, tokens, cu_seqlens: None });
        }
        if rows > u32::MAX as usize {
            bail!("{NAME}: packed sequences of {rows} tokens, there can be {} at most", u32::MAX);
        }
        let ends = conv.sequences.iter().map(|rows| rows.end as u32);
        let cu: Vec<u32> = std::iter::once(0).chain(ends).collect();
        let cu_seqlens = Some(Tensor::from_slice(&cu, cu.len(), xs.device())?);
        Ok(Self { conv, batch: 1, tokens: rows, cu_seqlens })
    }

    /// B and T, if each batch entry is a sequence.
    fn batches(conv: &ShortConv, xs: &Tensor) -> Option<(usize, usize)> {
        let (batch, tokens, _) = xs.dims3().ok()?;
        let whole = |(n, rows): (usize, &std::ops::Range<usize>)| *rows == (n * tokens..(n + 1) * tokens);
        let all = batch == conv.sequences.len() && conv.sequences.iter().enumerate().all(whole);
        all.then_some((batch, tokens))
    }

    /// `xs` as `[B, T, C]`, B being 1 for packed sequences.
    fn batched(&self, xs: &Tensor) -> Result<Tensor> {
        let shape = (self.batch, self.tokens, self.conv.channels);
        if xs.dims() == [shape.0, shape.1, shape.2] { Ok(xs.clone()) } else { xs.reshape(shape) }
    }

    /// The shape of what was before each sequence.
    fn past_shape(&self) -> [usize; 3] {
        [self.conv.sequences.len(), self.conv.width - 1, self.conv.channels]
    }

    /// Tokens that a warp goes over, for threads of `channels` channels each.
    fn piece(&self, machine: &Machine, channels: usize) -> Result<usize> {
        let threads = self.conv.channels.div_ceil(channels) * self.batch;
        let least = THREADS_EACH * machine.card()?.multiprocessors;
        let mut piece = LONGEST_PIECE;
        while piece > SHORTEST_PIECE && threads.saturating_mul(self.tokens.div_ceil(piece)) < least {
            piece /= 2;
        }
        Ok(piece)
    }

    /// Queues a kernel.
    fn run(&self, machine: &Machine, kernel: Kernel, of: Call) -> Result<()> {
        let conv = &self.conv;
        let channels = match kernel {
            Kernel::Backward => ffi::CONV_BACKWARD_CHANNELS,
            _ => 16 / of.x.dtype().size_in_bytes(),
        };
        let piece = self.piece(machine, channels)?;
        let tiles = conv.channels.div_ceil(channels * ffi::CONV_LANES);
        let pieces = self.tokens.div_ceil(piece * ffi::CONV_PIECES).saturating_mul(self.batch);
        let before = conv.sequences.len().saturating_mul(conv.width - 1);
        let of_past = before.saturating_mul(conv.channels.div_ceil(channels)).div_ceil(THREADS);
        // Channels are counted in 32 bits, to the end of a tile.
        let of_tiles = tiles.saturating_mul(channels * ffi::CONV_LANES);
        let most = [tiles.saturating_mul(pieces), of_past, of_tiles, conv.sequences.len()];
        if most.iter().any(|n| *n > MOST_BLOCKS) {
            bail!(
                "{NAME}: B = {}, T = {}, C = {}, N = {} are more blocks than a launch takes, {MOST_BLOCKS}",
                self.batch,
                self.tokens,
                conv.channels,
                conv.sequences.len()
            );
        }
        let held = [Some(of.x), of.past, of.grad_out, of.weight, of.bias, self.cu_seqlens.as_ref()];
        let held = held.map(|x| x.map(Held::new));
        let [x, past, grad_out, weight, bias, cu_seqlens] = held.each_ref().map(Option::as_ref);
        let mut at = Addresses::new(machine);
        let call = ffi::ShortConv {
            x: at.strided(x, strides(Some(of.x))?)?,
            past: at.strided(past, strides(of.past)?)?,
            grad_out: at.strided(grad_out, strides(of.grad_out)?)?,
            out: at.out_rows(of.out)?,
            last: at.out_rows(of.last)?,
            dx: at.out_rows(of.dx)?,
            dpast: at.out_rows(of.dpast)?,
            weight: numbers(&mut at, weight)?,
            bias: numbers(&mut at, bias)?,
            partial: at.out_numbers(of.partial)?,
            channels: conv.channels as i32,
            width: conv.width as i32,
            silu: conv.silu.into(),
            cu_seqlens: at.numbers(cu_seqlens)?,
            sequences: conv.sequences.len() as i32,
            batch: self.batch as i64,
            tokens: self.tokens as i64,
            piece: piece as i64,
        };
        let (name, launch) = kernel.launch();
        // SAFETY: the addresses, strides and sizes are those of live tensors of one call, which `nn::fused` has checked; all
        // are held until the kernels are queued, and the stream orders whatever comes after.
        let code = unsafe { launch(&call, machine.stream()) };
        if code != 0 {
            bail!(
                "{NAME}: {name} could not be launched, CUDA error {code} (B = {}, T = {}, C = {}, W = {}, N = {})",
                self.batch,
                self.tokens,
                conv.channels,
                conv.width,
                conv.sequences.len()
            );
        }
        Ok(())
    }
}

/// Of `[B, T, C]`, as the kernels have four dimensions.
fn strides(x: Option<&Tensor>) -> Result<[usize; 4]> {
    match x.map(Tensor::stride) {
        None => Ok([0; 4]),
        Some([batch, token, channel]) => Ok([*batch, *token, 0, *channel]),
        Some(strides) => bail!("{NAME}: a tensor of {} dimensions, there must be 3", strides.len()),
    }
}

type Launch = unsafe extern "C" fn(*const ffi::ShortConv, *mut std::ffi::c_void) -> i32;

#[derive(Debug, Clone, Copy)]
enum Kernel {
    Forward,
    Backward,
    Cache,
}

impl Kernel {
    fn launch(self) -> (&'static str, Launch) {
        match self {
            Self::Forward => ("cla_short_conv_forward", ffi::cla_short_conv_forward),
            Self::Backward => ("cla_short_conv_backward", ffi::cla_short_conv_backward),
            Self::Cache => ("cla_short_conv_cache", ffi::cla_short_conv_cache),
        }
    }
}

/// What a kernel reads, and what it writes.
struct Call<'a> {
    x: &'a Tensor,
    past: Option<&'a Tensor>,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    grad_out: Option<&'a Tensor>,
    out: Option<&'a mut Buffer>,
    last: Option<&'a mut Buffer>,
    dx: Option<&'a mut Buffer>,
    dpast: Option<&'a mut Buffer>,
    partial: Option<&'a mut Buffer>,
}

impl<'a> Call<'a> {
    fn new(x: &'a Tensor, past: Option<&'a Tensor>) -> Self {
        Self {
            x,
            past,
            weight: None,
            bias: None,
            grad_out: None,
            out: None,
            last: None,
            dx: None,
            dpast: None,
            partial: None,
        }
    }
}

/// The outputs.
struct Convolve {
    of: Sequences,
    bias: bool,
    past: bool,
}

impl Convolve {
    fn call<'a>(&self, inputs: &'a [Tensor]) -> Call<'a> {
        let mut rest = inputs[2..].iter();
        let bias = if self.bias { rest.next() } else { None };
        Call { weight: Some(&inputs[1]), bias, ..Call::new(&inputs[0], rest.next()) }
    }
}

impl Function for Convolve {
    fn name(&self) -> &'static str {
        NAME
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let x = &inputs[0];
        let machine = Machine::of(x.device())?;
        let mut out = Buffer::new(&machine, x.dtype(), x.shape())?;
        self.of.run(&machine, Kernel::Forward, Call { out: Some(&mut out), ..self.call(inputs) })?;
        Ok(vec![out.into_result()])
    }

    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad_out = only_gradient(NAME, grads)?;
        let (x, conv) = (&inputs[0], &self.of.conv);
        let machine = Machine::of(x.device())?;
        let [of_weight, of_bias, of_past] = [1, 2, 2 + usize::from(self.bias)];
        let wants = |there: bool, index: usize| there && wanted[index];
        let mut dx = Buffer::new(&machine, x.dtype(), x.shape())?;
        let mut dpast = match wants(self.past, of_past) {
            true => Some(Buffer::new(&machine, x.dtype(), self.of.past_shape().as_slice())?),
            false => None,
        };
        let sums = (conv.width + 1) * conv.channels;
        let piece = self.of.piece(&machine, ffi::CONV_BACKWARD_CHANNELS)?;
        let groups = self.of.batch * self.of.tokens.div_ceil(piece * ffi::CONV_PIECES);
        let mut partial = match wants(true, of_weight) || wants(self.bias, of_bias) {
            true => Some(Buffer::new(&machine, DType::F32, (groups, sums))?),
            false => None,
        };
        let call = Call {
            grad_out: Some(grad_out),
            dx: Some(&mut dx),
            dpast: dpast.as_mut(),
            partial: partial.as_mut(),
            ..self.call(inputs)
        };
        self.of.run(&machine, Kernel::Backward, call)?;
        let partial = partial.map(Buffer::into_tensor);
        let taps = conv.width * conv.channels;
        let sums = |index: usize, from: usize, columns: usize| -> Result<Option<Tensor>> {
            let (Some(of), true) = (&partial, wanted[index]) else { return Ok(None) };
            let (x, columns) = (&inputs[index], Columns { of, from, columns });
            Ok(Some(columns.sums(NAME, &machine, x.dtype(), x.dims())?.into_tensor()))
        };
        let mut found = vec![Some(dx.into_tensor()), sums(of_weight, 0, taps)?];
        if self.bias {
            found.push(sums(of_bias, taps, conv.channels)?);
        }
        if self.past {
            found.push(dpast.map(Buffer::into_tensor));
        }
        Ok(found.into_iter().zip(wanted).map(|(grad, wanted)| grad.filter(|_| *wanted)).collect())
    }
}

/// What the next call has to know. A function of its own, as a training step that has no use for it takes no gradient.
struct Cache(Sequences);

impl Function for Cache {
    fn name(&self) -> &'static str {
        "short_conv_cache"
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<(Storage, Shape)>> {
        let machine = Machine::of(inputs[0].device())?;
        let mut last = Buffer::new(&machine, inputs[0].dtype(), self.0.past_shape().as_slice())?;
        let call = Call { last: Some(&mut last), ..Call::new(&inputs[0], inputs.get(1)) };
        self.0.run(&machine, Kernel::Cache, call)?;
        Ok(vec![last.into_result()])
    }

    /// Of copies, so copies: by Candle, as this is for sequences that are trained in pieces alone.
    fn backward(
        &self,
        inputs: &[Tensor],
        grads: &[Option<Tensor>],
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = only_gradient(self.name(), grads)?;
        let [_, before, channels] = self.0.past_shape();
        let zeros = |rows: usize| Tensor::zeros((rows, channels), grad.dtype(), grad.device());
        let (mut of_xs, mut of_past) = (Vec::new(), Vec::new());
        for (index, rows) in self.0.conv.sequences.iter().enumerate() {
            let (grad, reached) = (grad.get(index)?, rows.len().min(before));
            of_xs.push(zeros(rows.len() - reached)?);
            of_xs.push(grad.narrow(0, before - reached, reached)?);
            of_past.push(zeros(reached)?);
            of_past.push(grad.narrow(0, 0, before - reached)?);
        }
        let gradient = |(parts, input): (Vec<Tensor>, &Tensor)| {
            let parts: Vec<Tensor> = parts.into_iter().filter(|x| x.elem_count() > 0).collect();
            match parts.is_empty() {
                true => input.zeros_like(),
                false => Tensor::cat(&parts, 0)?.reshape(input.shape()),
            }
        };
        let found = [of_xs, of_past].into_iter().zip(inputs).zip(wanted);
        found.map(|(parts, wanted)| wanted.then(|| gradient(parts)).transpose()).collect()
    }
}
