//! What the layers of the delta rules have in common.

use crate::nn::Linear;
use crate::nn::heads::{MAX_SIZE, check_size, whole_width};
use crate::nn::qkv::{ConvShape, Qkv, QkvShape, Silu};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;

/// Epsilon of the norm of queries and keys, which no configuration changes.
pub(crate) const L2_EPS: f64 = 1e-6;

/// Sizes where a head has a width of its own, not a part of the layer's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeltaHeads {
    pub hidden_size: usize,
    pub num_heads: usize,
    /// A multiple of `num_heads`.
    pub num_v_heads: usize,
    pub head_k_dim: usize,
    pub head_v_dim: usize,
}

impl DeltaHeads {
    pub fn new(
        hidden_size: usize,
        (num_heads, num_v_heads): (usize, Option<usize>),
        (head_dim, expand_v): (usize, f64),
    ) -> Result<Self> {
        for (name, size) in [("hidden_size", hidden_size), ("num_heads", num_heads), ("head_dim", head_dim)] {
            check_size(name, size)?;
        }
        let num_v_heads = num_v_heads.unwrap_or(num_heads);
        if num_v_heads == 0 || !num_v_heads.is_multiple_of(num_heads) {
            bail!("num_v_heads is {num_v_heads}, it must be a multiple of num_heads, which is {num_heads}");
        }
        let head_v_dim = whole_width(("expand_v", expand_v), ("head_dim", head_dim), 1e-5)?;
        for (name, heads, dim) in
            [("num_heads", num_heads, head_dim), ("num_v_heads", num_v_heads, head_v_dim)]
        {
            if heads.checked_mul(dim).is_none_or(|all| all > MAX_SIZE) {
                bail!("{name} is {heads}: with heads of {dim} channels that is more than {MAX_SIZE}");
            }
        }
        Ok(Self { hidden_size, num_heads, num_v_heads, head_k_dim: head_dim, head_v_dim })
    }

    /// The width of all value heads.
    pub fn value_dim(&self) -> usize {
        self.num_v_heads * self.head_v_dim
    }

    /// The projections, each followed by SiLU if that is asked for, and those besides.
    pub fn qkv(
        &self,
        conv: Option<ConvShape>,
        silu: bool,
        stdev: f64,
        vb: &VarBuilder,
        beside: impl IntoIterator<Item = Linear>,
    ) -> Result<Qkv> {
        let shape = QkvShape {
            hidden_size: self.hidden_size,
            heads: [self.num_heads, self.num_heads, self.num_v_heads],
            head_dims: [self.head_k_dim, self.head_k_dim, self.head_v_dim],
        };
        Qkv::new(&shape, conv, Silu::Of([silu; 3]), stdev, vb, beside)
    }
}

/// The largest beta. Beta, how much of what a key brings back is replaced, is that times `sigmoid(b_proj(x))` for each value head:
/// 2 where the state may have negative eigenvalues ([Grazzi et al., 2024](https://arxiv.org/abs/2411.12537)).
pub(crate) fn beta_factor(allow_neg_eigval: bool) -> f64 {
    if allow_neg_eigval { 2. } else { 1. }
}
