//! HGRN-2 ([Qin et al., 2024](https://arxiv.org/abs/2404.07904)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::heads::{Heads, check_size};
use crate::nn::short_conv::check_conv_size;
use crate::nn::{Activation, LayerCache, Linear, RmsNorm, ShortConvolution};
use crate::{Mode, Output, gla};
use candle_core::{DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// What a [`Hgrn2Attention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct Hgrn2AttentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Key channels of a head; there are as many heads as fit in `hidden_size`. Default: 128.
    pub expand_ratio: usize,
    /// A short convolution, without activation, behind each of the three projections. Default: no.
    pub use_short_conv: bool,
    /// Its width. Default: 4.
    pub conv_size: usize,
    /// Whether it has a bias. Default: no.
    pub conv_bias: bool,
    /// Whether the output norm has a weight. Default: yes.
    pub elementwise_affine: bool,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for Hgrn2AttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            expand_ratio: 128,
            use_short_conv: false,
            conv_size: 4,
            conv_bias: false,
            elementwise_affine: true,
            norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl Hgrn2AttentionConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Heads> {
        let (hidden_size, head_k_dim) = (self.hidden_size, self.expand_ratio);
        check_size("hidden_size", hidden_size)?;
        let num_heads = hidden_size.checked_div(head_k_dim).unwrap_or(0);
        if num_heads == 0 {
            bail!("expand_ratio is {head_k_dim}, it must be from 1 to hidden_size, which is {hidden_size}");
        }
        if !hidden_size.is_multiple_of(num_heads) {
            bail!(
                "expand_ratio is {head_k_dim}: that makes {num_heads} heads, which must divide hidden_size, {hidden_size}"
            );
        }
        check_conv_size(self.conv_size)?;
        let head_v_dim = hidden_size / num_heads;
        Ok(Heads { hidden_size, num_heads, num_kv_heads: num_heads, head_k_dim, head_v_dim })
    }
}

/// What the forget gates of the layers do not fall below: nothing in the first layer, more from layer to layer.
///
/// The bound of a layer is the sum over the layers up to it, without the first, of a softmax over the layers.
#[derive(Debug, Clone)]
pub struct LowerBounds {
    logits: Tensor,
}

impl LowerBounds {
    /// Reads `lower_bounds` of shape `[layers, channels]`, 0 when fresh.
    pub fn new(layers: usize, channels: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self { logits: vb.get_with_hints((layers, channels), "lower_bounds", Init::Const(0.))? })
    }

    /// The bound of a layer, `[channels]` in f32; `None` for the first.
    pub fn of(&self, layer: usize) -> Result<Option<Tensor>> {
        if layer == 0 {
            return Ok(None);
        }
        let shares = candle_nn::ops::softmax(&self.logits.to_dtype(DType::F32)?, 0)?;
        shares.narrow(0, 1, layer)?.sum(0).map(Some)
    }
}

/// [`gla`] with keys that are what the decay leaves over, `k = 1 - exp(g)`, and a norm over all heads together.
///
/// `g = log(b + (1 - b) * sigmoid(f_proj(x)))` with the [lower bound](LowerBounds) b, `q = silu(q_proj(x))`,
/// `v = i_proj(x)`. Parameters: `q_proj`, `f_proj`, `i_proj`, `g_norm`, `o_proj`, and `q_conv1d`, `f_conv1d`, `i_conv1d`
/// with short convolutions.
#[derive(Debug, Clone)]
pub struct Hgrn2Attention {
    heads: Heads,
    projections: [Linear; 3],
    convs: Vec<ShortConvolution>,
    bound: Bound,
    norm: RmsNorm,
    o_proj: Linear,
    mode: Mode,
}

/// The lower bound of a layer.
#[derive(Debug, Clone)]
enum Bound {
    None,
    /// Of parameters that do not change.
    Fixed(Tensor),
    /// Of parameters that are trained.
    Learned(LowerBounds, usize),
}

impl Bound {
    fn new(bounds: Option<(&LowerBounds, usize)>, channels: usize) -> Result<Self> {
        let Some((bounds, layer)) = bounds else { return Ok(Self::None) };
        let (layers, held) = bounds.logits.dims2()?;
        if layer >= layers || (held != channels && layer > 0) {
            bail!(
                "lower_bounds are of {layers} layers of {held} channels, they must be of more than {layer} layers of \
                 {channels} channels"
            );
        }
        Ok(match bounds.of(layer)? {
            None => Self::None,
            Some(_) if bounds.logits.track_op() => Self::Learned(bounds.clone(), layer),
            Some(bound) => Self::Fixed(bound),
        })
    }

    fn value(&self) -> Result<Option<Tensor>> {
        match self {
            Self::None => Ok(None),
            Self::Fixed(bound) => Ok(Some(bound.clone())),
            Self::Learned(bounds, layer) => bounds.of(*layer),
        }
    }

    /// `g = log(b + (1 - b) * sigmoid(f))` and `1 - exp(g)`, f32.
    fn gates(&self, f: &Tensor) -> Result<(Tensor, Tensor)> {
        // 1 - exp(g) itself would have no right digits where the gate is open.
        let rest = Activation::Sigmoid.forward_f32(&f.neg()?)?;
        let Some(bound) = self.value()? else {
            return Ok((Activation::LogSigmoid.forward_f32(f)?, rest));
        };
        let free = (1. - &bound)?;
        let open = Activation::Sigmoid.forward_f32(f)?.broadcast_mul(&free)?.broadcast_add(&bound)?;
        Ok((open.log()?, rest.broadcast_mul(&free)?))
    }
}

impl Hgrn2Attention {
    /// With `bounds`, layer number `bounds.1` of those that share them.
    ///
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(
        cfg: &Hgrn2AttentionConfig,
        bounds: Option<(&LowerBounds, usize)>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let heads = cfg.check()?;
        let (hidden, stdev) = (heads.hidden_size, cfg.initializer_range);
        let forget = heads.num_heads * heads.head_k_dim;
        let linear = |outputs, name: &str| Linear::new(hidden, outputs, false, stdev, vb.pp(name));
        let conv = |(name, channels): (&str, usize)| {
            let conv = ShortConvolution::new(channels, cfg.conv_size, cfg.conv_bias, stdev, vb.pp(name))?;
            Ok(conv.with_silu(false))
        };
        let convs = match cfg.use_short_conv {
            true => vec![("q_conv1d", forget), ("f_conv1d", forget), ("i_conv1d", hidden)],
            false => vec![],
        };
        Ok(Self {
            projections: [linear(forget, "q_proj")?, linear(forget, "f_proj")?, linear(hidden, "i_proj")?],
            convs: convs.into_iter().map(conv).collect::<Result<_>>()?,
            bound: Bound::new(bounds, forget)?,
            norm: RmsNorm::new(hidden, cfg.norm_eps, cfg.elementwise_affine, vb.pp("g_norm"))?,
            o_proj: linear(hidden, "o_proj")?,
            heads,
            mode: Mode::Auto,
        })
    }

    /// The three projections behind their convolutions, and what those remember.
    fn project(&self, xs: &Tensor, call: &Call) -> Result<([Tensor; 3], Vec<Tensor>)> {
        let [q, f, i] = &self.projections;
        let mut found = [q.forward(xs)?, f.forward(xs)?, i.forward(xs)?];
        let mut pasts = Vec::new();
        call.past(0, self.convs.len())?;
        for (at, conv) in self.convs.iter().enumerate() {
            let past = call.past(at, self.convs.len())?;
            let (ys, past) = conv.run(&found[at], past, call.cu_seqlens())?;
            found[at] = ys;
            pasts.push(past);
        }
        Ok((found, pasts))
    }
}

public_methods!(Hgrn2Attention);

impl Mixer for Hgrn2Attention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let (batch, tokens) = call.check(xs, self.heads.hidden_size)?;
        let ([q, f, i], conv) = self.project(xs, &call)?;
        let heads = |x: Tensor| x.reshape((batch, tokens, self.heads.num_heads, ()));
        let (g, k) = self.bound.gates(&f.to_dtype(DType::F32)?)?;
        let k = k.to_dtype(xs.dtype())?;
        let q = Activation::Silu.forward(&q)?;
        let options = call.options(self.mode);
        let Output { out, state } = gla(&heads(q)?, &heads(k)?, &heads(i)?, &heads(g)?, &options)?;
        call.finish(state, conv, (batch, tokens));
        self.o_proj.forward(&self.norm.forward(&out.flatten_from(2)?)?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}
