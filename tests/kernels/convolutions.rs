//! The short convolution on the kernels, against its definition in f64.

use crate::compare::{close, inner, values};
use crate::kernels::limits;
use crate::on_kernels;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_linear_attn::nn::{ShortConvOptions, short_conv};
use rand::{Rng, SeedableRng, rngs::StdRng};

#[test]
fn a_bias_of_another_size_is_refused() {
    for bias in [&[8][..], &[1, 64]] {
        let found = on_kernels(|device| {
            let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, device);
            let (xs, weight, bias) = (zeros(&[1, 8, 64])?, zeros(&[64, 1, 4])?, zeros(bias)?);
            short_conv(&xs, &weight, Some(&bias), &ShortConvOptions::default())
        });
        let refusal = found.unwrap_err().to_string();
        assert!(refusal.contains("bias: shape is"), "{refusal}");
    }
}

pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// How the input, the past and the gradient of the output lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    Contiguous,
    /// Channels from this one on of 16 more.
    Window(usize),
    /// Tokens and channels swapped.
    Swapped,
}

#[derive(Debug, Clone)]
pub struct Convolution {
    pub batch: usize,
    pub tokens: usize,
    pub cu_seqlens: Option<Vec<u32>>,
    pub channels: usize,
    pub width: usize,
    pub silu: bool,
    pub bias: bool,
    pub past: bool,
    pub dtype: DType,
    pub weight_dtype: DType,
    pub scale: f64,
    pub lies: Lies,
}

impl Default for Convolution {
    fn default() -> Self {
        Self {
            batch: 2,
            tokens: 70,
            cu_seqlens: None,
            channels: 40,
            width: 4,
            silu: true,
            bias: true,
            past: true,
            dtype: DType::F32,
            weight_dtype: DType::F32,
            scale: 1.,
            lies: Lies::Contiguous,
        }
    }
}

/// What goes in: x, weight, bias, past and the gradients of y and of the last rows, on the CPU.
pub struct Numbers {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor,
    of_y: Tensor,
    of_last: Tensor,
}

/// What comes out, in the order of [`NAMES`].
pub type Results = Vec<Option<Tensor>>;
const NAMES: [&str; 6] = ["y", "last", "dx", "dweight", "dbias", "dpast"];

impl Convolution {
    fn sequences(&self) -> Vec<(usize, usize)> {
        match &self.cu_seqlens {
            Some(cu) => cu.windows(2).map(|w| (w[0] as usize, w[1] as usize)).collect(),
            None => (0..self.batch).map(|n| (n * self.tokens, (n + 1) * self.tokens)).collect(),
        }
    }

    pub fn numbers(&self) -> Result<Numbers> {
        let mut rng = StdRng::seed_from_u64((self.channels * 100 + self.width * 10 + self.tokens) as u64);
        let mut random = |dims: &[usize], scale: f64, dtype: DType| {
            let values: Vec<f64> =
                (0..dims.iter().product()).map(|_| rng.random_range(-2.0..2.) * scale).collect();
            Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
        };
        let rows = [self.batch, self.tokens, self.channels];
        let past = [self.sequences().len(), self.width - 1, self.channels];
        Ok(Numbers {
            x: random(&rows, self.scale, self.dtype)?,
            weight: random(&[self.channels, 1, self.width], 0.5, self.weight_dtype)?,
            bias: random(&[self.channels], 0.5, self.weight_dtype)?,
            past: random(&past, self.scale, self.dtype)?,
            of_y: random(&rows, 1., self.dtype)?,
            of_last: random(&past, 1., self.dtype)?,
        })
    }

    /// Results, and the gradients of what is tracked: of all that there is.
    pub fn run(&self, numbers: &Numbers, device: &Device) -> Result<Results> {
        let on = |x: &Tensor| x.to_device(device);
        // A tensor that is not empty, so that it can have a gradient on a GPU.
        let empty = self.batch * self.tokens == 0;
        let (x, past) = (self.lies.base(&on(&numbers.x)?)?, self.lies.base(&on(&numbers.past)?)?);
        let (x_var, past_var) = (Var::from_tensor(&x)?, Var::from_tensor(&past)?);
        let weight = Var::from_tensor(&on(&numbers.weight)?)?;
        let bias = Var::from_tensor(&on(&numbers.bias)?)?;
        let x = if empty { x } else { x_var.as_tensor().clone() };
        let past = if self.width > 1 { past_var.as_tensor().clone() } else { past };
        let (x, past) = (self.lies.view(&x, self.channels)?, self.lies.view(&past, self.channels)?);
        let opts = ShortConvOptions {
            silu: self.silu,
            past: self.past.then_some(&past),
            cu_seqlens: self.cu_seqlens.as_deref(),
        };
        let bias_given = self.bias.then(|| bias.as_tensor());
        let (y, last) = short_conv(&x, &weight, bias_given, &opts)?;
        self.check_detached((&x, &weight, bias_given, &opts), [&y, &last])?;
        let mut loss = Vec::new();
        if !empty {
            // Through a layout of its own, as what comes next in a layer may have.
            let of_y = self.lies.view(&self.lies.base(&on(&numbers.of_y)?)?, self.channels)?;
            loss.push(match self.lies {
                Lies::Contiguous => inner(&y, &of_y)?,
                _ => inner(&y.transpose(1, 2)?, &of_y.transpose(1, 2)?)?,
            });
        }
        if last.elem_count() > 0 {
            loss.push(inner(&last, &on(&numbers.of_last)?)?);
        }
        let mut results = vec![Some(y.to_device(&Device::Cpu)?), Some(last.to_device(&Device::Cpu)?)];
        if loss.is_empty() || (empty && !self.past) {
            results.resize(NAMES.len(), None);
            return Ok(results);
        }
        let total = loss.iter().skip(1).try_fold(loss[0].clone(), |sum, x| sum + x)?;
        let grads = total.backward()?;
        let grad = |var: &Var| grads.get(var).map(|x| x.to_device(&Device::Cpu)).transpose();
        let viewed = |var: &Var| grad(var)?.map(|x| self.lies.view(&x, self.channels)).transpose();
        results.extend([viewed(&x_var)?, grad(&weight)?, grad(&bias)?, viewed(&past_var)?]);
        Ok(results)
    }

    /// Without a graph, where one kernel may find both, the results are the same to the bit.
    fn check_detached(
        &self,
        (x, weight, bias, opts): (&Tensor, &Tensor, Option<&Tensor>, &ShortConvOptions),
        wanted: [&Tensor; 2],
    ) -> Result<()> {
        let (bias, past) = (bias.map(Tensor::detach), opts.past.map(Tensor::detach));
        let opts = ShortConvOptions { past: past.as_ref(), ..*opts };
        let (y, last) = short_conv(&x.detach(), &weight.detach(), bias.as_ref(), &opts)?;
        for ((name, found), wanted) in NAMES.iter().zip([&y, &last]).zip(wanted) {
            assert_eq!(found.dims(), wanted.dims(), "{self:?}: {name}");
            let bits = |x: &Tensor| values(&x.to_device(&Device::Cpu)?);
            assert!(bits(found)? == bits(wanted)?, "{self:?}: {name} without a graph");
        }
        Ok(())
    }

    /// By the definition.
    fn expected(&self, n: &Numbers) -> Result<[Vec<f64>; 6]> {
        let (c_all, w, before) = (self.channels, self.width, self.width - 1);
        let [x, weight, bias, past, of_y, of_last] =
            [&n.x, &n.weight, &n.bias, &n.past, &n.of_y, &n.of_last].map(values);
        let (x, weight, bias, past, of_y, of_last) = (x?, weight?, bias?, past?, of_y?, of_last?);
        let zeros = |like: &[f64]| vec![0f64; like.len()];
        let (mut y, mut last, mut dx, mut dweight, mut dbias, mut dpast) =
            (zeros(&x), zeros(&past), zeros(&x), zeros(&weight), zeros(&bias), zeros(&past));
        for (s, (start, end)) in self.sequences().into_iter().enumerate() {
            for c in 0..c_all {
                // Token t of the sequence, or -t of its past: whether and where it is.
                let at = |t: i64| match t < 0 {
                    true => (true, (s * before + (t + before as i64) as usize) * c_all + c),
                    false => (false, (start + t as usize) * c_all + c),
                };
                let value = |t: i64| match at(t) {
                    (true, _) if !self.past => 0.,
                    (true, i) => past[i],
                    (false, i) => x[i],
                };
                let mut add = |t: i64, grad: f64| match at(t) {
                    (true, i) => dpast[i] += grad,
                    (false, i) => dx[i] += grad,
                };
                for t in 0..(end - start) as i64 {
                    let i = (start + t as usize) * c_all + c;
                    let taps = (0..w).map(|tap| (tap, t - before as i64 + tap as i64));
                    let mut z = if self.bias { bias[c] } else { 0. };
                    taps.clone().for_each(|(tap, from)| z += weight[c * w + tap] * value(from));
                    let sigmoid = 1. / (1. + (-z).exp());
                    let slope = if self.silu { sigmoid * (1. + z * (1. - sigmoid)) } else { 1. };
                    y[i] = if self.silu { z * sigmoid } else { z };
                    let dz = of_y[i] * slope;
                    dbias[c] += dz;
                    for (tap, from) in taps {
                        dweight[c * w + tap] += dz * value(from);
                        add(from, dz * weight[c * w + tap]);
                    }
                }
                for j in 0..before {
                    let (i, t) =
                        ((s * before + j) * c_all + c, (end - start) as i64 - before as i64 + j as i64);
                    last[i] = value(t);
                    add(t, of_last[i]);
                }
            }
        }
        Ok([y, last, dx, dweight, dbias, dpast])
    }

    pub fn check(&self) {
        let numbers = self.numbers().unwrap();
        on_kernels(|device| self.run(&numbers, device))
            .and_then(|results| self.compare(&numbers, &results))
            .unwrap_or_else(|e| panic!("{self:?}: {e}"));
    }

    /// Fails unless the results are those of the definition.
    pub fn compare(&self, numbers: &Numbers, results: &[Option<Tensor>]) -> Result<()> {
        let limits = limits(self.dtype);
        let of_weight = crate::kernels::limits(self.weight_dtype).grad.max(limits.f32_grad.min(1e-3));
        for (i, (result, want)) in results.iter().zip(self.expected(numbers)?).enumerate() {
            let there = [true, true, true, true, self.bias, self.past && self.width > 1][i];
            let dtype = if i == 3 || i == 4 { self.weight_dtype } else { self.dtype };
            let limit = [limits.out, 0., limits.grad, of_weight, of_weight, limits.grad][i];
            match result {
                Some(x) if there => close(x, &want, dtype, limit, NAMES[i])?,
                Some(_) => candle_core::bail!("{} is a gradient of nothing", NAMES[i]),
                // No gradient is one of zeros.
                None if want.iter().all(|x| *x == 0.) || !there => {}
                None => candle_core::bail!("there is no {}", NAMES[i]),
            }
        }
        Ok(())
    }
}

impl Lies {
    /// A tensor of which [`Lies::view`] is `x`.
    pub fn base(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Contiguous => Ok(x.clone()),
            Self::Window(start) => {
                let rows = |n: usize| {
                    let mut dims = x.dims().to_vec();
                    *dims.last_mut().unwrap_or(&mut 0) = n;
                    Tensor::full(f32::NAN, dims, x.device())?.to_dtype(x.dtype())
                };
                Tensor::cat(&[&rows(start)?, x, &rows(16 - start)?], D::Minus1)
            }
            Self::Swapped => x.transpose(D::Minus1, D::Minus2)?.contiguous(),
        }
    }

    /// The `width` elements of each row that are meant.
    pub fn view(self, base: &Tensor, width: usize) -> Result<Tensor> {
        match self {
            Self::Contiguous => Ok(base.clone()),
            Self::Window(start) => base.narrow(D::Minus1, start, width),
            Self::Swapped => base.transpose(D::Minus1, D::Minus2),
        }
    }
}

#[test]
fn widths_and_channels_in_every_dtype() {
    for width in 1..=8 {
        for (i, dtype) in DTYPES.into_iter().enumerate() {
            // A few, whole vectors, more than a block has.
            for channels in [1, 24, 300][..if width == 4 { 3 } else { 2 }].iter().copied() {
                let (silu, bias, past) = (width % 2 == 0, i != 1, i != 2);
                Convolution { width, channels, dtype, silu, bias, past, tokens: 37, ..Default::default() }
                    .check();
            }
        }
    }
}

#[test]
fn what_may_be_left_out() {
    for silu in [false, true] {
        for (bias, past) in [(false, false), (false, true), (true, false), (true, true)] {
            for width in [2, 3, 5] {
                Convolution { silu, bias, past, width, channels: 8, ..Default::default() }.check();
            }
        }
    }
}

/// Around the ends of pieces and of what a block has of them, and shorter than the taps are.
#[test]
fn lengths() {
    for tokens in [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 65, 300] {
        for width in [2, 4, 7] {
            Convolution { tokens, width, dtype: DType::BF16, channels: 16, ..Default::default() }.check();
        }
    }
}

#[test]
fn packed_sequences() {
    let all = [
        vec![0, 70],
        vec![0, 0, 1, 3, 3, 30, 64, 70, 70],
        vec![0, 32, 40, 41, 42, 43, 44, 70],
        vec![0, 0, 0],
    ];
    for cu in all {
        for (width, past) in [(2, true), (4, true), (4, false), (6, true)] {
            for dtype in [DType::F32, DType::F16] {
                let tokens = cu[cu.len() - 1] as usize;
                let cu_seqlens = Some(cu.clone());
                Convolution {
                    batch: 1,
                    tokens,
                    cu_seqlens,
                    width,
                    past,
                    dtype,
                    channels: 9,
                    ..Default::default()
                }
                .check();
                let cu_seqlens = Some(cu.clone());
                Convolution { batch: 1, tokens, cu_seqlens, width, past, dtype, ..Default::default() }
                    .check();
            }
        }
    }
}

/// 5 cannot be loaded in pieces, 8 can; with tokens and channels swapped no two channels are neighbours.
#[test]
fn layouts() {
    for lies in [Lies::Window(5), Lies::Window(8), Lies::Swapped] {
        for dtype in DTYPES {
            Convolution { lies, dtype, tokens: 33, ..Default::default() }.check();
        }
        let cu_seqlens = Some(vec![0, 5, 33]);
        Convolution { lies, batch: 1, tokens: 33, cu_seqlens, ..Default::default() }.check();
    }
}

#[test]
fn scales_and_dtypes_of_the_weight() {
    for scale in [1e-3, 30., 1e3] {
        for dtype in DTYPES {
            Convolution { scale, dtype, channels: 16, ..Default::default() }.check();
        }
    }
    for dtype in DTYPES {
        for weight_dtype in [DType::BF16, DType::F16] {
            Convolution { dtype, weight_dtype, ..Default::default() }.check();
            Convolution { dtype, weight_dtype, width: 3, channels: 30, ..Default::default() }.check();
        }
    }
}

/// An input of one sequence must not reach another, nor what is more than W - 1 tokens behind it, whatever it is.
#[test]
fn infinite_inputs_reach_no_further_than_the_taps() {
    for width in [2, 3, 4, 5] {
        let rows = on_kernels(|device| {
            let mut x = vec![0f32; 20];
            (x[0], x[9]) = (f32::INFINITY, f32::INFINITY);
            let x = Tensor::from_vec(x, (1, 20, 1), &Device::Cpu)?.broadcast_as((1, 20, 8))?.contiguous()?;
            let weight = Tensor::ones((8, 1, width), DType::F32, device)?;
            let opts = ShortConvOptions { cu_seqlens: Some(&[0, 10, 20]), ..Default::default() };
            let y = short_conv(&x.to_device(device)?, &weight, None, &opts)?.0;
            y.narrow(2, 3, 1)?.flatten_all()?.to_vec1::<f32>()
        });
        let want = (0..20).map(|t| if t < width || t == 9 { f32::INFINITY } else { 0. });
        assert_eq!(rows.unwrap(), want.collect::<Vec<_>>(), "W = {width}");
    }
}

/// As in decoding: a prompt, then tokens one at a time, the cache carried in between.
#[test]
fn prompt_and_single_tokens() {
    for dtype in DTYPES {
        let case = Convolution { tokens: 21, past: false, dtype, ..Default::default() };
        let numbers = case.numbers().unwrap();
        let (whole, pieces) = on_kernels(|device| {
            let on = |x: &Tensor| x.to_device(device);
            let (x, weight, bias) = (on(&numbers.x)?, on(&numbers.weight)?, on(&numbers.bias)?);
            let run = |x: &Tensor, past: Option<&Tensor>| {
                let opts = ShortConvOptions { silu: true, past, ..Default::default() };
                short_conv(x, &weight, Some(&bias), &opts)
            };
            let (mut ys, mut past) = (Vec::new(), None);
            for (from, len) in std::iter::once((0, 6)).chain((6..21).map(|t| (t, 1))) {
                let (y, last) = run(&x.narrow(1, from, len)?, past.as_ref())?;
                ys.push(y);
                past = Some(last);
            }
            Ok::<_, candle_core::Error>((values(&run(&x, None)?.0)?, values(&Tensor::cat(&ys, 1)?)?))
        })
        .unwrap();
        assert_eq!(whole, pieces, "{dtype:?}");
    }
}

/// More taps than the kernels take are a composition of Candle's operations.
#[test]
fn more_taps_than_the_kernels_take() {
    Convolution { width: 9, tokens: 12, channels: 8, ..Default::default() }.check();
}
