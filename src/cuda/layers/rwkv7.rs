//! RWKV-7 around its operator, see `cla_token_mix`, `cla_rwkv7_keys` and `cla_rwkv7_output` in `cuda/layers.h`. None of these has a
//! gradient: they are for tensors without a graph.

use candle_core::{Result, Tensor, bail};

use super::{MOST_BLOCKS, ffi, numbers, takes};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held};

/// Whether all are where and what the kernels can work on, without a graph, and those of `tokens` of one dtype.
fn takes_frozen(tokens: &[&Tensor], parameters: &[&Tensor]) -> bool {
    let all: Vec<&Tensor> = tokens.iter().chain(parameters).copied().collect();
    let same = tokens.windows(2).all(|x| x[0].dtype() == x[1].dtype());
    takes(&all) && same && !all.iter().any(|x| x.track_op())
}

/// Whether threads of four channels each can share a head of so many.
fn takes_heads(width: usize) -> bool {
    (4..=128).contains(&width) && width.is_power_of_two()
}

/// Copies of those that are not contiguous, in one piece.
fn contiguous<const N: usize>(tensors: [&Tensor; N]) -> Result<[Tensor; N]> {
    let all = tensors.into_iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    all.try_into().map_err(|_| candle_core::Error::msg("as many tensors as given"))
}

/// The address of what a kernel is to fill.
fn out<'a>(at: &mut Addresses<'a>, x: &'a mut Buffer) -> Result<*mut std::ffi::c_void> {
    Ok(at.out_strided(Some(x), [0; 4])?.data)
}

fn check(name: &str, code: i32, dims: &[usize]) -> Result<()> {
    if code != 0 {
        bail!("{name}: the kernel could not be launched, CUDA error {code} ({dims:?})");
    }
    Ok(())
}

fn fits(elements: usize, channels: usize) -> bool {
    channels.is_multiple_of(4)
        && i32::try_from(channels).is_ok()
        && elements / 4 / ffi::RWKV7_THREADS < MOST_BLOCKS
}

/// `xs + mix_i * (the token before - xs)` for each row of `mix: [n, C]`, as `[n, B, T, C]`, and the last tokens, `[B, 1, C]`; nothing if
/// the kernels do not take this. `xs` is `[B, T, C]` and `past`, what was before it, `[B, 1, C]`.
pub(crate) fn mix_tokens(
    xs: &Tensor,
    past: Option<&Tensor>,
    mix: &Tensor,
) -> Result<Option<(Tensor, Tensor)>> {
    let (batch, tokens, channels) = xs.dims3()?;
    let of_tokens: Vec<&Tensor> = [Some(xs), past].into_iter().flatten().collect();
    let shaped = past.is_none_or(|past| past.dims() == [batch, 1, channels])
        && mix.dims() == [mix.dims()[0], channels];
    if !takes_frozen(&of_tokens, &[mix]) || !shaped || tokens == 0 || !fits(xs.elem_count(), channels) {
        return Ok(None);
    }
    let machine = Machine::of(xs.device())?;
    let mixes = mix.dim(0)?;
    let mut mixed = Buffer::new(&machine, xs.dtype(), (mixes, batch, tokens, channels))?;
    let mut last = Buffer::new(&machine, xs.dtype(), (batch, 1, channels))?;
    let [xs, mix] = contiguous([xs, mix])?;
    let past = past.map(Tensor::contiguous).transpose()?;
    let (x, m, p) = (Held::new(&xs), Held::new(&mix), past.as_ref().map(Held::new));
    {
        let mut at = Addresses::new(&machine);
        let call = ffi::TokenMix {
            x: numbers(&mut at, Some(&x))?,
            past: numbers(&mut at, p.as_ref())?,
            mix: numbers(&mut at, Some(&m))?,
            out: out(&mut at, &mut mixed)?,
            last: out(&mut at, &mut last)?,
            batch: batch as i64,
            tokens: tokens as i64,
            channels: channels as i32,
            mixes: mixes as i32,
        };
        // SAFETY: the addresses are those of live contiguous tensors of these sizes, held until the kernel is queued, and the
        // stream orders whatever comes after.
        check("token shift", unsafe { ffi::cla_mix_tokens(&call, machine.stream()) }, xs.dims())?;
    }
    Ok(Some((mixed.into_tensor(), last.into_tensor())))
}

/// What [`rwkv7_keys`] is made of: `k` and `a`, `[B, T, C]`, and parameters of `[C]`.
pub(crate) struct Rwkv7Keys<'a> {
    pub k: &'a Tensor,
    pub a: &'a Tensor,
    pub a_bias: &'a Tensor,
    pub k_k: &'a Tensor,
    pub k_a: &'a Tensor,
    /// Of a head.
    pub width: usize,
    pub eps: f64,
}

/// Keys, what they remove and what replaces it, each `[B, T, C]`; nothing if the kernels do not take this.
pub(crate) fn rwkv7_keys(of: &Rwkv7Keys) -> Result<Option<[Tensor; 3]>> {
    let (channels, rows) = (of.k_k.elem_count(), of.k.elem_count() / of.k_k.elem_count().max(1));
    let parameters = [of.a_bias, of.k_k, of.k_a];
    let shaped = of.k.dims() == of.a.dims()
        && of.k.dims().last() == Some(&channels)
        && channels.is_multiple_of(of.width);
    if !takes_frozen(&[of.k, of.a], &parameters)
        || !shaped
        || parameters.iter().any(|x| x.elem_count() != channels)
        || !takes_heads(of.width)
        || !fits(of.k.elem_count(), channels)
    {
        return Ok(None);
    }
    let machine = Machine::of(of.k.device())?;
    let new = || Buffer::new(&machine, of.k.dtype(), of.k.shape());
    let (mut key, mut remove, mut replace) = (new()?, new()?, new()?);
    let given = contiguous([of.k, of.a, of.k_k, of.k_a, of.a_bias])?;
    let [k, a, k_k, k_a, a_bias] = given.each_ref().map(Held::new);
    {
        let mut at = Addresses::new(&machine);
        let call = ffi::Rwkv7Keys {
            k: numbers(&mut at, Some(&k))?,
            a: numbers(&mut at, Some(&a))?,
            k_k: numbers(&mut at, Some(&k_k))?,
            k_a: numbers(&mut at, Some(&k_a))?,
            a_bias: numbers(&mut at, Some(&a_bias))?,
            key: out(&mut at, &mut key)?,
            remove: out(&mut at, &mut remove)?,
            replace: out(&mut at, &mut replace)?,
            rows: rows as i64,
            channels: channels as i32,
            width: of.width as i32,
            eps: of.eps as f32,
        };
        // SAFETY: as in `mix_tokens`.
        check("rwkv7 keys", unsafe { ffi::cla_make_rwkv7_keys(&call, machine.stream()) }, of.k.dims())?;
    }
    Ok(Some([key, remove, replace].map(Buffer::into_tensor)))
}

/// What [`rwkv7_output`] is made of: tensors of `[B, T, ..]` with C numbers a token, and parameters with C.
pub(crate) struct Rwkv7Output<'a> {
    pub out: &'a Tensor,
    pub r: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub gate: &'a Tensor,
    pub r_k: &'a Tensor,
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    /// Of a head.
    pub width: usize,
    pub eps: f64,
}

/// `(layer_norm(out) weight + bias + (r . (r_k k)) v) gate` in each head, in the shape of the gate; nothing if the kernels do not take
/// this.
pub(crate) fn rwkv7_output(of: &Rwkv7Output) -> Result<Option<Tensor>> {
    let (channels, elements) = (of.weight.elem_count(), of.out.elem_count());
    let (tokens, parameters) = ([of.out, of.r, of.k, of.v, of.gate], [of.r_k, of.weight, of.bias]);
    if !takes_frozen(&tokens, &parameters)
        || tokens.iter().any(|x| x.elem_count() != elements)
        || parameters.iter().any(|x| x.elem_count() != channels)
        || of.gate.dims().last() != Some(&channels)
        || !channels.is_multiple_of(of.width)
        || !takes_heads(of.width)
        || !fits(elements, channels)
    {
        return Ok(None);
    }
    let machine = Machine::of(of.out.device())?;
    let mut found = Buffer::new(&machine, of.out.dtype(), of.gate.shape())?;
    let given = contiguous([of.out, of.r, of.k, of.v, of.gate, of.r_k, of.weight, of.bias])?;
    let [x, r, k, v, gate, r_k, weight, bias] = given.each_ref().map(Held::new);
    {
        let mut at = Addresses::new(&machine);
        let call = ffi::Rwkv7Output {
            x: numbers(&mut at, Some(&x))?,
            r: numbers(&mut at, Some(&r))?,
            k: numbers(&mut at, Some(&k))?,
            v: numbers(&mut at, Some(&v))?,
            gate: numbers(&mut at, Some(&gate))?,
            r_k: numbers(&mut at, Some(&r_k))?,
            weight: numbers(&mut at, Some(&weight))?,
            bias: numbers(&mut at, Some(&bias))?,
            out: out(&mut at, &mut found)?,
            rows: (elements / channels) as i64,
            channels: channels as i32,
            width: of.width as i32,
            eps: of.eps as f32,
        };
        // SAFETY: as in `mix_tokens`.
        check("rwkv7 output", unsafe { ffi::cla_finish_rwkv7(&call, machine.stream()) }, of.out.dims())?;
    }
    Ok(Some(found.into_tensor()))
}
