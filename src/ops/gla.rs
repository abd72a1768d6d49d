use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// Gated linear attention: every channel of the key fades at a rate of its own, token by token.
///
/// ```text
/// S_t = diag(exp(g_{t,h,:})) S_{t-1} + k_t v_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// From "Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al., 2023,
/// <https://arxiv.org/abs/2312.06635>). HGRN-2 is this with `k = 1 - exp(g)`.
///
/// # Arguments
///
/// * `q`, `k`, `v`, `opts`: as for [`linear_attn`](crate::linear_attn).
/// * `g`: `[B, T, HV, K]`, natural logarithm of the decay, f32 or the dtype of q. Usually below 0; `-inf` forgets everything
///   before the token.
///
/// Gradients reach `g` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn gla(q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor, opts: &Options) -> Result<Output> {
    let (problem, inputs) =
        Problem::new("gla", [q, k, v], (Decay::Channel, Update::Additive), &[(Role::G, "g", g)], opts)?;
    backend::solve(problem, inputs)
}
