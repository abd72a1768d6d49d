//! Queries, keys and values of a layer, with the short convolutions some layers have behind each.

use crate::nn::heads::Heads;
use crate::nn::{LayerCache, Linear, ShortConvolution};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

/// The width of the short convolutions and whether they have a bias.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConvShape {
    pub width: usize,
    pub bias: bool,
}

#[derive(Debug, Clone)]
struct Projection {
    linear: Linear,
    conv: Option<ShortConvolution>,
    heads: usize,
}

/// The three projections: `q_proj`, `k_proj`, `v_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` if there are convolutions.
#[derive(Debug, Clone)]
pub(crate) struct Qkv([Projection; 3]);

/// What comes out: `q [B, T, num_heads, K]`, `k [B, T, num_kv_heads, K]`, `v [B, T, num_kv_heads, V]`, and the
/// convolutions' memory, empty if there are none.
pub(crate) struct Projected {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub conv: Vec<Tensor>,
}

impl Qkv {
    pub fn new(heads: &Heads, conv: Option<ConvShape>, stdev: f64, vb: &VarBuilder) -> Result<Self> {
        let projection = |name: &str, count: usize, head_dim: usize| {
            let width = count * head_dim;
            let linear = Linear::new(heads.hidden_size, width, false, stdev, vb.pp(format!("{name}_proj")))?;
            let conv = match conv {
                Some(shape) => {
                    let vb = vb.pp(format!("{name}_conv1d"));
                    Some(ShortConvolution::new(width, shape.width, shape.bias, stdev, vb)?)
                }
                None => None,
            };
            Ok::<_, candle_core::Error>(Projection { linear, conv, heads: count })
        };
        Ok(Self([
            projection("q", heads.num_heads, heads.head_k_dim)?,
            projection("k", heads.num_kv_heads, heads.head_k_dim)?,
            projection("v", heads.num_kv_heads, heads.head_v_dim)?,
        ]))
    }

    pub fn forward(&self, xs: &Tensor, cache: Option<&LayerCache>) -> Result<Projected> {
        if let Some(cache) = cache.filter(|cache| cache.tokens() > 0) {
            let (held, own) = (cache.conv_count(), self.0.iter().filter(|part| part.conv.is_some()).count());
            if held != own {
                bail!("cache: holds the inputs of {held} short convolutions, this layer has {own}");
            }
        }
        let mut conv = Vec::new();
        let mut project = |index: usize| {
            let projection = &self.0[index];
            let Some(layer) = &projection.conv else {
                return projection.linear.forward_heads(xs, projection.heads);
            };
            let past = cache.and_then(|cache| cache.conv(index));
            let (ys, past) = layer.forward(&projection.linear.forward(xs)?, past)?;
            conv.push(past);
            let (batch, tokens, _) = ys.dims3()?;
            ys.reshape((batch, tokens, projection.heads, ()))
        };
        let (q, k, v) = (project(0)?, project(1)?, project(2)?);
        Ok(Projected { q, k, v, conv })
    }
}
