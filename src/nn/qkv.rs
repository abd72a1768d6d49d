//! Queries, keys and values of a layer, with the short convolutions some layers have behind each.

use crate::nn::call::Call;
use crate::nn::heads::{Heads, heads_from};
use crate::nn::linear::Projections;
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

/// The three projections: `q_proj`, `k_proj`, `v_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` if there are convolutions.
#[derive(Debug, Clone)]
pub(crate) struct Qkv {
    projections: Projections<3>,
    convs: Option<[ShortConvolution; 3]>,
    /// Where SiLU follows that is not a part of a convolution.
    silu: [bool; 3],
    /// How many heads, and how wide.
    heads: [[usize; 2]; 3],
}

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
        const NAMES: [&str; 3] = ["q", "k", "v"];
        let heads = [0, 1, 2].map(|i| [shape.heads[i], shape.head_dims[i]]);
        let silu = match silu {
            Silu::WithConvolution => [conv.is_some(); 3],
            Silu::Of(wanted) => wanted,
        };
        let projection = |i: usize| {
            let vb = vb.pp(format!("{}_proj", NAMES[i]));
            Linear::new(shape.hidden_size, heads[i].iter().product(), false, stdev, vb)
        };
        let convolution = |shape: ConvShape, i: usize| {
            let vb = vb.pp(format!("{}_conv1d", NAMES[i]));
            let conv = ShortConvolution::new(heads[i].iter().product(), shape.width, shape.bias, stdev, vb)?;
            Ok::<_, candle_core::Error>(conv.with_silu(silu[i]))
        };
        let convs = match conv {
            Some(shape) => Some([convolution(shape, 0)?, convolution(shape, 1)?, convolution(shape, 2)?]),
            None => None,
        };
        let projections = Projections::new([projection(0)?, projection(1)?, projection(2)?])?;
        Ok(Self { projections, silu: if convs.is_some() { [false; 3] } else { silu }, convs, heads })
    }

    pub fn forward(&self, xs: &Tensor, call: &Call) -> Result<Projected> {
        let Some(convs) = &self.convs else {
            call.past(0, 0)?;
            let mut projected = self.projections.forward_heads(xs, self.heads)?;
            for (ys, silu) in projected.iter_mut().zip(self.silu) {
                if silu {
                    *ys = Activation::Silu.forward(ys)?;
                }
            }
            let [q, k, v] = projected;
            return Ok(Projected { q, k, v, conv: Vec::new() });
        };
        let projected = self.projections.forward(xs)?;
        let mut conv = Vec::new();
        let mut convolve = |i: usize| {
            let (ys, past) = convs[i].run(&projected[i], call.past(i, convs.len())?, call.cu_seqlens())?;
            conv.push(past);
            let [heads, head_dim] = self.heads[i];
            heads_from(&ys, 0, heads, head_dim)
        };
        let (q, k, v) = (convolve(0)?, convolve(1)?, convolve(2)?);
        Ok(Projected { q, k, v, conv })
    }
}
