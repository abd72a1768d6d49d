//! Linear attention with a feature map ([Katharopoulos et al., 2020](https://arxiv.org/abs/2006.16236)).

use crate::nn::call::{Call, Mixer, public_methods};
use crate::nn::heads::Heads;
use crate::nn::qkv::{Projected, Qkv, Silu};
use crate::nn::{FeatureMap, FeatureMapKind, LayerCache, Linear, RmsNorm};
use crate::{Mode, Output, linear_attn};
use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;

/// What a [`LinearAttention`] layer is made from. The defaults are flash-linear-attention's.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearAttentionConfig {
    /// Width of input and output. Default: 1024.
    pub hidden_size: usize,
    /// Width of all query heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_k: f64,
    /// Width of all output heads together, as a multiple of `hidden_size`. Default: 1.
    pub expand_v: f64,
    /// Heads. Default: 8.
    pub num_heads: usize,
    /// Key-value heads, a divisor of `num_heads`; `None` means as many. Default: `None`.
    pub num_kv_heads: Option<usize>,
    /// The feature map on queries and keys. Default: elementwise product.
    pub feature_map: FeatureMapKind,
    /// One learned feature map for both, for those that can be shared (not DPFP, which has no parameters). Default: no.
    pub tie_feature_map_qk: bool,
    /// Whether the output is normalised head by head. Default: yes.
    pub output_norm: bool,
    /// Divide mapped queries by their sum. Default: no.
    pub norm_q: bool,
    /// Divide mapped keys by their sum. Default: no.
    pub norm_k: bool,
    /// Divide the output by `q_t . z_t`, z the running sum of keys. Default: no.
    pub norm_feature_map: bool,
    /// Whether the output norm has a weight. Default: yes.
    pub elementwise_affine: bool,
    /// Epsilon of the output norm. Default: 1e-5.
    pub norm_eps: f64,
    /// Deviation of fresh weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for LinearAttentionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            expand_k: 1.,
            expand_v: 1.,
            num_heads: 8,
            num_kv_heads: None,
            feature_map: FeatureMapKind::ElementwiseProduct,
            tie_feature_map_qk: false,
            output_norm: true,
            norm_q: false,
            norm_k: false,
            norm_feature_map: false,
            elementwise_affine: true,
            norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl LinearAttentionConfig {
    /// The sizes, or an error that names the field that is wrong.
    pub(crate) fn check(&self) -> Result<Heads> {
        Heads::new(self.hidden_size, self.expand_k, self.expand_v, self.num_heads, self.num_kv_heads)
    }
}

/// Linear attention: project, map, attend without a decay, normalise, project.
///
/// Parameters: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `feature_map_q`, `feature_map_k`, `norm`.
#[derive(Debug, Clone)]
pub struct LinearAttention {
    heads: Heads,
    qkv: Qkv,
    feature_map_q: FeatureMap,
    feature_map_k: FeatureMap,
    norm_q: bool,
    norm_k: bool,
    normalize: bool,
    norm: Option<RmsNorm>,
    o_proj: Linear,
    mode: Mode,
}

impl LinearAttention {
    /// # Errors
    /// Sizes that do not divide, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &LinearAttentionConfig, vb: VarBuilder) -> Result<Self> {
        let heads = cfg.check()?;
        let stdev = cfg.initializer_range;
        let (feature_map_q, feature_map_k) = feature_maps(cfg, &heads, &vb)?;
        let norm = match cfg.output_norm {
            true => {
                Some(RmsNorm::new(heads.head_v_dim, cfg.norm_eps, cfg.elementwise_affine, vb.pp("norm"))?)
            }
            false => None,
        };
        Ok(Self {
            qkv: Qkv::new(&(&heads).into(), None, Silu::WithConvolution, stdev, &vb, None)?,
            feature_map_q,
            feature_map_k,
            norm_q: cfg.norm_q,
            norm_k: cfg.norm_k,
            normalize: cfg.norm_feature_map,
            norm,
            o_proj: Linear::new(heads.value_dim(), heads.hidden_size, false, stdev, vb.pp("o_proj"))?,
            heads,
            mode: Mode::Auto,
        })
    }
}

public_methods!(LinearAttention);

impl Mixer for LinearAttention {
    fn mix(&self, xs: &Tensor, call: Call) -> Result<Tensor> {
        let size = call.check(xs, self.heads.hidden_size)?;
        let Projected { q, k, v, conv, .. } = self.qkv.forward(xs, &call)?;
        let mut q = self.feature_map_q.forward(&q)?;
        let mut k = self.feature_map_k.forward(&k)?;
        if self.norm_q {
            q = divide_by_sum(&q)?;
        }
        if self.norm_k {
            k = divide_by_sum(&k)?;
        }
        let (k, v) = (self.heads.repeat(&k)?, self.heads.repeat(&v)?);
        let options = call.options(self.mode).with_normalize(self.normalize);
        let Output { out, state } = linear_attn(&q, &k, &v, &options)?;
        call.finish(state, conv, size);
        let out = match &self.norm {
            Some(norm) => norm.forward(&out)?,
            None => out,
        };
        self.o_proj.forward(&out.flatten_from(2)?)
    }

    fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }
}

fn feature_maps(
    cfg: &LinearAttentionConfig,
    heads: &Heads,
    vb: &VarBuilder,
) -> Result<(FeatureMap, FeatureMap)> {
    let map =
        |name: &str| FeatureMap::new(cfg.feature_map, heads.head_k_dim, cfg.initializer_range, vb.pp(name));
    if !cfg.tie_feature_map_qk {
        return Ok((map("feature_map_q")?, map("feature_map_k")?));
    }
    // A file that stores shared tensors once may have kept either of the two names.
    let held =
        |name: &str| ["layer", "layer1"].iter().any(|layer| vb.pp(name).pp(layer).contains_tensor("weight"));
    let only_k = held("feature_map_k") && !held("feature_map_q");
    let shared = map(if only_k { "feature_map_k" } else { "feature_map_q" })?;
    Ok((shared.clone(), shared))
}

fn divide_by_sum(xs: &Tensor) -> Result<Tensor> {
    let wide = xs.to_dtype(DType::F32)?;
    let sum = (wide.sum_keepdim(D::Minus1)? + 1e-4)?;
    wide.broadcast_div(&sum)?.to_dtype(xs.dtype())
}
