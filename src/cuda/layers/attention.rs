//! Softmax attention, see `cla_attention` in `cuda/layers.h`.

use candle_core::{DType, Result, Tensor, bail};

use super::{MOST_BLOCKS, ffi};
use crate::cuda::machine::Machine;
use crate::cuda::memory::{Addresses, Buffer, Held, NO_TENSOR};

const NAME: &str = "softmax_attention";

/// The most channels of a head.
const MOST_CHANNELS: usize = 256;
/// Tiles of keys that a block has at least: with fewer, adding up the parts costs more than it gains.
const FEWEST_TILES: usize = 4;

/// `q: [T, H, K]`, the last of the tokens that `k: [HKV, S, K]` and `v: [HKV, S, V]` have, to `[T, H, V]`; `None` if the kernels
/// do not take them: they take bf16, K and V up to 256, and leave no gradient.
pub(crate) fn softmax_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let all = [q, k, v];
    if all.iter().any(|x| x.track_op() || x.dtype() != DType::BF16 || !crate::cuda::takes(x.device())) {
        return Ok(None);
    }
    let ((tokens, heads, k_dim), (kv_heads, keys, v_dim)) = (q.dims3()?, v.dims3()?);
    if k_dim.max(v_dim) > MOST_CHANNELS {
        return Ok(None);
    }
    if k.dims() != [kv_heads, keys, k_dim] || kv_heads == 0 || heads % kv_heads != 0 || keys < tokens {
        bail!("{NAME}: q is {:?}, k {:?} and v {:?}, which do not fit", q.dims(), k.dims(), v.dims());
    }
    let machine = Machine::of(q.device())?;
    let card = machine.card()?;
    let new = || Buffer::new(&machine, DType::BF16, (tokens, heads, v_dim));
    if tokens == 0 || heads == 0 || v_dim == 0 {
        return Ok(Some(new()?.into_tensor()));
    }
    let held = all.map(Held::new);
    let mut at = Addresses::new(&machine);
    // Along T or S, the heads and the channels.
    let strides = |x: &Tensor, [token, head, element]: [usize; 3]| {
        let stride = x.stride();
        [0, stride[token], stride[head], stride[element]]
    };
    let mut call = ffi::Attention {
        q: at.strided(Some(&held[0]), strides(q, [0, 1, 2]))?,
        k: at.strided(Some(&held[1]), strides(k, [1, 0, 2]))?,
        v: at.strided(Some(&held[2]), strides(v, [1, 0, 2]))?,
        out: NO_TENSOR,
        scale: scale as f32,
        k_dim: k_dim as i32,
        v_dim: v_dim as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        tokens: tokens as i64,
        keys: keys as i64,
        splits: 1,
        partial: std::ptr::null_mut(),
        shared_limit: card.shared_memory as i64,
    };
    // SAFETY: it only looks at sizes and dtypes.
    let rows = unsafe { ffi::cla_softmax_attention_rows(&call) } as usize;
    if rows == 0 {
        return Ok(None);
    }
    let blocks = (tokens * (heads / kv_heads)).div_ceil(rows) * kv_heads;
    let splits = splits(blocks, keys, card.multiprocessors);
    if blocks.saturating_mul(splits).max(tokens.saturating_mul(heads)) > MOST_BLOCKS {
        return Ok(None);
    }
    call.splits = splits as i32;
    let mut partial = match splits {
        1 => None,
        _ => Some(Buffer::new(&machine, DType::F32, (splits, tokens, heads, v_dim + 2))?),
    };
    let mut out = new()?;
    let mut at = Addresses::new(&machine);
    call.out = at.out_strided(Some(&mut out), [0, heads * v_dim, v_dim, 1])?;
    call.partial = at.out_numbers(partial.as_mut())?;
    // SAFETY: the addresses, strides and sizes are those of live tensors, checked above; all are held until the kernels are
    // queued, and the stream orders whatever comes after.
    let code = unsafe { ffi::cla_softmax_attention(&call, machine.stream()) };
    if code != 0 {
        bail!(
            "{NAME}: the kernel could not be launched, CUDA error {code} (T = {tokens}, S = {keys}, H = {heads}, \
             HKV = {kv_heads}, K = {k_dim}, V = {v_dim})"
        );
    }
    drop(at);
    Ok(Some(out.into_tensor()))
}

/// Parts of the keys, so that multiprocessors that would be idle have some.
fn splits(blocks: usize, keys: usize, multiprocessors: usize) -> usize {
    let tiles = keys.div_ceil(ffi::ATTENTION_KEYS);
    (multiprocessors / blocks.max(1)).min(tiles / FEWEST_TILES).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_divided_among_idle_multiprocessors_only() {
        for (blocks, keys, wanted) in [
            (1, 1, 1),
            (2, 255, 1),
            (2, 512, 2),
            (2, 4096, 16),
            (2, 1 << 20, 66),
            (66, 1 << 20, 2),
            (67, 1 << 20, 1),
            (4096, 1 << 20, 1),
        ] {
            assert_eq!(splits(blocks, keys, 132), wanted, "{blocks} {keys}");
        }
    }
}
