//! The short causal convolution that most layers of today put behind their projections.

use crate::nn::fused::{self, ShortConv};
use crate::nn::linear::on_gpu;
use crate::nn::normal;
use crate::problem;
use candle_core::{Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// What a [`short_conv`] does besides the sum.
#[derive(Debug, Clone, Copy, Default)]
pub struct ShortConvOptions<'a> {
    /// SiLU after the sum. Default: no.
    pub silu: bool,
    /// The inputs before the first of each sequence, `[N, W - 1, C]`. Default: zeros.
    pub past: Option<&'a Tensor>,
    /// `[0, n1, n1 + n2, ...]`: N sequences lie one after the other in a batch of 1. Default: the batch is the sequences.
    pub cu_seqlens: Option<&'a [u32]>,
}

/// A depthwise causal convolution along the tokens, of a few taps:
///
/// ```text
/// y_t = act(bias + sum_i weight_i * x_{t - W + 1 + i})
/// ```
///
/// Returns `y`, in the shape and dtype of `xs`, and the last `W - 1` inputs of each sequence, `[N, W - 1, C]`. Given back
/// as [`ShortConvOptions::past`], these continue the sequences.
///
/// Computed in f32, in one operation, forward and backward: on a CPU, and on CUDA up to a W of 8. Gradients reach `xs`,
/// `weight`, `bias` and the past, the latter from both results.
///
/// # Arguments
/// * `xs`: `[B, T, C]`, f32, f16 or bf16.
/// * `weight`: `[C, 1, W]`, as a depthwise `Conv1d` has it; W at most 1024.
/// * `bias`: `[C]`.
///
/// # Errors
/// Shapes that disagree, a W that is 0 or too large, `cu_seqlens` that does not begin with 0, decreases or does not end at T.
pub fn short_conv(
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    opts: &ShortConvOptions,
) -> Result<(Tensor, Tensor)> {
    let [batch, tokens, channels] = *xs.dims() else {
        bail!("xs: shape is {:?}, it must be [B, T, C]", xs.dims())
    };
    let [own, _, width] = *weight.dims() else {
        bail!("weight: shape is {:?}, it must be [C, 1, W]", weight.dims())
    };
    check_conv_size(width)?;
    if weight.dims() != [channels, 1, width] {
        bail!("xs: {channels} channels, the convolution has {own}: its weight is {:?}", weight.dims());
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [channels]) {
        bail!("bias: shape is {:?}, it must be [{channels}]", bias.dims());
    }
    if channels == 0 {
        bail!("xs: shape is {:?}, with 0 channels, it must have at least 1", xs.dims());
    }
    let sequences = problem::sequences("short_conv", batch, tokens, opts.cu_seqlens)?;
    let rows = sequences.iter().map(|s| s.batch * tokens + s.tokens.start..s.batch * tokens + s.tokens.end);
    let conv = ShortConv { channels, width, silu: opts.silu, sequences: rows.collect() };
    let past_shape = (conv.sequences.len(), width - 1, channels);
    if let Some(past) = opts.past.filter(|past| past.dims3().ok() != Some(past_shape)) {
        bail!("past: shape is {:?}, it must be {past_shape:?}", past.dims());
    }
    let past = opts.past.map(|past| past.to_dtype(xs.dtype())).transpose()?;
    fused::short_conv_and_last(conv, xs, &weight.squeeze(1)?, bias, past.as_ref())
}

/// [`short_conv`] with its parameters, followed by SiLU.
#[derive(Debug, Clone)]
pub struct ShortConvolution {
    /// `[channels, 1, W]`, as a depthwise `Conv1d` stores it.
    weight: Tensor,
    bias: Option<Tensor>,
    silu: bool,
}

impl ShortConvolution {
    /// Reads `weight` of shape `[channels, 1, width]` and, if asked for, `bias` of shape `[channels]`. A fresh weight is
    /// normal with deviation `stdev`, a fresh bias 0.
    pub fn new(channels: usize, width: usize, bias: bool, stdev: f64, vb: VarBuilder) -> Result<Self> {
        check_conv_size(width)?;
        let weight = vb.get_with_hints((channels, 1, width), "weight", normal(stdev))?;
        let bias = match bias {
            true => Some(vb.get_with_hints(channels, "bias", Init::Const(0.))?),
            false => None,
        };
        Ok(Self { weight, bias, silu: true })
    }

    /// Those of several behind one another in their order, if they lie on a GPU, are alike but for their channels, and not trained.
    pub(crate) fn joined(each: &[Self]) -> Result<Option<Self>> {
        let Some(first) = each.first() else { return Ok(None) };
        let kind =
            |conv: &Self| (conv.weight.dim(2).ok(), conv.weight.dtype(), conv.bias.is_some(), conv.silu);
        let parameters = || each.iter().flat_map(|conv| std::iter::once(&conv.weight).chain(&conv.bias));
        if each.iter().any(|conv| kind(conv) != kind(first))
            || parameters().any(|x| x.track_op() || !on_gpu(x))
        {
            return Ok(None);
        }
        let cat = |parameter: &dyn Fn(&Self) -> Option<Tensor>| {
            Tensor::cat(&each.iter().filter_map(parameter).collect::<Vec<_>>(), 0)
        };
        let bias = first.bias.as_ref().map(|_| cat(&|conv| conv.bias.clone())).transpose()?;
        Ok(Some(Self { weight: cat(&|conv| Some(conv.weight.clone()))?, bias, silu: first.silu }))
    }

    pub(crate) fn channels(&self) -> usize {
        self.weight.dims()[0]
    }

    /// With or without the SiLU at the end.
    pub fn with_silu(mut self, silu: bool) -> Self {
        self.silu = silu;
        self
    }

    /// `xs: [B, T, channels]` to the same shape and dtype, and the last `width - 1` inputs, `[B, width - 1, channels]`.
    /// Given back as `past`, they continue the sequence; without them the inputs before the first are 0.
    pub fn forward(&self, xs: &Tensor, past: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        self.run(xs, past, None)
    }

    /// The same for sequences that may be packed.
    pub(crate) fn run(
        &self,
        xs: &Tensor,
        past: Option<&Tensor>,
        cu_seqlens: Option<&[u32]>,
    ) -> Result<(Tensor, Tensor)> {
        let opts = ShortConvOptions { silu: self.silu, past, cu_seqlens };
        short_conv(xs, &self.weight, self.bias.as_ref(), &opts)
    }
}

pub(crate) fn check_conv_size(width: usize) -> Result<()> {
    match width {
        1..=1024 => Ok(()),
        _ => bail!("conv_size is {width}, it must be from 1 to 1024"),
    }
}
