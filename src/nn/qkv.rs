//! Queries, keys and values of a layer, with the short convolutions some layers have behind each.

use crate::nn::call::Call;
use crate::nn::heads::Heads;
use crate::nn::{Activation, Linear, ShortConvolution};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// The width of the short convolutions and whether they have a bias.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConvShape {
    pub width: usize,
    pub bias: bool,
}

/// How many heads of q, k and v there are, and how wide each is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QkvShape {
    pub hidden_size: usize,
    pub heads: [usize; 3],
    pub head_dims: [usize; 3],
}

impl From<&Heads> for QkvShape {
    fn from(heads: &Heads) -> Self {
        let Heads { hidden_size, num_heads, num_kv_heads, head_k_dim, head_v_dim } = *heads;
        Self {
            hidden_size,
            heads: [num_heads, num_kv_heads, num_kv_heads],
            head_dims: [head_k_dim, head_k_dim, head_v_dim],
        }
    }
}

/// Where SiLU follows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Silu {
    /// As a part of the convolutions, if there are any.
    WithConvolution,
    /// Behind those of q, k and v that are true, convolutions or not.
    Of([bool; 3]),
}

#[derive(Debug, Clone)]
struct Projection {
    linear: Linear,
    conv: Option<ShortConvolution>,
    silu: bool,
    heads: usize,
}

/// The three projections: `q_proj`, `k_proj`, `v_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` if there are convolutions.
#[derive(Debug, Clone)]
pub(crate) struct Qkv([Projection; 3]);

/// What comes out: `q [B, T, heads, K]`, `k [B, T, heads, K]`, `v [B, T, heads, V]`, each with heads of its own number,
/// and the convolutions' memory, empty if there are none.
pub(crate) struct Projected {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub conv: Vec<Tensor>,
}

impl Projected {
    /// With q and k as the feature map `map` makes them.
    pub fn mapped(self, map: Option<Activation>) -> Result<Self> {
        let Some(map) = map else { return Ok(self) };
        Ok(Self { q: map.forward(&self.q)?, k: map.forward(&self.k)?, ..self })
    }

    /// With all three as `act` makes them.
    pub fn activated(self, act: Option<Activation>) -> Result<Self> {
        let Some(act) = act else { return Ok(self) };
        Ok(Self { v: act.forward(&self.v)?, ..self.mapped(Some(act))? })
    }
}

impl Qkv {
    pub fn new(
        shape: &QkvShape,
        conv: Option<ConvShape>,
        silu: Silu,
        stdev: f64,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let projection = |index: usize, name: &str| {
            let width = shape.heads[index] * shape.head_dims[index];
            let linear = Linear::new(shape.hidden_size, width, false, stdev, vb.pp(format!("{name}_proj")))?;
            let silu = match silu {
                Silu::WithConvolution => conv.is_some(),
                Silu::Of(wanted) => wanted[index],
            };
            let conv = match conv {
                Some(shape) => {
                    let vb = vb.pp(format!("{name}_conv1d"));
                    let conv = ShortConvolution::new(width, shape.width, shape.bias, stdev, vb)?;
                    Some(conv.with_silu(silu))
                }
                None => None,
            };
            Ok::<_, candle_core::Error>(Projection { linear, conv, silu, heads: shape.heads[index] })
        };
        Ok(Self([projection(0, "q")?, projection(1, "k")?, projection(2, "v")?]))
    }

    pub fn forward(&self, xs: &Tensor, call: &Call) -> Result<Projected> {
        let own = self.0.iter().filter(|part| part.conv.is_some()).count();
        call.past(0, own)?;
        let mut conv = Vec::new();
        let mut project = |index: usize| {
            let projection = &self.0[index];
            let Some(layer) = &projection.conv else {
                let ys = projection.linear.forward_heads(xs, projection.heads)?;
                return if projection.silu { Activation::Silu.forward(&ys) } else { Ok(ys) };
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
