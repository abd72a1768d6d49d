use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// Linear attention that fades at a rate of its own for each token and head. The state-space dual form of Mamba-2 is this.
///
/// ```text
/// S_t = exp(g_{t,h}) S_{t-1} + k_t v_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// From "Transformers are SSMs" (Dao and Gu, 2024, <https://arxiv.org/abs/2405.21060>) and "Gated Linear Attention
/// Transformers" (Yang et al., 2023, <https://arxiv.org/abs/2312.06635>).
///
/// # Arguments
///
/// * `q`, `k`, `v`, `opts`: as for [`linear_attn`](crate::linear_attn).
/// * `g`: `[B, T, HV]`, natural logarithm of the decay, f32 or the dtype of q. Usually below 0; `-inf` forgets everything
///   before the token.
///
/// Gradients reach `g` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn simple_gla(q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor, opts: &Options) -> Result<Output> {
    let (problem, inputs) =
        Problem::new("simple_gla", [q, k, v], (Decay::Scalar, Update::Additive), &[(Role::G, "g", g)], opts)?;
    backend::solve(problem, inputs)
}
