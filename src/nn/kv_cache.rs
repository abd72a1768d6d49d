//! Keys and values of the tokens that softmax attention has seen, which grow with them.

use candle_core::{Result, Tensor, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Room for at least so many more tokens is taken whenever there is not enough.
const MIN_GROWTH: usize = 64;

/// The keys `[heads, tokens, K]` and values `[heads, tokens, V]` of one sequence; empty by default.
///
/// A value, though it does not copy what it holds: clones share a buffer with room at its end. A token is written in
/// place by whoever claims its row first; rows are never written twice, so that nobody sees another's tokens. Who comes
/// second, a clone that goes another way or a call that is made again after it failed, continues on a copy.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyValues {
    buffer: Option<Arc<Buffer>>,
    len: usize,
}

#[derive(Debug)]
struct Buffer {
    k: Tensor,
    v: Tensor,
    /// Rows that somebody has claimed.
    claimed: AtomicUsize,
}

impl KeyValues {
    /// The size of the buffer, in bytes.
    pub fn bytes(&self) -> usize {
        let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.buffer.as_ref().map_or(0, |buffer| size(&buffer.k) + size(&buffer.v))
    }

    /// Keys and values of all tokens, if there are any.
    pub fn get(&self) -> Result<Option<(Tensor, Tensor)>> {
        match &self.buffer {
            Some(buffer) if self.len > 0 => {
                Ok(Some((buffer.k.narrow(1, 0, self.len)?, buffer.v.narrow(1, 0, self.len)?)))
            }
            _ => Ok(None),
        }
    }

    /// With more tokens behind: `k [heads, tokens, K]` and `v [heads, tokens, V]`, detached.
    pub fn append(&self, k: &Tensor, v: &Tensor) -> Result<Self> {
        let tokens = k.dim(1)?;
        self.check(k, v)?;
        if tokens == 0 {
            return Ok(self.clone());
        }
        let Some(len) = self.len.checked_add(tokens) else { bail!("cache: too many tokens") };
        let buffer = match self.claim(len) {
            Some(buffer) => buffer,
            None => self.grown(len, k, v)?,
        };
        buffer.k.slice_set(&k.detach().contiguous()?, 1, self.len)?;
        buffer.v.slice_set(&v.detach().contiguous()?, 1, self.len)?;
        Ok(Self { buffer: Some(buffer), len })
    }

    /// The buffer, if it has room up to `len` and nobody has been there.
    fn claim(&self, len: usize) -> Option<Arc<Buffer>> {
        let buffer = self.buffer.as_ref().filter(|buffer| buffer.k.dims()[1] >= len)?;
        let order = Ordering::AcqRel;
        buffer.claimed.compare_exchange(self.len, len, order, Ordering::Acquire).ok()?;
        Some(buffer.clone())
    }

    /// A copy with room for `len` tokens and half as many again: the copies of all growths are together no more than
    /// twice what is held in the end.
    fn grown(&self, len: usize, k: &Tensor, v: &Tensor) -> Result<Arc<Buffer>> {
        let room = len.saturating_add((len / 2).max(MIN_GROWTH));
        let zeros = |like: &Tensor| {
            let (heads, _, width) = like.dims3()?;
            Tensor::zeros((heads, room, width), like.dtype(), like.device())
        };
        let (own_k, own_v) = (zeros(k)?, zeros(v)?);
        if let Some((k, v)) = self.get()? {
            own_k.slice_set(&k.contiguous()?, 1, 0)?;
            own_v.slice_set(&v.contiguous()?, 1, 0)?;
        }
        Ok(Arc::new(Buffer { k: own_k, v: own_v, claimed: AtomicUsize::new(len) }))
    }

    /// What each token has: shapes, dtype and place, without a number of tokens.
    pub fn kind(&self) -> Option<Vec<(usize, usize, candle_core::DType)>> {
        let kind = |x: &Tensor| (x.dims()[0], x.dims()[2], x.dtype());
        self.buffer.as_ref().map(|buffer| vec![kind(&buffer.k), kind(&buffer.v)])
    }

    /// Refuses tokens of another layer.
    fn check(&self, k: &Tensor, v: &Tensor) -> Result<()> {
        let kind = |x: &Tensor| Ok::<_, candle_core::Error>((x.dim(0)?, x.dim(2)?, x.dtype()));
        match self.kind() {
            Some(held) if held != [kind(k)?, kind(v)?] => {
                bail!(
                    "cache: holds keys and values of (heads, width, dtype) {held:?}, this layer has {:?}",
                    [kind(k)?, kind(v)?]
                )
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// A token a value, `[1, tokens, 1]`.
    fn tokens(values: &[f32]) -> Result<Tensor> {
        Tensor::from_vec(values.to_vec(), (1, values.len(), 1), &Device::Cpu)
    }

    fn append(cache: &KeyValues, values: &[f32]) -> Result<KeyValues> {
        cache.append(&tokens(values)?, &(tokens(values)? * -1.)?)
    }

    fn held(cache: &KeyValues) -> Result<Vec<f32>> {
        let Some((k, v)) = cache.get()? else { return Ok(vec![]) };
        assert_eq!(k.flatten_all()?.to_vec1::<f32>()?, (v * -1.)?.flatten_all()?.to_vec1::<f32>()?);
        k.flatten_all()?.to_vec1()
    }

    #[test]
    fn a_token_is_written_in_place_and_room_grows_by_a_part() -> Result<()> {
        let mut cache = KeyValues::default();
        let mut buffers = 0;
        let mut last = std::ptr::null();
        for t in 0..10_000 {
            cache = append(&cache, &[t as f32])?;
            let buffer = cache.buffer.as_ref().map_or(std::ptr::null(), Arc::as_ptr);
            buffers += usize::from(buffer != last);
            last = buffer;
        }
        assert!(buffers < 16, "{buffers} copies");
        assert_eq!(held(&cache)?, (0..10_000).map(|t| t as f32).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn clones_do_not_see_each_other() -> Result<()> {
        let first = append(&KeyValues::default(), &[1., 2.])?;
        let (a, b) = (append(&first, &[3.])?, append(&first.clone(), &[4., 5.])?);
        assert_eq!(held(&first)?, [1., 2.]);
        assert_eq!(held(&a)?, [1., 2., 3.]);
        assert_eq!(held(&b)?, [1., 2., 4., 5.]);
        assert_eq!(held(&append(&a, &[6.])?)?, [1., 2., 3., 6.]);
        Ok(())
    }

    #[test]
    fn tokens_of_another_layer_are_refused() -> Result<()> {
        let cache = append(&KeyValues::default(), &[1.])?;
        let wide = Tensor::zeros((1, 1, 2), candle_core::DType::F32, &Device::Cpu)?;
        assert!(cache.append(&wide, &wide).is_err());
        assert_eq!(held(&cache)?, [1.]);
        Ok(())
    }
}
