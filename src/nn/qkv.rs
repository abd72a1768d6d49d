//! Queries, keys and values of a layer, with the short convolutions some layers have behind each.

use crate::nn::call::Call;
use crate::nn::heads::Heads;
use crate::nn::{Linear, ShortConvolution};
use candle_core::{Result, Tensor};
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

    pub fn forward(&self, xs: &Tensor, call: &Call) -> Result<Projected> {
        let own = self.0.iter().filter(|part| part.conv.is_some()).count();
        call.past(0, own)?;
        let mut conv = Vec::new();
        let mut project = |index: usize| {
            let projection = &self.0[index];
            let Some(layer) = &projection.conv else {
                return projection.linear.forward_heads(xs, projection.heads);
            };
            let past = call.past(index, own)?;
            let (ys, past) = layer.run(&projection.linear.forward(xs)?, past, call.cu_seqlens())?;
            conv.push(past);
            let (batch, tokens, _) = ys.dims3()?;
            ys.reshape((batch, tokens, projection.heads, ()))
        };
        let (q, k, v) = (project(0)?, project(1)?, project(2)?);
        Ok(Projected { q, k, v, conv })
    }
}
