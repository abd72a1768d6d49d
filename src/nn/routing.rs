//! Which experts a token is sent to.

use crate::nn::heads::check_size;
use crate::nn::{Activation, Linear};
use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

/// How the router's logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouterScore {
    /// A softmax over the experts.
    #[default]
    Softmax,
    /// A sigmoid of each.
    Sigmoid,
}

/// How experts are chosen and weighted.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// How many experts there are.
    pub num_experts: usize,
    /// How many a token is sent to.
    pub top_k: usize,
    /// What their scores are.
    pub score: RouterScore,
    /// Whether a bias `e_score_correction_bias` takes part in the choice, though not in the weights.
    pub correction_bias: bool,
    /// Experts are chosen from this many of `groups` groups: those whose two best scores have the largest sum.
    pub top_groups: usize,
    /// Groups of experts that lie side by side.
    pub groups: usize,
    /// Whether the weights of the chosen are made to sum to 1.
    pub normalize: bool,
    /// What the weights are multiplied by in the end.
    pub scale: f64,
}

impl RouterConfig {
    /// The choice of the `top_k` best of `num_experts`, weighted by a softmax.
    pub fn new(num_experts: usize, top_k: usize, normalize: bool) -> Self {
        Self {
            num_experts,
            top_k,
            score: RouterScore::Softmax,
            correction_bias: false,
            top_groups: 1,
            groups: 1,
            normalize,
            scale: 1.,
        }
    }

    /// Refuses numbers that make no choice, by the field's name.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { num_experts, top_k, groups, top_groups, .. } = *self;
        check_size("num_experts", num_experts)?;
        if !(1..=num_experts).contains(&groups) || !num_experts.is_multiple_of(groups) {
            bail!("groups is {groups}, it must divide num_experts, which is {num_experts}");
        }
        if groups > 1 && num_experts / groups < 2 {
            bail!("groups is {groups}: a group must have at least 2 of the {num_experts} experts");
        }
        if !(1..=groups).contains(&top_groups) {
            bail!("top_groups is {top_groups}, it must be from 1 to groups, which is {groups}");
        }
        let reach = num_experts / groups * top_groups;
        if !(1..=reach).contains(&top_k) {
            bail!(
                "top_k is {top_k}, it must be from 1 to the number of experts to choose from, which is {reach}"
            );
        }
        if !self.scale.is_finite() {
            bail!("scale is {}, it must be finite", self.scale);
        }
        Ok(())
    }
}

/// Where tokens go.
pub(crate) struct Routes {
    /// For each expert the tokens that it gets, and which of the token's choices it is.
    pub of_experts: Vec<Vec<(u32, usize)>>,
    /// `[tokens, top_k]`, f32, in the order of the choices.
    pub weights: Tensor,
    pub top_k: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Router {
    cfg: RouterConfig,
    gate: Linear,
    bias: Option<Tensor>,
}

impl Router {
    pub fn new(cfg: &RouterConfig, hidden_size: usize, stdev: f64, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let gate = Linear::new(hidden_size, cfg.num_experts, false, stdev, vb.clone())?;
        let bias = match cfg.correction_bias {
            true => Some(vb.get_with_hints(cfg.num_experts, "e_score_correction_bias", Init::Const(0.))?),
            false => None,
        };
        Ok(Self { cfg: cfg.clone(), gate, bias })
    }

    /// `xs: [B, T, hidden]`. Scores are computed in f32; the choice itself has no gradient.
    pub fn forward(&self, xs: &Tensor) -> Result<Routes> {
        let logits = self.gate.forward(&xs.to_dtype(DType::F32)?)?.flatten(0, 1)?;
        let scores = match self.cfg.score {
            RouterScore::Sigmoid => Activation::Sigmoid.forward_f32(&logits)?,
            RouterScore::Softmax => {
                let exp = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
                exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
            }
        };
        let ranked = match &self.bias {
            Some(bias) => scores.broadcast_add(&bias.to_dtype(DType::F32)?)?,
            None => scores.clone(),
        };
        let (top_k, experts) = (self.cfg.top_k, self.cfg.num_experts);
        let chosen: Vec<Vec<usize>> =
            ranked.detach().to_vec2::<f32>()?.iter().map(|ranks| choose(&self.cfg, ranks)).collect();
        let mut of_experts = vec![Vec::new(); experts];
        for (token, experts) in chosen.iter().enumerate() {
            for (slot, expert) in experts.iter().enumerate() {
                of_experts[*expert].push((token as u32, slot));
            }
        }
        let ids: Vec<u32> = chosen.iter().flatten().map(|expert| *expert as u32).collect();
        let ids = Tensor::from_vec(ids, (chosen.len(), top_k), xs.device())?;
        let mut weights = scores.contiguous()?.gather(&ids, 1)?;
        if self.cfg.normalize {
            // Sigmoids may all be 0.
            weights = weights.broadcast_div(&(weights.sum_keepdim(1)? + 1e-20)?)?;
        }
        if self.cfg.scale != 1. {
            weights = (weights * self.cfg.scale)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.track_op()) {
            // A choice has no slope: optimizers that expect a gradient of every parameter get 0. A factor of 0 would not
            // do, Candle takes it for the end of a graph.
            let zeros = bias.mul(&bias.zeros_like()?)?.to_dtype(DType::F32)?.sum_all()?;
            weights = weights.broadcast_add(&zeros)?;
        }
        Ok(Routes { of_experts, weights, top_k })
    }
}

/// The best experts by rank, of equals the first.
fn choose(cfg: &RouterConfig, ranks: &[f32]) -> Vec<usize> {
    let size = cfg.num_experts / cfg.groups;
    let mut allowed: Vec<usize> = (0..cfg.num_experts).collect();
    if cfg.top_groups < cfg.groups {
        let best_two = |group: usize| {
            let ranks = &ranks[group * size..][..size];
            best((0..size).collect(), 2, |i| ranks[i]).iter().map(|i| ranks[*i]).sum::<f32>()
        };
        let sums: Vec<f32> = (0..cfg.groups).map(best_two).collect();
        let groups = best((0..cfg.groups).collect(), cfg.top_groups, |group| sums[group]);
        allowed.retain(|expert| groups.contains(&(expert / size)));
    }
    best(allowed, cfg.top_k, |expert| ranks[expert])
}

fn best(mut of: Vec<usize>, count: usize, rank: impl Fn(usize) -> f32) -> Vec<usize> {
    let order = |a: &usize, b: &usize| rank(*b).total_cmp(&rank(*a)).then(a.cmp(b));
    if count < of.len() {
        of.select_nth_unstable_by(count, order);
        of.truncate(count);
    }
    of.sort_unstable_by(order);
    of
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_chosen_and_of_equals_the_first() {
        let cfg = RouterConfig::new(5, 3, true);
        assert_eq!(choose(&cfg, &[0.1, 0.5, 0.5, 0.2, 0.5]), [1, 2, 4]);
        assert_eq!(choose(&cfg, &[0.3, 0.1, 0.2, 0.4, 0.2]), [3, 0, 2]);
    }

    /// The group with the best expert has no other good one.
    #[test]
    fn groups_are_chosen_by_their_two_best() {
        let cfg = RouterConfig { groups: 2, ..RouterConfig::new(6, 2, true) };
        assert_eq!(choose(&cfg, &[0.9, 0., 0.1, 0.6, 0.2, 0.5]), [3, 5]);
        let both = RouterConfig { top_groups: 2, ..cfg };
        assert_eq!(choose(&both, &[0.9, 0., 0.1, 0.6, 0.2, 0.5]), [0, 3]);
    }

    #[test]
    fn numbers_that_make_no_choice_are_named() {
        let cfg = RouterConfig::new(6, 2, true);
        for (wrong, name) in [
            (RouterConfig { top_k: 7, ..cfg.clone() }, "top_k is 7"),
            (RouterConfig { top_k: 0, ..cfg.clone() }, "top_k is 0"),
            (RouterConfig { groups: 4, ..cfg.clone() }, "groups is 4"),
            (RouterConfig { groups: 6, ..cfg.clone() }, "groups is 6"),
            (RouterConfig { groups: 2, top_groups: 3, ..cfg.clone() }, "top_groups is 3"),
            (RouterConfig { groups: 3, top_groups: 1, top_k: 3, ..cfg.clone() }, "top_k is 3"),
            (RouterConfig { num_experts: 0, ..cfg.clone() }, "num_experts is 0"),
        ] {
            let message = wrong.check().map_or_else(|error| error.to_string(), |()| "fine".into());
            assert!(message.contains(name), "{message}");
        }
    }
}
