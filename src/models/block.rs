//! The block that most models have.

use crate::Mode;
use crate::models::residual::Residual;
use crate::models::stack::{Block, Pass};
use crate::nn::{GatedMlp, GatedMlpConfig, Mixer, RmsNorm};
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

/// What follows the mixer of a block.
pub(super) type FeedForward = Box<dyn Module + Send + Sync>;

/// A gated MLP of this width.
pub(super) fn gated_mlp(cfg: &GatedMlpConfig, vb: VarBuilder) -> Result<FeedForward> {
    let mlp = GatedMlp::new(cfg, vb)?;
    Ok(Box::new(move |xs: &Tensor| mlp.forward(xs)))
}

/// A mixer and a feed-forward layer, each behind a norm and beside a skip connection.
pub(super) struct PreNormBlock {
    pub mixer_norm: RmsNorm,
    pub mixer: Box<dyn Mixer>,
    pub feed_forward_norm: RmsNorm,
    pub feed_forward: FeedForward,
}

impl Block for PreNormBlock {
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()> {
        let ys = self.mixer.mix(&xs.normed(&self.mixer_norm)?, pass.call()?)?;
        xs.add(ys)?;
        let ys = self.feed_forward.forward(&xs.normed(&self.feed_forward_norm)?)?;
        xs.add(ys)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mixer.set_mode(mode);
    }
}
