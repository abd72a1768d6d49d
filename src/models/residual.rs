//! The stream of activations that the blocks of a model add to.

use crate::nn::{LayerNorm, RmsNorm};
use candle_core::{Module, Result, Tensor};

/// A residual stream, `[B, T, hidden_size]`. What is added to it waits for the norm that reads it next, which makes the sum on
/// its way.
pub(super) struct Residual {
    xs: Tensor,
    added: Option<Tensor>,
}

impl Residual {
    pub fn new(xs: Tensor) -> Self {
        Self { xs, added: None }
    }

    pub fn add(&mut self, ys: Tensor) -> Result<()> {
        self.sum()?;
        self.added = Some(ys);
        Ok(())
    }

    /// The stream itself.
    pub fn sum(&mut self) -> Result<&Tensor> {
        if let Some(added) = self.added.take() {
            self.xs = (&self.xs + added)?;
        }
        Ok(&self.xs)
    }

    /// `norm` of the stream.
    pub fn normed(&mut self, norm: &dyn StreamNorm) -> Result<Tensor> {
        let Some(added) = self.added.take() else { return norm.forward(&self.xs) };
        let (sum, ys) = norm.forward_of_sum(&self.xs, &added)?;
        self.xs = sum;
        Ok(ys)
    }
}

/// A norm of a residual stream.
pub(super) trait StreamNorm: Module + Send + Sync {
    /// `xs + added`, and the norm of that.
    fn forward_of_sum(&self, xs: &Tensor, added: &Tensor) -> Result<(Tensor, Tensor)> {
        let sum = (xs + added)?;
        let ys = self.forward(&sum)?;
        Ok((sum, ys))
    }
}

impl StreamNorm for LayerNorm {}

impl StreamNorm for RmsNorm {
    fn forward_of_sum(&self, xs: &Tensor, added: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_of_sum(xs, added)
    }
}
