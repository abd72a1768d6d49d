//! Causal softmax attention ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)) of queries in blocks, so that no
//! matrix of all tokens by all tokens is ever made. On CUDA, in bf16 and where nothing is to be trained, it is one kernel
//! (`cuda/softmax_attention.cu`).

use crate::nn::call::Call;
use crate::nn::fused::batched_product;
use crate::nn::kv_cache::KeyValues;
use candle_core::{D, DType, Result, Tensor};

/// Scores of a block of queries, over all heads: 16 MB in f32.
const SCORES: usize = 1 << 22;

/// Queries of a block: enough for a good matrix product, too few for the half of them that is masked to matter.
const QUERIES: std::ops::RangeInclusive<usize> = 4..=256;

/// `q: [B, T, H, K]`, `k: [B, T, HKV, K]`, `v: [B, T, HKV, V]`, each sequence behind what the cache of the call holds of
/// it, to `[B, T, H, V]` in the dtype of `q`, and the keys and values to remember of each sequence.
///
/// `H` is a multiple of `HKV`: query head h reads key-value head `h / (H / HKV)`. Sequences are taken one by one, so that
/// each gets what it would get alone, to the bit.
pub(crate) fn softmax_attention(
    [q, k, v]: [&Tensor; 3],
    scale: f64,
    call: &Call,
) -> Result<(Tensor, Vec<KeyValues>)> {
    let (batch, tokens, heads, _) = q.dims4()?;
    let dtype = product_dtype(q);
    let [q3, k3, v3] = [q, k, v].map(|x| x.to_dtype(dtype)?.flatten(0, 1));
    let (q3, k3, v3) = (q3?, k3?, v3?);
    let (mut outs, mut remembered) = (Vec::new(), Vec::new());
    let mut start = 0;
    for (i, length) in call.lengths(batch, tokens).into_iter().enumerate() {
        let own = |x: &Tensor| x.narrow(0, start, length);
        let past = &call.key_values(i);
        let (k, v) = (own(&k3)?.transpose(0, 1)?, own(&v3)?.transpose(0, 1)?);
        let (k, v, held) = with_past(&k, &v, past, call.remembers())?;
        remembered.extend(held);
        if length > 0 {
            outs.push(attend(&own(&q3)?, &k, &v, scale)?);
        }
        start += length;
    }
    let out = if outs.len() == 1 { outs.remove(0) } else { Tensor::cat(&outs, 0)? };
    Ok((out.reshape((batch, tokens, heads, ()))?.to_dtype(q.dtype())?, remembered))
}

/// Candle's matrix products on a CPU are fast and whole in f32 alone.
fn product_dtype(q: &Tensor) -> DType {
    #[cfg(feature = "cuda-host")]
    if crate::cuda::takes(q.device()) {
        return q.dtype();
    }
    if q.device().is_cpu() { DType::F32 } else { q.dtype() }
}

/// All keys and values, `[HKV, S, ..]`, and what is to be remembered.
fn with_past(
    k: &Tensor,
    v: &Tensor,
    past: &KeyValues,
    remember: bool,
) -> Result<(Tensor, Tensor, Option<KeyValues>)> {
    let held = if remember { Some(past.append(k, v)?) } else { None };
    let tracked = k.track_op() || v.track_op();
    match &held {
        // The rows of the cache are values without a history.
        Some(held) if !tracked => match held.get()? {
            Some((k, v)) => return Ok((k, v, Some(held.clone()))),
            None => return Ok((k.clone(), v.clone(), Some(held.clone()))),
        },
        _ => {}
    }
    match past.get()? {
        Some((past_k, past_v)) => Ok((Tensor::cat(&[&past_k, k], 1)?, Tensor::cat(&[&past_v, v], 1)?, held)),
        None => Ok((k.contiguous()?, v.contiguous()?, held)),
    }
}

/// One sequence: `q: [T, H, K]`, the last of the tokens that `k: [HKV, S, K]` and `v: [HKV, S, V]` have, to `[T, H, V]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some(out) = crate::cuda::layers::softmax_attention(q, k, v, scale)? {
        return Ok(out);
    }
    let (tokens, heads, width) = q.dims3()?;
    let (kv_heads, all, _) = k.dims3()?;
    let (past, group) = (all - tokens, heads / kv_heads);
    let queries = (SCORES / (heads * all).max(1)).clamp(*QUERIES.start(), *QUERIES.end());
    let mut outs = Vec::new();
    for start in (0..tokens).step_by(queries) {
        let own = queries.min(tokens - start);
        let seen = past + start + own;
        let q = q.narrow(0, start, own)?.reshape((own, kv_heads, group, width))?.permute((1, 2, 0, 3))?;
        let q = q.contiguous()?.reshape((kv_heads, group * own, width))?;
        let k = k.narrow(1, 0, seen)?.transpose(1, 2)?;
        let scores =
            (product(&q, &k)?.to_dtype(DType::F32)? * scale)?.reshape((kv_heads, group, own, seen))?;
        let weights = softmax(&masked(&scores, past + start)?)?.to_dtype(v.dtype())?;
        let out = product(&weights.reshape((kv_heads, group * own, seen))?, &v.narrow(1, 0, seen)?)?;
        let out = out.reshape((kv_heads, group, own, ()))?.permute((2, 0, 1, 3))?;
        outs.push(out.reshape((own, heads, ()))?);
    }
    if outs.len() == 1 { Ok(outs.remove(0)) } else { Tensor::cat(&outs, 0) }
}

/// A product of batches, either side of which may be a part of a longer buffer.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    // The gradient of a product needs whole matrices; so do the products of some devices if they are of one row.
    if a.track_op() || b.track_op() {
        a.contiguous()?.matmul(&b.contiguous()?)
    } else {
        batched_product(a, b)
    }
}

/// `scores: [.., queries, keys]` without those of keys behind the query, the first of which has position `first`.
fn masked(scores: &Tensor, first: usize) -> Result<Tensor> {
    let (queries, keys) = (scores.dim(D::Minus2)?, scores.dim(D::Minus1)?);
    if queries == 1 {
        return Ok(scores.clone());
    }
    let at = |t: usize| (0..keys).map(move |s| if s > first + t { f32::NEG_INFINITY } else { 0. });
    let mask: Vec<f32> = (0..queries).flat_map(at).collect();
    scores.broadcast_add(&Tensor::from_vec(mask, (queries, keys), scores.device())?)
}

/// Over the last dimension. candle-nn's fused one has no backward.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    if !scores.track_op() {
        return candle_nn::ops::softmax_last_dim(&scores.contiguous()?);
    }
    let max = scores.max_keepdim(D::Minus1)?.detach();
    let exp = scores.broadcast_sub(&max)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// One query at a time, from the definition.
    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
        let (tokens, heads, _) = q.dims3()?;
        let (kv_heads, all, _) = k.dims3()?;
        let mut rows = Vec::new();
        for t in 0..tokens {
            for h in 0..heads {
                let (kv, seen) = (h / (heads / kv_heads), all - tokens + t + 1);
                let q = q.get(t)?.get(h)?.unsqueeze(1)?;
                let scores = (k.get(kv)?.narrow(0, 0, seen)?.matmul(&q)?.squeeze(1)? * scale)?;
                let weights = candle_nn::ops::softmax(&scores, 0)?.unsqueeze(0)?;
                rows.push(weights.matmul(&v.get(kv)?.narrow(0, 0, seen)?)?);
            }
        }
        Tensor::cat(&rows, 0)?.reshape((tokens, heads, ()))
    }

    fn error(x: &Tensor, expected: &Tensor) -> Result<f32> {
        assert_eq!(x.dims(), expected.dims());
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
        Ok((norm(&(x - expected)?)? / norm(expected)?).sqrt())
    }

    fn assert_close(x: &Tensor, expected: &Tensor) -> Result<()> {
        let error = error(x, expected)?;
        assert!(error < 1e-5, "relative error {error:e}");
        Ok(())
    }

    /// More queries than a block takes, keys from before, groups, and a strided buffer.
    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Device::Cpu);
        for (tokens, past, heads, kv_heads) in [(1, 0, 2, 1), (1, 9, 4, 2), (300, 5, 4, 2), (7, 0, 3, 3)] {
            let q = random(&[tokens, heads, 6])?;
            let k = random(&[kv_heads, past + tokens + 3, 6])?.narrow(1, 0, past + tokens)?;
            let v = random(&[kv_heads, past + tokens + 3, 4])?.narrow(1, 0, past + tokens)?;
            let expected = naive(&q, &k, &v, 0.3)?;
            assert_close(&attend(&q, &k, &v, 0.3)?, &expected)?;
            let var = Var::from_tensor(&q)?;
            assert_close(&attend(&var, &k, &v, 0.3)?, &expected)?;
        }
        Ok(())
    }

    #[test]
    fn every_input_gets_its_gradient() -> Result<()> {
        let random = |dims: &[usize]| Var::from_tensor(&Tensor::randn(0f32, 1., dims, &Device::Cpu)?);
        let vars = [random(&[9, 4, 6])?, random(&[2, 9, 6])?, random(&[2, 9, 4])?];
        let [q, k, v] = [0, 1, 2].map(|i| vars[i].as_tensor());
        let weights = Tensor::randn(0f32, 1., (9, 4, 4), &Device::Cpu)?;
        let found = (attend(q, k, v, 0.3)? * &weights)?.sum_all()?.backward()?;
        let expected = (naive(q, k, v, 0.3)? * &weights)?.sum_all()?.backward()?;
        for var in &vars {
            let (Some(found), Some(expected)) = (found.get(var), expected.get(var)) else {
                panic!("an argument of shape {:?} has no gradient", var.dims())
            };
            assert_close(found, expected)?;
        }
        Ok(())
    }

    /// All widths that the kernel has, rows for several blocks, groups, keys from before in several parts, channels that lie apart
    /// or are odd in number, negative scales, and scores in the thousands.
    #[cfg(feature = "cuda-host")]
    #[test]
    fn the_kernel_agrees_with_the_definition() -> Result<()> {
        use crate::cuda::cuda_host;
        let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Device::Cpu)?.to_dtype(DType::BF16);
        for (case, (tokens, past, [heads, kv_heads], [k_dim, v_dim], scale)) in [
            (1, 0, [2, 1], [64, 64], 0.1),
            (1, 9, [4, 2], [128, 128], 0.1),
            (1, 900, [8, 2], [256, 256], 0.06),
            (5, 600, [6, 2], [192, 128], -0.06),
            (70, 3, [6, 3], [128, 64], 0.1),
            (150, 0, [2, 2], [40, 24], -0.2),
            (33, 100, [4, 1], [7, 5], 0.3),
            (64, 64, [3, 3], [256, 16], 0.06),
            (3, 530, [2, 1], [16, 33], 0.2),
            (130, 0, [2, 1], [64, 64], 300.),
        ]
        .into_iter()
        .enumerate()
        {
            let room = past + tokens + 3;
            let q = random(&[tokens, heads, k_dim])?;
            let k = random(&[kv_heads, room, k_dim])?.narrow(1, 0, past + tokens)?;
            let v = random(&[kv_heads, room, v_dim])?.narrow(1, 0, past + tokens)?;
            let [q32, k32, v32] = [&q, &k, &v].map(|x| x.to_dtype(DType::F32));
            let expected = naive(&q32?, &k32?, &v32?, scale)?;
            // Channels that do not lie one after the other.
            let apart = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
            let (qs, ks, vs) = (apart(&q)?, apart(&k)?, apart(&v)?);
            for (q, k, v) in [(&q, &k, &v), (&qs, &k, &vs), (&q, &ks, &v)] {
                for (multiprocessors, shared_memory) in [(132, 227), (1, 227), (40, 99)] {
                    let found = cuda_host::run_on(multiprocessors, shared_memory * 1024, || {
                        crate::cuda::layers::softmax_attention(q, k, v, scale)
                    })?;
                    let found = found.expect("the kernel takes it").to_dtype(DType::F32)?;
                    let error = error(&found, &expected)?;
                    assert!(error < 5e-3, "case {case}: relative error {error:e}");
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda-host")]
    #[test]
    fn the_kernel_leaves_to_others_what_it_does_not_take() -> Result<()> {
        use crate::cuda::{cuda_host, layers};
        let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
        cuda_host::run(|| {
            for (width, dtype) in [(300, DType::BF16), (64, DType::F32), (64, DType::F16)] {
                let (q, k) = (zeros(&[3, 2, width], dtype)?, zeros(&[1, 3, width], dtype)?);
                assert!(layers::softmax_attention(&q, &k, &k, 1.)?.is_none(), "{width} {dtype:?}");
            }
            let (q, k) = (zeros(&[3, 2, 64], DType::BF16)?, zeros(&[1, 3, 64], DType::BF16)?);
            assert!(layers::softmax_attention(Var::from_tensor(&q)?.as_tensor(), &k, &k, 1.)?.is_none());
            assert_eq!(
                layers::softmax_attention(&q.narrow(0, 0, 0)?, &k, &k, 1.)?.map(|x| x.elem_count()),
                Some(0)
            );
            // More queries than keys, heads that do not divide.
            assert!(layers::softmax_attention(&q, &k.narrow(1, 0, 2)?, &k.narrow(1, 0, 2)?, 1.).is_err());
            let three = zeros(&[3, 3, 64], DType::BF16)?;
            assert!(layers::softmax_attention(&q, &three, &three, 1.).is_err());
            Ok(())
        })
    }
}
