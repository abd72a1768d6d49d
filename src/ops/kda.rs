use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// Kimi delta attention: the delta rule on a state of which every channel of the key fades at a rate of its own.
///
/// ```text
/// S~_t = diag(exp(g_{t,h,:})) S_{t-1}
/// u_t  = beta_t (v_t - S~_t^T k_t)
/// S_t  = S~_t + k_t u_t^T
/// o_t  = scale * S_t^T q_t
/// ```
///
/// From "Kimi Linear: An Expressive, Efficient Attention Architecture" (Kimi Team, 2025,
/// <https://arxiv.org/abs/2510.26692>).
///
/// # Arguments
///
/// * `q`, `k`, `v`, `beta`, `opts`: as for [`delta_rule`](crate::delta_rule).
/// * `g`: `[B, T, HV, K]`, natural logarithm of the decay, f32 or the dtype of q. Usually below 0; `-inf` forgets
///   everything before the token.
///
/// Gradients reach `g` and `beta` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn kda(q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor, beta: &Tensor, opts: &Options) -> Result<Output> {
    let extra = [(Role::G, "g", g), (Role::Beta, "beta", beta)];
    let (problem, inputs) = Problem::new("kda", [q, k, v], (Decay::Channel, Update::Delta), &extra, opts)?;
    backend::solve(problem, inputs)
}
