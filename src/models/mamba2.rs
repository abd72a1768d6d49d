//! `mamba2`: blocks of a [`Mamba2`] layer behind a norm, and nothing else.

use crate::Mode;
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::models::residual::Residual;
use crate::models::stack::{Block, Layers, Names, Norm, Pass, Site, StackConfig};
use crate::nn::{Activation, Mamba2, Mamba2Config, Mixer, RmsNorm};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;

pub(super) const FAMILY: Family = Family { model_type: "mamba2", architecture: "Mamba2ForCausalLM", parse };

/// Files converted from the authors' first ones have the second name.
const NAMES: Names = Names { model: &["backbone"], embeddings: &["embeddings", "embedding"], norm: "norm_f" };

/// transformers has a model of the same type, with other names for some fields and other defaults.
const TRANSFORMERS_ONLY: [&str; 3] = ["layer_norm_epsilon", "time_step_limit", "time_step_min"];

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let transformers = TRANSFORMERS_ONLY.iter().any(|name| fields.has(name));
    let layer = if transformers { transformers_layer(fields)? } else { fla_layer(fields)? };
    let stack = StackConfig::parse(fields, if transformers { 64 } else { 48 })?;
    let rescale = fields.flag("rescale_prenorm_residual", !transformers)?;
    // Without consequences: every sum is taken in f32 anyway.
    fields.flag("residual_in_fp32", true)?;
    let heads = layer.check()?.heads;
    match fields.optional_size("num_heads", Some(heads))? {
        Some(given) if given != heads => bail!(
            "field `num_heads` is {given}, it must be hidden_size * expand / head_dim, which is {heads}, or absent"
        ),
        _ => {}
    }
    // As wide as the usual initialisation of a projection, scaled down so that the sum of all blocks keeps its size.
    let inner = (heads * layer.head_dim) as f64;
    let scaled = 1. / (3. * inner * stack.num_layers as f64).sqrt();
    let layer = Mamba2Config {
        initializer_range: stack.initializer_range,
        out_proj_range: if rescale { scaled } else { stack.initializer_range },
        ..layer
    };
    Ok(stack.with_layers(NAMES, layer))
}

impl Layers for Mamba2Config {
    fn block(&self, Site { vb, .. }: Site) -> Result<Box<dyn Block>> {
        let norm = RmsNorm::new(self.hidden_size, self.norm_eps, true, vb.pp("norm"))?;
        Ok(Box::new(Mamba2Block { norm, mixer: Mamba2::new(self, vb.pp("mixer"))? }))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(RmsNorm::new(self.hidden_size, self.norm_eps, true, vb)?))
    }
}

/// The fields that both have.
fn common(fields: &mut Fields, [hidden_size, n_groups]: [usize; 2]) -> Result<Mamba2Config> {
    // Written as the integer that it is to the authors.
    fields.value("expand", 2.into());
    Ok(Mamba2Config {
        hidden_size: fields.size("hidden_size", hidden_size)?,
        expand: fields.positive("expand", 2.)?,
        head_dim: fields.size("head_dim", 64)?,
        state_size: fields.size("state_size", 128)?,
        n_groups: fields.size("n_groups", n_groups)?,
        conv_kernel: fields.size("conv_kernel", 4)?,
        use_conv_bias: fields.flag("use_conv_bias", true)?,
        use_bias: fields.flag("use_bias", false)?,
        ..Default::default()
    })
}

fn fla_layer(fields: &mut Fields) -> Result<Mamba2Config> {
    let common = common(fields, [2048, 1])?;
    let hidden_act = fields.text("hidden_act", "silu")?;
    let floor = fields.positive("dt_init_floor", 1e-4)?;
    let dt_min = fields.positive("dt_min", 1e-3)?;
    let dt_max = fields.positive("dt_max", 0.1)?;
    Ok(Mamba2Config {
        hidden_act: in_field("hidden_act", Activation::from_fla(&hidden_act))?,
        norm_eps: fields.positive("norm_eps", 1e-5)?,
        rmsnorm: fields.flag("rmsnorm", true)?,
        norm_before_gate: fields.flag("norm_before_gate", false)?,
        d_has_hdim: fields.flag("D_has_hdim", false)?,
        dt_limit: fields.pair("dt_limit")?.unwrap_or(common.dt_limit),
        conv_init: fields.optional_number("conv_init", None)?,
        a_init_range: fields.pair("A_init_range")?.unwrap_or(common.a_init_range),
        dt_init_range: [dt_min, dt_max].map(|dt| dt.max(floor)),
        ..common
    })
}

fn transformers_layer(fields: &mut Fields) -> Result<Mamba2Config> {
    let common = common(fields, [4096, 8])?;
    fields.size("vocab_size", 32768)?;
    fields.positive("initializer_range", 0.1)?;
    fields.value("bos_token_id", 0.into());
    let hidden_act = fields.text("hidden_act", "silu")?;
    let floor = fields.positive("time_step_floor", 1e-4)?;
    let dt_min = fields.positive("time_step_min", 1e-3)?;
    let dt_max = fields.positive("time_step_max", 0.1)?;
    Ok(Mamba2Config {
        hidden_act: in_field("hidden_act", Activation::from_transformers(&hidden_act))?,
        norm_eps: fields.positive("layer_norm_epsilon", 1e-5)?,
        dt_limit: fields.pair("time_step_limit")?.unwrap_or(common.dt_limit),
        dt_init_range: [dt_min, dt_max].map(|dt| dt.max(floor)),
        ..common
    })
}

struct Mamba2Block {
    norm: RmsNorm,
    mixer: Mamba2,
}

impl Block for Mamba2Block {
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()> {
        let ys = self.mixer.mix(&xs.normed(&self.norm)?, pass.call()?)?;
        xs.add(ys)
    }

    fn set_mode(&mut self, mode: Mode) {
        Mixer::set_mode(&mut self.mixer, mode);
    }
}
