use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Options, Output};
use crate::problem::{Decay, Problem, Role, Update};

/// The delta rule: a token does not add its value to what the state has for its key but replaces it, by the part `beta`.
///
/// ```text
/// u_t = beta_t (v_t - S_{t-1}^T k_t)
/// S_t = S_{t-1} + k_t u_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// From "Linear Transformers Are Secretly Fast Weight Programmers" (Schlag et al., 2021,
/// <https://arxiv.org/abs/2102.11174>) and "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"
/// (Yang et al., 2024, <https://arxiv.org/abs/2406.06484>).
///
/// # Arguments
///
/// * `q`, `k`, `v`, `opts`: as for [`linear_attn`](crate::linear_attn). Keys are used as they are. A state neither grows
///   nor blows up while `beta |k|^2` is between 0 and 2; models divide keys by their norm.
/// * `beta`: `[B, T, HV]`, f32 or the dtype of q, usually between 0 and 1, or up to 2 for negative eigenvalues.
///
/// Gradients reach `beta` as well.
///
/// # Errors
///
/// As for [`linear_attn`](crate::linear_attn); `normalize` is refused.
pub fn delta_rule(q: &Tensor, k: &Tensor, v: &Tensor, beta: &Tensor, opts: &Options) -> Result<Output> {
    let extra = [(Role::Beta, "beta", beta)];
    let (problem, inputs) =
        Problem::new("delta_rule", [q, k, v], (Decay::None, Update::Delta), &extra, opts)?;
    backend::solve(problem, inputs)
}
