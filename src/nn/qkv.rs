//! Queries, keys and values of a layer, with the short convolutions some layers have behind each.

use crate::nn::call::Call;
use crate::nn::heads::{Heads, heads_from};
use crate::nn::linear::{self, Projections};
use crate::nn::rms_norm::l2_norm;
use crate::nn::{Activation, Linear, ShortConvolution};
use candle_core::{Error, Result, Tensor, bail};
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

/// The three projections: `q_proj`, `k_proj`, `v_proj`, and `q_conv1d`, `k_conv1d`, `v_conv1d` if there are convolutions; and
/// what a layer projects its input to besides.
#[derive(Debug, Clone)]
pub(crate) struct Qkv {
    projections: Projections,
    convs: Option<Convolutions>,
    /// Where SiLU follows that is not a part of a convolution.
    silu: [bool; 3],
    /// How many heads, and how wide.
    heads: [[usize; 2]; 3],
    /// Projections besides.
    beside: usize,
}

/// What comes out: `q [B, T, heads, K]`, `k [B, T, heads, K]`, `v [B, T, heads, V]`, each with heads of its own number,
/// the convolutions' memory, empty if there are none, and what is projected besides.
pub(crate) struct Projected {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub conv: Vec<Tensor>,
    pub beside: Beside,
    /// The heads of q and k one after the other, if they lie so.
    qk: Option<Tensor>,
}

impl Projected {
    /// With q and k as the feature map `map` makes them.
    pub fn mapped(self, map: Option<Activation>) -> Result<Self> {
        let Some(map) = map else { return Ok(self) };
        Ok(Self { q: map.forward(&self.q)?, k: map.forward(&self.k)?, qk: None, ..self })
    }

    /// With the l2norm of q and k. One norm for both is a launch less on a GPU.
    pub fn normed(self, eps: f64) -> Result<Self> {
        let Some(qk) = &self.qk else {
            return Ok(Self { q: l2_norm(&self.q, eps)?, k: l2_norm(&self.k, eps)?, ..self });
        };
        let (qk, heads) = (l2_norm(qk, eps)?, self.q.dim(2)?);
        Ok(Self { q: qk.narrow(2, 0, heads)?, k: qk.narrow(2, heads, heads)?, qk: None, ..self })
    }

    /// With all three as `act` makes them.
    pub fn activated(self, act: Option<Activation>) -> Result<Self> {
        let Some(act) = act else { return Ok(self) };
        Ok(Self { v: act.forward(&self.v)?, ..self.mapped(Some(act))? })
    }
}

/// What a layer projects its input to besides q, k and v: that of which its output gate is made, if it has one, then others.
pub(crate) struct Beside(Vec<Tensor>);

impl Beside {
    /// The N others, and that of the gate.
    pub fn split<const N: usize>(self) -> Result<([Tensor; N], Option<Tensor>)> {
        let mut all = self.0.into_iter();
        let gate = if all.len() > N { all.next() } else { None };
        let others = all.collect::<Vec<_>>().try_into();
        Ok((others.map_err(|_| Error::msg("as many results as projections"))?, gate))
    }
}

impl Qkv {
    pub fn new(
        shape: &QkvShape,
        conv: Option<ConvShape>,
        silu: Silu,
        stdev: f64,
        vb: &VarBuilder,
        beside: impl IntoIterator<Item = Linear>,
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
            Ok::<_, Error>(conv.with_silu(silu[i]))
        };
        let mut projections = vec![projection(0)?, projection(1)?, projection(2)?];
        projections.extend(beside);
        let beside = projections.len() - 3;
        let projections = Projections::new(projections)?;
        let convs = match conv {
            Some(shape) => {
                let each = [convolution(shape, 0)?, convolution(shape, 1)?, convolution(shape, 2)?];
                Some(Convolutions::new(each, projections.are_joined())?)
            }
            None => None,
        };
        Ok(Self { projections, silu: if convs.is_some() { [false; 3] } else { silu }, convs, heads, beside })
    }

    pub fn forward(&self, xs: &Tensor, call: &Call) -> Result<Projected> {
        let projected = self.projections.project(xs)?;
        let beside = (3..3 + self.beside).map(|i| projected.get(i)).collect::<Result<_>>()?;
        let beside = Beside(beside);
        let Some(convs) = &self.convs else {
            call.past(0, 0)?;
            let get = |i: usize| {
                let ys = projected.heads(i, self.heads[i])?;
                if self.silu[i] { Activation::Silu.forward(&ys) } else { Ok(ys) }
            };
            return Ok(Projected { q: get(0)?, k: get(1)?, v: get(2)?, conv: Vec::new(), beside, qk: None });
        };
        let Convolved { of, starts, memory: conv } = convs.run(&projected, call)?;
        let heads = |i: usize| heads_from(&of[i], starts[i], self.heads[i][0], self.heads[i][1]);
        let [of_q, of_k, _] = self.heads;
        let side_by_side = starts[1] > 0 && of_q == of_k;
        let qk = side_by_side.then(|| heads_from(&of[0], 0, of_q[0] + of_k[0], of_q[1])).transpose()?;
        Ok(Projected { q: heads(0)?, k: heads(1)?, v: heads(2)?, conv, beside, qk })
    }
}

/// The short convolutions behind q, k and v.
#[derive(Debug, Clone)]
struct Convolutions {
    each: [ShortConvolution; 3],
    /// All three as one, where their inputs may come side by side: their memory is one then.
    joined: Option<ShortConvolution>,
}

impl Convolutions {
    fn new(each: [ShortConvolution; 3], side_by_side: bool) -> Result<Self> {
        let joined = if side_by_side { ShortConvolution::joined(&each)? } else { None };
        Ok(Self { joined, each })
    }

    /// What they make of the first three of `projected`.
    fn run(&self, projected: &linear::Projected, call: &Call) -> Result<Convolved> {
        let channels = self.each.each_ref().map(ShortConvolution::channels);
        let starts = [0, channels[0], channels[0] + channels[1]];
        let cu_seqlens = call.cu_seqlens();
        let Some(joined) = &self.joined else {
            let convolve = |i: usize| self.each[i].run(&projected.get(i)?, call.past(i, 3)?, cu_seqlens);
            let [(q, of_q), (k, of_k), (v, of_v)] = [convolve(0)?, convolve(1)?, convolve(2)?];
            return Ok(Convolved { of: [q, k, v], starts: [0; 3], memory: vec![of_q, of_k, of_v] });
        };
        let (past, all) = (call.past(0, 1)?, channels.iter().sum::<usize>());
        if let Some(past) = past.filter(|past| past.dim(2).ok() != Some(all)) {
            bail!("cache: holds short convolutions' inputs {:?}, their channels must be {all}", past.dims());
        }
        if let Some(xs) = projected.first(all)? {
            let (ys, memory) = joined.run(&xs, past, cu_seqlens)?;
            return Ok(Convolved { of: [ys.clone(), ys.clone(), ys], starts, memory: vec![memory] });
        }
        let convolve = |i: usize| {
            let past = past.map(|past| past.narrow(2, starts[i], channels[i])).transpose()?;
            self.each[i].run(&projected.get(i)?, past.as_ref(), cu_seqlens)
        };
        let [(q, of_q), (k, of_k), (v, of_v)] = [convolve(0)?, convolve(1)?, convolve(2)?];
        let memory = vec![Tensor::cat(&[of_q, of_k, of_v], 2)?];
        Ok(Convolved { of: [q, k, v], starts: [0; 3], memory })
    }
}

/// What convolutions make of q, k and v.
struct Convolved {
    of: [Tensor; 3],
    /// The channel of its tensor with which each begins.
    starts: [usize; 3],
    /// For the next call.
    memory: Vec<Tensor>,
}
