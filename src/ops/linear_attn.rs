use candle_core::{Result, Tensor};

use crate::backend;
use crate::options::{Mode, Options, Output};
use crate::problem::{Decay, Problem, Update};

/// Linear attention without decay.
///
/// ```text
/// S_t = S_{t-1} + k_t v_t^T
/// o_t = scale * S_t^T q_t
/// ```
///
/// With [`Options::with_normalize`] the output is `o_t / (scale * q_t . z_t + 1e-10)`, where `z_t` is the running sum of
/// the keys. q and k are used as they are: a feature map is up to the caller
/// ([`nn::FeatureMap`](crate::nn::FeatureMap) has the usual ones).
///
/// From "Transformers are RNNs" (Katharopoulos et al., 2020, <https://arxiv.org/abs/2006.16236>).
///
/// # Arguments
///
/// * `q`, `k`: `[B, T, H, K]`, f32, f16 or bf16, any strides.
/// * `v`: `[B, T, HV, V]`, the dtype of q. HV is a multiple of H; value head `h` reads key head `h / (HV / H)`.
/// * `opts`: mode, scale, states, packing; see [`Options`].
///
/// Returns `[B, T, HV, V]` in v's dtype and, if asked for, the final state in f32. Gradients reach q, k, v and the
/// initial state, from the output and from the final state.
///
/// # Errors
///
/// Shapes, dtypes or devices that disagree, a scale that is not finite, or options that do not fit the inputs; the
/// message names the argument, what it was and what it must be.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_linear_attn::{Options, linear_attn};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::randn(0f32, 1., (1, 100, 4, 32), &Device::Cpu)?;
/// let out = linear_attn(&x, &x, &x, &Options::default())?.out;
/// assert_eq!(out.dims(), [1, 100, 4, 32]);
/// # Ok(())
/// # }
/// ```
pub fn linear_attn(q: &Tensor, k: &Tensor, v: &Tensor, opts: &Options) -> Result<Output> {
    let (problem, inputs) =
        Problem::new("linear_attn", [q, k, v], (Decay::None, Update::Additive), &[], opts)?;
    backend::solve(problem, inputs)
}

/// [`linear_attn`] in [`Mode::Chunk`].
pub fn chunk_linear_attn(q: &Tensor, k: &Tensor, v: &Tensor, opts: &Options) -> Result<Output> {
    linear_attn(q, k, v, &opts.clone().with_mode(Mode::Chunk))
}

/// [`linear_attn`] in [`Mode::FusedChunk`].
pub fn fused_chunk_linear_attn(q: &Tensor, k: &Tensor, v: &Tensor, opts: &Options) -> Result<Output> {
    linear_attn(q, k, v, &opts.clone().with_mode(Mode::FusedChunk))
}

/// [`linear_attn`] in [`Mode::Recurrent`].
pub fn fused_recurrent_linear_attn(q: &Tensor, k: &Tensor, v: &Tensor, opts: &Options) -> Result<Output> {
    linear_attn(q, k, v, &opts.clone().with_mode(Mode::Recurrent))
}
