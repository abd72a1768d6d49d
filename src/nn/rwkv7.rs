//! RWKV-7 ([Peng et al., 2025](https://arxiv.org/abs/2503.14456)): time mixing.

#[cfg(any(feature = "cuda", feature = "cuda-host"))]
use crate::cuda::layers;
use crate::nn::call::Call;
use crate::nn::fused::{self, Pointwise};
use crate::nn::heads::check_size;
use crate::nn::rms_norm::l2_norm;
use crate::nn::token_shift::TokenShift;
use crate::nn::{Activation, LayerCache, LayerNorm, Linear};
use crate::{Mode, Output, rwkv7};
use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// The logarithm of the strongest decay of a token, `-1 / sqrt(e)`.
const STRONGEST_DECAY: f64 = -0.606_530_659_712_633_4;

/// What an [`Rwkv7Attention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct Rwkv7AttentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Key channels of a head, a divisor of `hidden_size`. Default: 64.
    pub head_dim: usize,
    /// Value channels of all heads; `None` means `hidden_size`. Default: `None`.
    pub value_dim: Option<usize>,
    /// Inner width of what makes the decay. Default: 64.
    pub decay_low_rank_dim: usize,
    /// Inner width of what makes the output gate. Default: 128.
    pub gate_low_rank_dim: usize,
    /// Inner width of what makes the rate of learning in context. Default: 64.
    pub a_low_rank_dim: usize,
    /// Inner width of what mixes in the first layer's values. Default: 16.
    pub v_low_rank_dim: usize,
    /// Epsilon of the output norm, for each channel of a head. Default: 1e-5.
    pub norm_eps: f64,
    /// Epsilon of the norm of the removal keys. Default: 1e-6.
    pub l2_eps: f64,
    /// The number of this layer, and how many there are. The first makes the values that later ones mix with their own.
    /// Default: the first of one.
    pub layer: (usize, usize),
}

impl Default for Rwkv7AttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            head_dim: 64,
            value_dim: None,
            decay_low_rank_dim: 64,
            gate_low_rank_dim: 128,
            a_low_rank_dim: 64,
            v_low_rank_dim: 16,
            norm_eps: 1e-5,
            l2_eps: 1e-6,
            layer: (0, 1),
        }
    }
}

impl Rwkv7AttentionConfig {
    /// Checks the sizes, with an error that names the field that is wrong. Returns the number of heads.
    pub(crate) fn check(&self) -> Result<usize> {
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("head_dim", self.head_dim),
            ("value_dim", self.value_dim()),
            ("decay_low_rank_dim", self.decay_low_rank_dim),
            ("gate_low_rank_dim", self.gate_low_rank_dim),
            ("a_low_rank_dim", self.a_low_rank_dim),
            ("v_low_rank_dim", self.v_low_rank_dim),
        ] {
            check_size(name, size)?;
        }
        if !self.hidden_size.is_multiple_of(self.head_dim) {
            bail!("head_dim is {}, it must divide hidden_size, which is {}", self.head_dim, self.hidden_size);
        }
        let heads = self.hidden_size / self.head_dim;
        if !self.value_dim().is_multiple_of(heads) {
            bail!("value_dim is {}, it must be a multiple of the number of heads, {heads}", self.value_dim());
        }
        let (layer, layers) = self.layer;
        if layer >= layers {
            bail!("layer is number {layer} of {layers}, it must be below");
        }
        Ok(heads)
    }

    fn value_dim(&self) -> usize {
        self.value_dim.unwrap_or(self.hidden_size)
    }
}

/// Two projections with few channels, and a function, in between.
#[derive(Debug, Clone)]
struct LowRank {
    layers: [Linear; 2],
    activation: Activation,
}

impl LowRank {
    /// Reads `lora.0.weight`, `lora.2.weight` and, given where it begins, `lora.2.bias`.
    fn new(
        [inputs, rank, outputs]: [usize; 3],
        activation: Activation,
        bias: Option<Init>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let vb = vb.pp("lora");
        let first = Linear::new(inputs, rank, false, 0., vb.pp("0"))?;
        // As wide as a tenth of an orthogonal matrix.
        let stdev = 0.1 * (1. / outputs as f64).sqrt() * (rank as f64 / outputs as f64).max(1.).sqrt();
        let weight = vb.pp("2").get_with_hints((outputs, rank), "weight", crate::nn::normal(stdev))?;
        let bias = bias.map(|init| vb.pp("2").get_with_hints(outputs, "bias", init)).transpose()?;
        Ok(Self { layers: [first, Linear::from_parts(weight, bias)?], activation })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.layers[1].forward(&self.activation.forward(&self.layers[0].forward(xs)?)?)
    }

    /// The result, and the bias that is still to be added to it.
    fn forward_and_bias(&self, xs: &Tensor) -> Result<(Tensor, Option<&Tensor>)> {
        self.layers[1].forward_and_bias(&self.activation.forward(&self.layers[0].forward(xs)?)?)
    }

    /// `factor` times the sigmoid of it, f32.
    fn sigmoid(&self, factor: f64, xs: &Tensor) -> Result<Tensor> {
        let (logits, bias) = self.forward_and_bias(xs)?;
        fused::scaled(factor, Pointwise::Sigmoid, &logits, bias)
    }
}

/// [`rwkv7`](crate::rwkv7) behind a shift by one token: every channel decays at a rate of its own, and a part of what the
/// state holds for a key is removed before the token is written.
///
/// With `x*` the input mixed with the token before: `r = r_proj(xr)`, `g = -exp(-1/2) sigmoid(w_lora(xw))`,
/// `a = sigmoid(a_lora(xa))`, `kappa = norm(k_k * k_proj(xk))`, `k = k_proj(xk) * (1 + (a - 1) * k_a)`; the state is
/// multiplied by `diag(exp(g)) - (a * kappa) kappa^T`. Parameters: `x_r`, `x_w`, `x_k`, `x_v`, `x_a`, `x_g`, `k_k`, `k_a`,
/// `r_k`, `r_proj`, `k_proj`, `v_proj`, `o_proj`, `w_lora`, `a_lora`, `g_lora`, `g_norm` and, behind the first layer,
/// `v_lora`. Early checkpoints have the six `x_*` as one `x_x`.
#[derive(Debug, Clone)]
pub struct Rwkv7Attention {
    hidden_size: usize,
    heads: usize,
    l2_eps: f64,
    /// For r, w, k, v, a and g.
    shift: TokenShift,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    r_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    w_lora: LowRank,
    a_lora: LowRank,
    g_lora: LowRank,
    v_lora: Option<LowRank>,
    g_norm: LayerNorm,
    mode: Mode,
}

/// Even between two numbers.
fn even(lo: f64, up: f64) -> Init {
    Init::Uniform { lo, up }
}

impl Rwkv7Attention {
    /// Fresh parameters are where the authors' are: they begin at different rates of decay, and with most of the token
    /// itself.
    ///
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &Rwkv7AttentionConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let (hidden, values, (layer, layers)) = (cfg.hidden_size, cfg.value_dim(), cfg.layer);
        let stdev = 1. / (hidden as f64).sqrt();
        let linear = |outputs, stdev, name: &str| Linear::new(hidden, outputs, false, stdev, vb.pp(name));
        let lora = |rank, outputs, activation, bias, name: &str| {
            LowRank::new([hidden, rank, outputs], activation, bias, vb.pp(name))
        };
        let vector = |name: &str, init| vb.get_with_hints(hidden, name, init);
        let v_lora = match layer {
            0 => None,
            _ => Some(lora(
                cfg.v_low_rank_dim,
                values,
                Activation::Identity,
                Some(even(0.53, 0.93)),
                "v_lora",
            )?),
        };
        let out_stdev = 1. / (6. * values as f64 * layers as f64).sqrt();
        let depth = ((layer + 1) as f64 / layers as f64).powf(0.7);
        let eps = cfg.head_dim as f64 * cfg.norm_eps;
        Ok(Self {
            hidden_size: hidden,
            heads,
            l2_eps: cfg.l2_eps,
            shift: TokenShift::new(hidden, mixes(hidden, 1. - layer as f64 / layers as f64, &vb)?, &vb)?,
            k_k: vector("k_k", even(0.66, 0.76))?,
            k_a: vector("k_a", Init::Const(1.02))?,
            r_k: vb.get_with_hints((heads, cfg.head_dim), "r_k", Init::Const(-0.04))?,
            r_proj: linear(hidden, stdev, "r_proj")?,
            k_proj: linear(hidden, 0.1 * stdev, "k_proj")?,
            v_proj: linear(values, stdev, "v_proj")?,
            o_proj: Linear::new(values, hidden, false, out_stdev, vb.pp("o_proj"))?,
            w_lora: lora(cfg.decay_low_rank_dim, hidden, Activation::Tanh, Some(even(-5.5, 0.5)), "w_lora")?,
            a_lora: lora(
                cfg.a_low_rank_dim,
                hidden,
                Activation::Identity,
                Some(even(-0.69, 0.31)),
                "a_lora",
            )?,
            g_lora: lora(cfg.gate_low_rank_dim, values, Activation::Sigmoid, None, "g_lora")?,
            v_lora,
            g_norm: LayerNorm::grouped(values, heads, eps, true, depth, vb.pp("g_norm"))?,
            mode: Mode::Auto,
        })
    }

    /// `xs: [B, T, hidden_size]` to the same shape and dtype, and the values of this layer, `[B, T, value_dim]`. Layers
    /// behind the first need those of the first. With a cache, `xs` continues what the cache has seen, and the cache is
    /// brought up to date.
    ///
    /// # Errors
    /// A wrong shape, or a cache of another batch size; no first values where they are needed.
    pub fn forward(
        &self,
        xs: &Tensor,
        first_values: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Tensor)> {
        self.mix(xs, first_values, Call::new(cache, None))
    }

    /// [`forward`](Self::forward) for N sequences that lie one after the other in `xs: [1, T, hidden_size]`: sequence i has
    /// the tokens from `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
    ///
    /// # Errors
    /// Those of `forward`; `cu_seqlens` that does not begin with 0, decreases or does not end at T; B other than 1.
    pub fn forward_packed(
        &self,
        xs: &Tensor,
        first_values: Option<&Tensor>,
        cu_seqlens: &[u32],
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Tensor)> {
        self.mix(xs, first_values, Call::new(cache, Some(cu_seqlens)))
    }

    /// The algorithm of the operator. Default: [`Mode::Auto`].
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    pub(crate) fn mix(
        &self,
        xs: &Tensor,
        first_values: Option<&Tensor>,
        call: Call,
    ) -> Result<(Tensor, Tensor)> {
        let size @ (batch, tokens) = call.check(xs, self.hidden_size)?;
        let ([xr, xw, xk, xv, xa, xg], past) = self.shift.forward(xs, &call)?;
        let heads = |x: &Tensor| x.reshape((batch, tokens, self.heads, ()));
        let r = heads(&self.r_proj.forward(&xr)?)?;
        let g = heads(&self.w_lora.sigmoid(STRONGEST_DECAY, &xw)?)?;
        let own_values = self.v_proj.forward(&xv)?;
        let v = heads(&self.values(&own_values, &xv, first_values)?)?;
        let [k, remove, replace] = self.keys(&xk, &xa)?;
        let [k, remove, replace] = [heads(&k)?, heads(&remove)?, heads(&replace)?];
        let options = call.options(self.mode).with_scale(1.);
        let Output { out, state } = rwkv7(&r, &k, &v, &remove, &replace, &g, &options)?;
        call.finish(state, vec![past], size);
        let ys = self.gated(&out, [&r, &k, &v], &self.g_lora.forward(&xg)?)?;
        Ok((self.o_proj.forward(&ys)?, own_values))
    }

    /// Keys, what they remove and what replaces it, each `[B, T, hidden_size]`.
    fn keys(&self, xk: &Tensor, xa: &Tensor) -> Result<[Tensor; 3]> {
        let k = self.k_proj.forward(xk)?;
        let (a, bias) = self.a_lora.forward_and_bias(xa)?;
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let Some(a_bias) = bias {
            let (k, a, k_k, k_a, eps) = (&k, &a, &self.k_k, &self.k_a, self.l2_eps);
            let width = self.hidden_size / self.heads;
            if let Some(found) =
                layers::rwkv7_keys(&layers::Rwkv7Keys { k, a, a_bias, k_k, k_a, width, eps })?
            {
                return Ok(found);
            }
        }
        let f32 = |x: &Tensor| x.to_dtype(DType::F32);
        let (batch, tokens, _) = k.dims3()?;
        let (k, a) = (f32(&k)?, fused::scaled(1., Pointwise::Sigmoid, &a, bias)?);
        let heads = k.broadcast_mul(&f32(&self.k_k)?)?.reshape((batch, tokens, self.heads, ()))?;
        let kappa = l2_norm(&heads, self.l2_eps)?.flatten_from(2)?;
        let rate = ((&a - 1.)?.broadcast_mul(&f32(&self.k_a)?)? + 1.)?;
        let found = [(k * rate)?, kappa.neg()?, (&kappa * &a)?].map(|x| x.to_dtype(xk.dtype()));
        let [k, remove, replace] = found;
        Ok([k?, remove?, replace?])
    }

    /// What the operator leaves, normed, with what a token says to itself, and gated: `[B, T, value_dim]`.
    fn gated(&self, out: &Tensor, [r, k, v]: [&Tensor; 3], gate: &Tensor) -> Result<Tensor> {
        #[cfg(any(feature = "cuda", feature = "cuda-host"))]
        if let (weight, Some(bias), eps) = self.g_norm.parts()
            && r.dims() == v.dims()
        {
            let (r_k, width) = (&self.r_k, self.hidden_size / self.heads);
            let of = layers::Rwkv7Output { out, r, k, v, gate, r_k, weight, bias, width, eps };
            if let Some(found) = layers::rwkv7_output(&of)? {
                return Ok(found);
            }
        }
        let ys = self.g_norm.forward_to(&out.flatten_from(2)?, DType::F32)?;
        ((ys + self.bonus(r, k, v)?)? * gate.to_dtype(DType::F32)?)?.to_dtype(gate.dtype())
    }

    /// The values, mixed with those of the first layer.
    fn values(&self, own: &Tensor, xv: &Tensor, first: Option<&Tensor>) -> Result<Tensor> {
        match (&self.v_lora, first) {
            (None, _) => Ok(own.clone()),
            (Some(_), None) => bail!("first_values: not given, a layer behind the first needs them"),
            (Some(_), Some(first)) if first.dims() != own.dims() => {
                bail!("first_values: shape is {:?}, it must be {:?}", first.dims(), own.dims())
            }
            (Some(v_lora), Some(first)) => {
                let (own, first) = (own.to_dtype(DType::F32)?, first.to_dtype(DType::F32)?);
                let mixed = (&own + ((first - &own)? * v_lora.sigmoid(1., xv)?)?)?;
                mixed.to_dtype(xv.dtype())
            }
        }
    }

    /// What a token says to itself, `(r . (r_k * k)) v` in each head: `[B, T, value_dim]`, f32.
    fn bonus(&self, r: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let [r, k, v, r_k] = [r, k, v, &self.r_k].map(|x| x.to_dtype(DType::F32));
        let weight = (r? * k?)?.broadcast_mul(&r_k?)?.sum_keepdim(D::Minus1)?;
        v?.broadcast_mul(&weight)?.flatten_from(2)
    }
}

/// The six `x_*`, `[1, 1, hidden_size]`. When fresh, about as much of the token before as the authors begin with: less in
/// deeper layers, where `share` is less.
fn mixes(hidden: usize, share: f64, vb: &VarBuilder) -> Result<Vec<Tensor>> {
    let names = [("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2)];
    if vb.contains_tensor("x_x") && !vb.contains_tensor("x_r") {
        let all = vb.get((names.len(), hidden), "x_x")?;
        return (0..names.len()).map(|i| all.get(i)?.reshape((1, 1, hidden))).collect();
    }
    let mix = |(name, power): (&str, f64)| {
        // The mean of 1 - u^p, for u even from 0 to 1, is p / (1 + p).
        let power = power * share;
        vb.get_with_hints((1, 1, hidden), name, even(0., 2. * power / (1. + power)))
    };
    names.into_iter().map(mix).collect()
}
