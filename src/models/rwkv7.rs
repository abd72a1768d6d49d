//! `rwkv7`: blocks of [`Rwkv7Attention`] and [`Rwkv7FeedForward`], where later layers see the values of the first.

use crate::Mode;
use crate::models::decoder::refuse_attention;
use crate::models::fields::{Fields, in_field};
use crate::models::registry::{Family, Parsed};
use crate::models::residual::Residual;
use crate::models::stack::{Block, FLA, Layers, Norm, Pass, Site, StackConfig};
use crate::nn::{
    Activation, LayerNorm, Rwkv7Attention, Rwkv7AttentionConfig, Rwkv7FeedForward, Rwkv7FeedForwardConfig,
};
use candle_core::{Result, bail};
use candle_nn::VarBuilder;
use serde_json::Value;

pub(super) const FAMILY: Family = Family { model_type: "rwkv7", architecture: "RWKV7ForCausalLM", parse };

/// What the blocks are made from, but for what depends on the layer.
#[derive(Clone)]
struct BlockConfig {
    attn: Rwkv7AttentionConfig,
    ffn: Rwkv7FeedForwardConfig,
    norm_first: bool,
    norm_bias: bool,
    norm_eps: f64,
}

fn parse(fields: &mut Fields) -> Result<Parsed> {
    let mut stack = StackConfig::parse(fields, 24)?;
    let hidden_size = stack.hidden_size;
    fields.choice("attn_mode", "chunk", &["chunk", "fused_recurrent"])?;
    refuse_attention(fields)?;
    let norm_eps = fields.positive("norm_eps", 1e-5)?;
    let attn = attention(fields, &stack, norm_eps)?;
    let hidden_act = fields.text("hidden_act", "sqrelu")?;
    let config = BlockConfig {
        ffn: Rwkv7FeedForwardConfig {
            hidden_size,
            intermediate_size: intermediate_size(fields, hidden_size)?,
            hidden_act: in_field("hidden_act", Activation::from_fla(&hidden_act))?,
            layer: attn.layer,
        },
        attn,
        norm_first: fields.flag("norm_first", true)?,
        norm_bias: fields.flag("norm_bias", true)?,
        norm_eps,
    };
    stack.head_range = 0.5 / (hidden_size as f64).sqrt();
    // The authors' fresh embeddings are within 1e-4, and learn at a rate of their own. At one rate for all, the norm behind
    // them would make their gradient hundreds of times as large as all others together: they begin as other models' do.
    Ok(stack.with_layers(FLA, config))
}

impl Layers for BlockConfig {
    fn block(&self, Site { layer, vb, .. }: Site) -> Result<Box<dyn Block>> {
        Ok(Box::new(Rwkv7Block::new(self, layer, vb)?))
    }

    fn norm(&self, vb: VarBuilder) -> Result<Norm> {
        Ok(Box::new(LayerNorm::new(self.ffn.hidden_size, self.norm_eps, self.norm_bias, vb)?))
    }
}

fn attention(fields: &mut Fields, stack: &StackConfig, norm_eps: f64) -> Result<Rwkv7AttentionConfig> {
    let hidden_size = stack.hidden_size;
    let num_heads = fields.optional_size("num_heads", None)?;
    let head_dim = match (fields.optional_size("head_dim", Some(64))?, num_heads) {
        // The authors' layers have as many heads as this makes, whatever `num_heads` says.
        (Some(head_dim), _) => head_dim,
        (None, Some(num_heads)) if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        (None, Some(num_heads)) => {
            bail!("field `num_heads` is {num_heads}, it must divide hidden_size, which is {hidden_size}")
        }
        (None, None) => bail!("field `head_dim` is null and `num_heads` too, one of them must be given"),
    };
    let mut rank = |name: &str, default: usize, factor: f64| -> Result<usize> {
        // An explicit null means a width that grows with the model.
        let wide = (hidden_size as f64).sqrt() * factor;
        let grown = ((wide / 32.).round_ties_even() as usize * 32).max(32);
        Ok(fields.optional_size(name, Some(default))?.unwrap_or(grown))
    };
    let larger = head_dim as f64 / 64.;
    let config = Rwkv7AttentionConfig {
        hidden_size,
        head_dim,
        decay_low_rank_dim: rank("decay_low_rank_dim", 64, 2.5 * larger)?,
        gate_low_rank_dim: rank("gate_low_rank_dim", 128, 5.)?,
        a_low_rank_dim: rank("a_low_rank_dim", 64, 2.5 * larger)?,
        v_low_rank_dim: rank("v_low_rank_dim", 16, 1.7 * larger)?,
        value_dim: Some(value_dim(fields, stack)?),
        norm_eps,
        // Its two forms differ in the epsilon of this norm: inside the root, or the least root.
        l2_eps: if fields.flag("fuse_norm", true)? { 1e-6 } else { 1e-24 },
        layer: (0, stack.num_layers),
    };
    config.check()?;
    Ok(config)
}

/// A number for all layers, or a list with one for each.
fn value_dim(fields: &mut Fields, stack: &StackConfig) -> Result<usize> {
    let (hidden, layers) = (stack.hidden_size, stack.num_layers);
    let value = fields.value("value_dim", Value::Null);
    let dims: Vec<Option<u64>> = match value {
        Value::Null => return Ok(hidden),
        Value::Array(dims) => dims.iter().map(Value::as_u64).collect(),
        dim => vec![dim.as_u64(); layers],
    };
    let wanted = |dim: &&Option<u64>| dim.is_some_and(|dim| dim >= hidden as u64 && dim % hidden as u64 == 0);
    if dims.len() != layers || dims.iter().filter(wanted).count() != layers {
        bail!(
            "field `value_dim` is {value}, it must be a multiple of hidden_size, {hidden}, or {layers} of them"
        );
    }
    match dims[0] {
        Some(dim) if dims.iter().all(|other| *other == dims[0]) => Ok(dim as usize),
        _ => bail!(
            "field `value_dim` is {value}: layers of different widths cannot share the first one's values"
        ),
    }
}

fn intermediate_size(fields: &mut Fields, hidden_size: usize) -> Result<usize> {
    let given = fields.optional_size("intermediate_size", None)?;
    fields.value("hidden_ratio", 4.into());
    let ratio = fields.optional_number("hidden_ratio", None)?.unwrap_or(4.);
    if !(0. ..=1024.).contains(&ratio) || ratio == 0. {
        bail!("field `hidden_ratio` is {ratio}, it must be above 0 and at most 1024");
    }
    Ok(given.unwrap_or_else(|| Rwkv7FeedForwardConfig::intermediate_size(hidden_size, ratio)))
}

struct Rwkv7Block {
    pre_norm: Option<LayerNorm>,
    attn_norm: LayerNorm,
    attn: Rwkv7Attention,
    ffn_norm: LayerNorm,
    ffn: Rwkv7FeedForward,
}

impl Rwkv7Block {
    fn new(cfg: &BlockConfig, layer: usize, vb: VarBuilder) -> Result<Self> {
        let layer = (layer, cfg.attn.layer.1);
        let norm =
            |name: &str| LayerNorm::new(cfg.attn.hidden_size, cfg.norm_eps, cfg.norm_bias, vb.pp(name));
        Ok(Self {
            pre_norm: if cfg.norm_first && layer.0 == 0 { Some(norm("pre_norm")?) } else { None },
            attn_norm: norm("attn_norm")?,
            attn: Rwkv7Attention::new(&Rwkv7AttentionConfig { layer, ..cfg.attn.clone() }, vb.pp("attn"))?,
            ffn_norm: norm("ffn_norm")?,
            ffn: Rwkv7FeedForward::new(&Rwkv7FeedForwardConfig { layer, ..cfg.ffn.clone() }, vb.pp("ffn"))?,
        })
    }
}

impl Block for Rwkv7Block {
    fn forward(&self, xs: &mut Residual, pass: &mut Pass) -> Result<()> {
        if let Some(norm) = &self.pre_norm {
            *xs = Residual::new(xs.normed(norm)?);
        }
        let call = pass.call()?;
        let (ys, values) = self.attn.mix(&xs.normed(&self.attn_norm)?, pass.first_values.as_ref(), call)?;
        pass.first_values.get_or_insert(values);
        xs.add(ys)?;
        let ys = self.ffn.mix(&xs.normed(&self.ffn_norm)?, pass.call()?)?;
        xs.add(ys)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.attn.set_mode(mode);
    }

    /// Both of its layers look at the token before.
    fn caches(&self) -> usize {
        2
    }
}
