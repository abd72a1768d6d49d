//! Which models there are, and what each has to provide.

use crate::Mode;
use crate::models::cache::Cache;
use crate::models::fields::Fields;
use crate::models::{
    delta_net, gated_deltanet, gla, hgrn2, kda, kimi_linear, linear_attn, mamba2, minimax, olmo_hybrid,
    qwen3_5, qwen3_next, retnet, rwkv7,
};
use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// One kind of model: its `model_type`, and how its configuration is read.
pub(super) struct Family {
    pub model_type: &'static str,
    /// The class that Python loads it with.
    pub architecture: &'static str,
    /// Checks every field, and fills in those that are absent.
    pub parse: fn(&mut Fields) -> Result<Parsed>,
}

/// A configuration that has been checked.
#[derive(Clone)]
pub(super) struct Parsed {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    /// What files call all but the head.
    pub models: &'static [&'static str],
    pub build: Build,
}

/// Makes the model from its parameters.
pub(super) type Build = Arc<dyn Fn(VarBuilder) -> Result<Box<dyn CausalLm>> + Send + Sync>;

/// A causal language model.
pub(super) trait CausalLm: Send + Sync {
    /// An empty cache of the form this model needs.
    fn new_cache(&self) -> Cache;

    /// `input_ids: [B, T]`, checked, to `[B, T, hidden_size]` behind the last norm. With `cu_seqlens`, B is 1 and the
    /// sequences lie one after the other.
    fn hidden_states(
        &self,
        input_ids: &Tensor,
        cu_seqlens: Option<&[u32]>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor>;

    /// `[.., hidden_size]` to `[.., vocab_size]`.
    fn logits(&self, hidden_states: &Tensor) -> Result<Tensor>;

    fn set_mode(&mut self, mode: Mode);
}

/// All models.
pub(super) const FAMILIES: &[Family] = &[
    linear_attn::FAMILY,
    gla::FAMILY,
    retnet::FAMILY,
    hgrn2::FAMILY,
    mamba2::FAMILY,
    delta_net::FAMILY,
    gated_deltanet::FAMILY,
    kda::FAMILY,
    rwkv7::FAMILY,
    qwen3_5::FAMILY,
    qwen3_5::TEXT,
    qwen3_next::FAMILY,
    minimax::FAMILY,
    olmo_hybrid::FAMILY,
    kimi_linear::FAMILY,
];

/// Every `model_type` that [`Config`](crate::models::Config) accepts.
pub const SUPPORTED: &[&str] = &{
    let mut names = [""; FAMILIES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = FAMILIES[i].model_type;
        i += 1;
    }
    names
};

/// The family of a `model_type`.
pub(super) fn family(model_type: &str) -> Result<&'static Family> {
    match FAMILIES.iter().find(|family| family.model_type == model_type) {
        Some(family) => Ok(family),
        None => bail!(
            "field `model_type` is \"{model_type}\", which is not supported; it must be one of {}",
            SUPPORTED.join(", ")
        ),
    }
}
