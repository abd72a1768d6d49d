//! A feed-forward layer of many experts, few of which see a token ([Shazeer et al., 2017](https://arxiv.org/abs/1701.06538)).

use crate::nn::gated_mlp::MlpNames;
use crate::nn::routing::{Router, RouterConfig};
use crate::nn::{Activation, GatedMlp, GatedMlpConfig, GluKind, Linear, as_stored};
use candle_core::{D, DType, Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

/// The expert that every token goes through, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SharedExpert {
    /// None.
    #[default]
    None,
    /// `shared_experts`, of this width.
    Plain(usize),
    /// `shared_expert`, of this width, times the sigmoid of what `shared_expert_gate` makes of the token.
    Gated(usize),
}

/// What the projections of an expert are called: of the gate, up and down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpertNames {
    /// `gate_proj`, `up_proj`, `down_proj`.
    #[default]
    Proj,
    /// `w1`, `w3`, `w2`.
    W,
}

/// What a [`MixtureOfExperts`] is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtureOfExpertsConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Width in between of each expert.
    pub intermediate_size: usize,
    /// How experts are chosen.
    pub router: RouterConfig,
    /// The expert that every token goes through.
    pub shared: SharedExpert,
    /// What an expert's projections are called.
    pub names: ExpertNames,
    /// How the experts' gates act.
    pub kind: GluKind,
    /// Deviation of fresh weights.
    pub initializer_range: f64,
}

impl MixtureOfExpertsConfig {
    fn mlp(&self, intermediate_size: usize) -> GatedMlpConfig {
        GatedMlpConfig {
            hidden_size: self.hidden_size,
            intermediate_size,
            kind: self.kind,
            initializer_range: self.initializer_range,
        }
    }
}

/// `sum_e w_e expert_e(x)` over the experts that the router picks, and the shared one.
///
/// Each expert works on its own tokens alone, so a token costs as much as the experts it is sent to. Parameters:
/// `gate.weight [experts, hidden]`, `experts.N` with the projections of a [`GatedMlp`] or, as transformers has them in
/// memory, `experts.gate_up_proj [experts, 2 * intermediate, hidden]` and `experts.down_proj [experts, hidden, intermediate]`;
/// `gate.e_score_correction_bias` if the router has one.
#[derive(Debug, Clone)]
pub struct MixtureOfExperts {
    hidden_size: usize,
    router: Router,
    experts: Vec<GatedMlp>,
    shared: Option<(GatedMlp, Option<Linear>)>,
}

impl MixtureOfExperts {
    /// # Errors
    /// Sizes that make no layer, by the field's name; whatever `vb` has to say of a tensor.
    pub fn new(cfg: &MixtureOfExpertsConfig, vb: VarBuilder) -> Result<Self> {
        let (hidden, stdev) = (cfg.hidden_size, cfg.initializer_range);
        let router = Router::new(&cfg.router, hidden, stdev, vb.pp("gate"))?;
        let shared = match cfg.shared {
            SharedExpert::None => None,
            SharedExpert::Plain(width) => {
                Some((GatedMlp::new(&cfg.mlp(width), vb.pp("shared_experts"))?, None))
            }
            SharedExpert::Gated(width) => {
                let gate = Linear::new(hidden, 1, false, stdev, vb.pp("shared_expert_gate"))?;
                Some((GatedMlp::new(&cfg.mlp(width), vb.pp("shared_expert"))?, Some(gate)))
            }
        };
        Ok(Self { hidden_size: hidden, router, experts: experts(cfg, vb.pp("experts"))?, shared })
    }

    /// `[B, T, hidden]` to the same shape and dtype.
    ///
    /// # Errors
    /// A wrong shape.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (batch, tokens, hidden) = match *xs.dims() {
            [batch, tokens, hidden] if hidden == self.hidden_size => (batch, tokens, hidden),
            _ => bail!("xs: shape is {:?}, it must be [B, T, {}]", xs.dims(), self.hidden_size),
        };
        if batch * tokens == 0 {
            return Ok(xs.clone());
        }
        let routes = self.router.forward(xs)?;
        let flat = xs.reshape((batch * tokens, hidden))?;
        // The outputs of all experts, one after the other, and where those of each token are.
        let mut outs = Vec::new();
        let mut rows = vec![0u32; batch * tokens * routes.top_k];
        let mut filled = 0;
        for (expert, own) in self.experts.iter().zip(&routes.of_experts) {
            if own.is_empty() {
                continue;
            }
            let ids: Vec<u32> = own.iter().map(|(token, _)| *token).collect();
            let ids = Tensor::from_vec(ids, own.len(), xs.device())?;
            // As sequences of one token: what an expert makes of a token must not depend on how many others it got.
            outs.push(expert.forward(&flat.index_select(&ids, 0)?.unsqueeze(1)?)?.squeeze(1)?);
            for (token, slot) in own {
                rows[*token as usize * routes.top_k + slot] = filled;
                filled += 1;
            }
        }
        let rows = Tensor::from_vec(rows, batch * tokens * routes.top_k, xs.device())?;
        let picked = Tensor::cat(&outs, 0)?.index_select(&rows, 0)?.to_dtype(DType::F32)?;
        let picked = picked.reshape((batch * tokens, routes.top_k, hidden))?;
        let sum = picked.broadcast_mul(&routes.weights.unsqueeze(D::Minus1)?)?.sum(1)?;
        let mut sum = sum.reshape((batch, tokens, hidden))?;
        if sum.track_op() {
            sum = self.with_idle(&sum, &routes.of_experts, xs)?;
        }
        match &self.shared {
            Some(shared) => (sum + shared_output(shared, xs)?)?.to_dtype(xs.dtype()),
            None => sum.to_dtype(xs.dtype()),
        }
    }
}

impl MixtureOfExperts {
    /// The same, and a gradient of 0 for experts that got no token: optimizers expect one of every parameter. Zeros go in
    /// and come out.
    fn with_idle(&self, sum: &Tensor, of_experts: &[Vec<(u32, usize)>], xs: &Tensor) -> Result<Tensor> {
        let zeros = Tensor::zeros((1, 1, xs.dim(2)?), xs.dtype(), xs.device())?;
        let idle = self.experts.iter().zip(of_experts).filter(|(_, own)| own.is_empty());
        idle.into_iter().try_fold(sum.clone(), |sum, (expert, _)| {
            sum.broadcast_add(&expert.forward(&zeros)?.to_dtype(DType::F32)?)
        })
    }
}

impl Module for MixtureOfExperts {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward(xs)
    }
}

/// f32.
fn shared_output((mlp, gate): &(GatedMlp, Option<Linear>), xs: &Tensor) -> Result<Tensor> {
    let ys = mlp.forward(xs)?.to_dtype(DType::F32)?;
    match gate {
        Some(gate) => {
            let gate = Activation::Sigmoid.forward_f32(&gate.forward(xs)?)?;
            ys.broadcast_mul(&gate)
        }
        None => Ok(ys),
    }
}

fn experts(cfg: &MixtureOfExpertsConfig, vb: VarBuilder) -> Result<Vec<GatedMlp>> {
    let count = cfg.router.num_experts;
    let mlp = cfg.mlp(cfg.intermediate_size);
    if !vb.contains_tensor("gate_up_proj") {
        let names = match cfg.names {
            ExpertNames::Proj => MlpNames::default(),
            ExpertNames::W => MlpNames { gate: "w1", up: "w3", down: "w2" },
        };
        return (0..count).map(|i| GatedMlp::with_names(&mlp, names, vb.pp(i))).collect();
    }
    let (hidden, inner) = (cfg.hidden_size, cfg.intermediate_size);
    let both = as_stored(|| vb.get((count, 2 * inner, hidden), "gate_up_proj"))?;
    let down = as_stored(|| vb.get((count, hidden, inner), "down_proj"))?;
    let expert = |i| {
        let (both, down) = (both.get(i)?, down.get(i)?);
        let half = |start| Linear::from_parts(both.narrow(0, start, inner)?, None);
        GatedMlp::from_parts([half(0)?, half(inner)?, Linear::from_parts(down, None)?], cfg.kind)
    };
    (0..count).map(expert).collect()
}
