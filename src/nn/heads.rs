//! How a layer's width is divided among heads.

use candle_core::{Result, Tensor, bail};

/// No size of a model is larger; every product of two sizes is then far from overflow.
pub(crate) const MAX_SIZE: usize = 1 << 26;

/// Refuses a size that no layer has, by its name.
pub(crate) fn check_size(name: &str, size: usize) -> Result<()> {
    match size {
        1..=MAX_SIZE => Ok(()),
        _ => bail!("{name} is {size}, it must be from 1 to {MAX_SIZE}"),
    }
}

/// `heads` heads of `width` channels from channel `start` on: of `[B, T, channels]`, `[B, T, heads, width]`. Nothing is
/// copied if what lies before and behind them are such heads, too.
pub(crate) fn heads_from(xs: &Tensor, start: usize, heads: usize, width: usize) -> Result<Tensor> {
    let (batch, tokens, channels) = xs.dims3()?;
    if start.is_multiple_of(width) && channels.is_multiple_of(width) {
        return xs.reshape((batch, tokens, channels / width, width))?.narrow(2, start / width, heads);
    }
    xs.narrow(2, start, heads * width)?.reshape((batch, tokens, heads, width))
}

/// The sizes of an attention layer, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_k_dim: usize,
    pub head_v_dim: usize,
}

impl Heads {
    pub fn new(
        hidden_size: usize,
        expand_k: f64,
        expand_v: f64,
        num_heads: usize,
        num_kv_heads: Option<usize>,
    ) -> Result<Self> {
        for (name, size) in [("hidden_size", hidden_size), ("num_heads", num_heads)] {
            check_size(name, size)?;
        }
        let num_kv_heads = num_kv_heads.unwrap_or(num_heads);
        if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            bail!("num_kv_heads is {num_kv_heads}, it must divide num_heads, which is {num_heads}");
        }
        let head_k_dim = head_dim("expand_k", hidden_size, expand_k, num_heads)?;
        let head_v_dim = head_dim("expand_v", hidden_size, expand_v, num_heads)?;
        Ok(Self { hidden_size, num_heads, num_kv_heads, head_k_dim, head_v_dim })
    }

    /// The width of the output of all heads.
    pub fn value_dim(&self) -> usize {
        self.num_heads * self.head_v_dim
    }

    /// `[B, T, num_kv_heads, D]` to `[B, T, num_heads, D]`: query head h reads key-value head
    /// `h / (num_heads / num_kv_heads)`.
    pub fn repeat(&self, xs: &Tensor) -> Result<Tensor> {
        let group = self.num_heads / self.num_kv_heads;
        if group == 1 {
            return Ok(xs.clone());
        }
        let (batch, tokens, heads, dim) = xs.dims4()?;
        xs.unsqueeze(3)?.broadcast_as((batch, tokens, heads, group, dim))?.reshape((
            batch,
            tokens,
            heads * group,
            dim,
        ))
    }
}

/// The width of one head: `hidden_size * expand` shared by `num_heads`.
fn head_dim(name: &str, hidden_size: usize, expand: f64, num_heads: usize) -> Result<usize> {
    let width = whole_width((name, expand), ("hidden_size", hidden_size), 1e-9)?;
    if !width.is_multiple_of(num_heads) {
        bail!("num_heads is {num_heads}, it must divide hidden_size * {name}, which is {width}");
    }
    Ok(width / num_heads)
}

/// `size * expand`, a whole number but for `rounding`, which is relative.
pub(crate) fn whole_width(
    (name, expand): (&str, f64),
    (size_name, size): (&str, usize),
    rounding: f64,
) -> Result<usize> {
    let exact = size as f64 * expand;
    let width = exact.round();
    if !(1. ..=MAX_SIZE as f64).contains(&width) || (exact - width).abs() > rounding * width {
        bail!(
            "{name} is {expand}: {size_name} * {name} is {exact}, it must be a whole number from 1 to {MAX_SIZE}"
        );
    }
    Ok(width as usize)
}
